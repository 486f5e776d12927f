"""All rows of a report: over processes, within a time limit, and resumable.

Whatever is done is kept in a folder under a name that holds everything it depends on (model, pairs, arguments, the
code that drew it); a run that finds it there does not do it again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vllm_omni.engine.malloc import keep_freed_memory
from vllm_omni.engine.waiting import wait_politely
from vllm_omni.files import write_whole
from vllm_omni.kernels.device import tried
from vllm_omni.quality.bench import Bench, BenchModel, Result
from vllm_omni.quality.meter import Work
from vllm_omni.quality.metrics import lpips
from vllm_omni.quality.pairs import Pair, tuning
from vllm_omni.quality.peers import PEERS
from vllm_omni.quality.rows import GIVEN, TARGETS, Row, default_rows, fewer, given_rows, reference, urgency

PACKAGE = Path(__file__).resolve().parent.parent
SHEET_PAIRS = 6
TUNING_PAIRS = 2
CLOCK_PAIRS = 3


@dataclass(frozen=True)
class ReportSettings:
    """The order for a report. `settings` None: our own suite."""

    model: BenchModel
    pairs: tuple[Pair, ...]
    steps: tuple[int, ...]
    folder: Path
    settings: tuple[Any, ...] | None = None
    peers: bool = False
    processes: int = 1
    limit_s: float | None = None


@dataclass
class ReportResults:
    """What was drawn, and notices for the reader about what was not."""

    results: list[Result] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    references: dict[int, Path] = field(default_factory=dict)  # by steps, the first uncached pictures
    seconds: float = 0.0


class Worker:
    """One process's model and its share of the work; every method looks into the folder first."""

    def __init__(self, plan: ReportSettings, threads: int | None) -> None:
        self.plan = plan
        _silence_loading()
        self.bench = Bench(plan.model, threads)
        described = [plan.model, plan.pairs, _digest("quality", ("bench", "meter", "metrics", "pairs", "peers"))]
        versions = [importlib.metadata.version(name) for name in ("torch", "diffusers")]
        self.engine_code = _digest("diffusion") + _digest("kernels") + _digest("", ("guidance", "learning"))
        self.identity = repr([*described, self.bench.fingerprint, versions])
        self.profiles = self.bench.profiles  # what plans are made from, and the curve of diffusers' MagCache

    def ratios(self, steps: int) -> tuple[float, ...]:
        return self.bench.ratios(steps)

    def reference(self, steps: int) -> tuple[np.ndarray, Work]:
        """The uncached pictures and their work."""
        file = self.file(reference(steps), "reference.npz")
        if not file.is_file():
            pictures, work = self.bench.draw(reference(steps), self.plan.pairs)
            forwards = np.array(work.forwards)
            write_whole(file, lambda to: np.savez(to, pictures=pictures, done=work.done, forwards=forwards))
        with np.load(file) as kept:
            made = [(int(rows), float(each)) for rows, each in kept["forwards"]]
            return kept["pictures"], Work(int(kept["done"]), made)

    def prepare(self, steps: int) -> Path:
        """Draw the uncached pictures; returns the file of the first of them."""
        file = self.file(reference(steps), "sheet.npy")
        if not file.is_file():
            few = self.reference(steps)[0][:SHEET_PAIRS].astype(np.float16)
            write_whole(file, lambda to: np.save(to, few))
        return file

    def tune(self, peer: str, steps: int) -> list[float]:
        row = Row(peer, peer, steps, peer=peer)
        file = self.file(row, "tuned.json")
        if not file.is_file():
            pairs = tuning(list(self.plan.pairs), TUNING_PAIRS)
            text = json.dumps(self.bench.tune(peer, steps, pairs, TARGETS))
            write_whole(file, lambda to: to.write(text.encode()))
        return json.loads(file.read_text())

    def measure(self, row: Row) -> Result:
        file = self.file(row, "result.json")
        if not file.is_file():
            exact, whole = self.reference(row.steps)
            result, pictures = self.bench.measure(row, self.plan.pairs, exact, whole)
            few = pictures[:SHEET_PAIRS].astype(np.float16)
            result.sheet = str(self.file(row, "sheet.npy"))
            write_whole(Path(result.sheet), lambda to: np.save(to, few))
            write_whole(file, lambda to: to.write(json.dumps(asdict(result)).encode()))
        kept = json.loads(file.read_text())
        return Result(**kept | {"row": Row(**kept["row"])})

    def clock(self, rows: tuple[Row, ...]) -> list[float]:
        file = self.file(rows, "clock.json")
        if not file.is_file():
            pairs = tuning(list(self.plan.pairs), CLOCK_PAIRS)
            text = json.dumps(self.bench.clock(rows, pairs))
            write_whole(file, lambda to: to.write(text.encode()))
        return json.loads(file.read_text())

    def file(self, what: Row | tuple[Row, ...], ending: str) -> Path:
        """The file that keeps something.

        What is drawn with a cache depends on the profiles, and what our engine draws with one on its code, too.
        """
        rows = what if isinstance(what, tuple) else (what,)
        cached = any(row.peer is not None or row.request_cache != "off" for row in rows)
        engine = any(row.peer is None and row.request_cache != "off" for row in rows)
        depends = [self.profiles if cached else "", self.engine_code if engine else ""]
        key = hashlib.sha256(repr([self.identity, *depends, what]).encode()).hexdigest()[:20]
        return self.plan.folder / f"{key}.{ending}"


def run(plan: ReportSettings) -> ReportResults:
    """Draw every row of `plan`, with a progress bar. OmniError if a setting cannot be had on this model."""
    began = time.monotonic()
    plan.folder.mkdir(parents=True, exist_ok=True)
    missing = lpips()[1]  # also whether there are any metrics at all: before hours of drawing
    outcome = ReportResults()
    with _executor(plan) as executor, tqdm(desc="quality", unit="row", smoothing=0.1) as bar:
        pool = _Pool(plan, executor, bar, outcome, None if plan.limit_s is None else began + plan.limit_s)
        pool.work([(_prepare, steps) for steps in plan.steps])
        tasks: list[tuple[Any, ...]] = []
        if plan.peers:
            tasks += [(_tune, name, steps) for steps in plan.steps for name in _installed(outcome.notices)]
        rows = [row for steps in plan.steps for row in _rows(plan, steps, executor)]
        tasks += [(_measure, row) for row in sorted(rows, key=urgency)]
        pool.work(tasks)
        known = {result.row for result in outcome.results}
        controls = {fewer(r.row.steps, round(r.nfe)) for r in outcome.results if r.row.group == GIVEN}
        pool.work([(_measure, row) for row in sorted(controls - known, key=str)])
        _clock_all(plan, pool, outcome)
        if plan.processes == 1:
            executor.submit(_close_worker).result()
    if missing:
        outcome.notices.append(missing)
    outcome.seconds = time.monotonic() - began
    return outcome


def _rows(plan: ReportSettings, steps: int, executor: Executor) -> list[Row]:
    if plan.settings is not None:
        return given_rows(steps, plan.settings)
    return default_rows(steps, executor.submit(_ratios, steps).result())


def _installed(notices: list[str]) -> list[str]:
    for name in (name for name, peer in PEERS.items() if not peer.installed):
        notices.append(f"{name} is left out: {PEERS[name].package} is not installed")
    return [name for name, peer in PEERS.items() if peer.installed]


def _clock_all(plan: ReportSettings, pool: _Pool, outcome: ReportResults) -> None:
    """Measured speed-ups, step count by step count."""
    for steps in plan.steps:
        rows = tuple(sorted((r.row for r in outcome.results if r.row.steps == steps), key=str))  # in any order drawn
        if rows:
            pool.work([(_clock, rows)])


class _Pool:
    """Hands out tasks and takes their results; after the deadline only what an earlier run has done."""

    def __init__(
        self, plan: ReportSettings, executor: Executor, bar: Any, outcome: ReportResults, deadline: float | None
    ) -> None:
        self.plan, self.executor, self.bar, self.outcome, self.deadline = plan, executor, bar, outcome, deadline

    def work(self, tasks: list[tuple[Any, ...]]) -> None:
        waiting, running = list(tasks), dict[Future[Any], tuple[Any, ...]]()
        self.bar.total = (self.bar.total or 0) + len(tasks)
        self.bar.refresh()
        while waiting or running:
            late = self.deadline is not None and time.monotonic() > self.deadline
            if late and waiting:
                kept = self.executor.submit(_kept, waiting).result()
                if left := [_name(task) for task, done_before in zip(waiting, kept, strict=True) if not done_before]:
                    self.outcome.notices.append(f"left out, the time was up: {', '.join(left)}; run again to go on")
                waiting = [task for task, done_before in zip(waiting, kept, strict=True) if done_before]
            while waiting and len(running) < self.plan.processes:
                task = waiting.pop(0)
                self.bar.set_postfix_str(_name(task))
                running[self.executor.submit(*task)] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
            for future in done:
                more = self._take(running.pop(future), future)
                waiting = more + waiting
                self.bar.total += len(more)
                self.bar.update()

    def _take(self, task: tuple[Any, ...], future: Future[Any]) -> list[tuple[Any, ...]]:
        """Keep a result; returns the tasks that follow from it. A peer that fails is a notice, ours is an error."""
        error = future.exception()
        what = task[1]
        if error is not None:
            peer = what if task[0] is _tune else what.peer if isinstance(what, Row) else None
            if peer is None:
                raise error
            self.outcome.notices.append(f"{_name(task)} failed: {type(error).__name__}: {error}")
        elif task[0] is _tune:
            strengths = dict.fromkeys(future.result())
            return [(_measure, Row(what, f"{what} {s:g}", task[2], peer=what, strength=s)) for s in strengths]
        elif task[0] is _prepare:
            self.outcome.references[what] = future.result()
        elif task[0] is _measure:
            self.outcome.results.append(future.result())
        elif task[0] is _clock:
            measured = dict(zip(what, future.result(), strict=True))
            self.outcome.results = [
                replace(result, times_measured=measured.get(result.row, result.times_measured))
                for result in self.outcome.results
            ]
        return []


def _name(task: tuple[Any, ...]) -> str:
    function, what = task[0], task[1]
    if function is _measure:
        return f"{what.name} of {what.steps}"
    if function is _clock:
        return f"times of {what[0].steps} steps"
    return f"{what} of {task[2]}: strengths" if function is _tune else f"{what} steps uncached"


# What runs in a worker process, or here. Each has one worker, made by its first task: what fails then is the task's.
_make: Callable[[], Worker] | None = None
_worker: Worker | None = None


class _Here(Executor):
    """Runs each task at once, in the caller's thread, which Ctrl-C reaches."""

    def submit(self, task: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future = Future[Any]()
        result, error = tried(partial(task, *given, **named))
        future.set_result(result) if error is None else future.set_exception(error)
        return future


class _Processes(ProcessPoolExecutor):
    """Its workers end at Ctrl-C without a word; until they can, while they start, it is held back."""

    def submit(self, task: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(task, *given, **named)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _executor(plan: ReportSettings) -> Executor:
    if plan.processes == 1:
        _init_worker(plan, None)
        return _Here()
    context = multiprocessing.get_context("spawn")
    return _Processes(plan.processes, context, _init_process, (plan, 1))


def _init_process(plan: ReportSettings, threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _init_worker(plan, threads)


def _init_worker(plan: ReportSettings, threads: int | None) -> None:
    global _make, _worker
    keep_freed_memory()
    wait_politely()
    _make, _worker = partial(Worker, plan, threads), None


def _the_worker() -> Worker:
    global _worker
    if _worker is None:
        assert _make is not None
        _worker = _make()
    return _worker


def _close_worker() -> None:
    global _worker
    if _worker is not None:
        _worker.bench.close()
    _worker = None


def _kept(tasks: list[tuple[Any, ...]]) -> list[bool]:
    """Which tasks an earlier run has done."""
    worker = _the_worker()
    endings = {_prepare: "sheet.npy", _measure: "result.json", _clock: "clock.json"}
    files = []
    for function, what, *more in tasks:
        if function is _tune:
            files.append(worker.file(Row(what, what, more[0], peer=what), "tuned.json"))
        else:
            files.append(worker.file(reference(what) if function is _prepare else what, endings[function]))
    return [file.is_file() for file in files]


def _in_worker(method: Callable[..., Any], *arguments: Any) -> Any:
    return method(_the_worker(), *arguments)


def _prepare(steps: int) -> Path:
    return _in_worker(Worker.prepare, steps)


def _ratios(steps: int) -> tuple[float, ...]:
    return _in_worker(Worker.ratios, steps)


def _tune(peer: str, steps: int) -> list[float]:
    return _in_worker(Worker.tune, peer, steps)


def _measure(row: Row) -> Result:
    return _in_worker(Worker.measure, row)


def _clock(rows: tuple[Row, ...]) -> list[float]:
    return _in_worker(Worker.clock, rows)


def _silence_loading() -> None:
    """One progress bar is enough."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _digest(folder: str, names: tuple[str, ...] | None = None) -> str:
    """A hash of the package's own source (and profiles) in `folder`."""
    files = [f for f in sorted((PACKAGE / folder).rglob("*")) if f.suffix in (".py", ".json")]
    kept = [f for f in files if names is None or f.stem in names]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in kept)).hexdigest()[:16]
