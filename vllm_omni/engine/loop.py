"""The loop that drives an engine: between two steps it takes commands, ends what is late, and reports."""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch

from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.distributed.lockstep import control_of
from vllm_omni.engine import cost
from vllm_omni.engine.interface import EngineStats, ModelInfo
from vllm_omni.engine.learning import IDLE_S, IdleLearning, sample_prompt
from vllm_omni.engine.malloc import return_freed_memory
from vllm_omni.engine.wire import (
    Abort,
    Add,
    Close,
    Command,
    Control,
    Controlled,
    EngineEvent,
    Outputs,
    Refused,
    StatsReport,
    UnitCosts,
    UpdateWeights,
)
from vllm_omni.errors import DeadlineExceededError, OmniError, RequestAbortedError, forget_locals
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, normalise_prompt
from vllm_omni.kernels.device import refuse_lost
from vllm_omni.logger import init_logger, told
from vllm_omni.outputs import OmniRequestOutput

logger = init_logger(__name__)

REPORT_EVERY_S = 0.25
PROGRESS_EVERY_S = 0.1
RECENT = 32
RETURN_EVERY_S = 300.0


class EngineLoop:
    """One thread drives `engine`: commands come from a queue, events go to `send`, which must not block."""

    def __init__(
        self,
        engine: DiffusionEngine,
        commands: queue.SimpleQueue[Command],
        send: Callable[[EngineEvent], None],
        progress_every_s: float = PROGRESS_EVERY_S,
        log_prompts: bool = False,
    ) -> None:
        self.engine, self._progress_every_s = engine, progress_every_s
        self.learning: IdleLearning | None = None
        self.turn_began: float | None = None  # monotonic; None while there is nothing to do. Read by the heartbeat
        self.costs = cost.no_costs()
        self._lines: dict[int, cost.RowLine] = {}
        self.control = control_of(engine)
        self._controls: deque[Control] = deque()  # to be done, in this order
        self._commands, self._send = commands, send
        self._log_prompts = log_prompts
        self._private: dict[str, list[str]] = {}  # what the log must not repeat of a request
        self._deadlines: dict[str, float] = {}
        self._aborts: Counter[str] = Counter()
        self._batches: Counter[int] = Counter()
        self._steps: Counter[str] = Counter()
        self._seconds = {"queue": 0.0, "denoise": 0.0, "decode": 0.0}
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._reported = self._progressed = 0.0
        self.keeps_memory = False  # what the allocator has freed is kept for the next forward
        self._returned = self._asked = time.monotonic()  # when somebody last wanted something, or got it

    def run(self) -> None:
        """Serve until Close."""
        ended: list[OmniRequestOutput] = []
        while self._obey(ended):
            self._expire()
            self._send_outputs(ended + [o for o in self.engine.collect() if not self._is_trial(o)])
            self._measure()  # a device that is lost may show here first, and what has ended is sent
            ended = [output for output in self.engine.step() if not self._is_trial(output)]
            self._return_memory()
            if self.control.after_step():
                self._send(Controlled("", self.control.condition))
        self.engine.close()

    def _return_memory(self) -> None:
        """Now and then: what is kept free falls to pieces, and its pages add up over hours."""
        if self.keeps_memory and time.monotonic() - self._returned >= RETURN_EVERY_S:
            self._returned = time.monotonic()
            return_freed_memory()

    def _obey(self, ended: list[OmniRequestOutput]) -> bool:
        """Take the commands that wait; with nothing to do, wait for one. False: stop."""
        while True:
            self._control()
            idle = not ended and not self.engine.has_unfinished_requests()
            if idle:
                self._report()
            if ended:
                self._asked = time.monotonic()
            self.turn_began = None if idle else self.engine.worker.runner.components.beside.since
            to_try = idle and self.learning is not None and self.learning.wanted and not self.engine.asleep
            try:
                wait = max(0.0, self._asked + IDLE_S - time.monotonic())
                command = self._commands.get(block=idle, timeout=wait if to_try else None)
            except queue.Empty:
                if to_try and self.learning is not None:
                    self.turn_began = time.monotonic()
                    self.learning.begin()
                return True
            self._asked = time.monotonic()
            if isinstance(command, Close):
                return False
            if isinstance(command, Add):
                self._add(command)
            elif isinstance(command, Abort):
                self._abort(command.request_ids, ended)
            elif isinstance(command, Control):
                if self.learning is not None:
                    self.learning.stop()
                self._controls.append(command)

    def _is_trial(self, output: OmniRequestOutput) -> bool:
        return self.learning is not None and self.learning.takes(output)

    def _control(self) -> None:
        """Do what can be done now of what was asked for, in order."""
        while self._controls and self.control.may_do(self._controls[0].action):
            control, error = self._controls.popleft(), None
            self.turn_began = time.monotonic()
            try:
                self.control.do(control.action)
                if self.learning is not None and isinstance(control.action, UpdateWeights):
                    self.learning.forget()
            except Exception as raised:  # the engine goes on, and whoever asked is told
                refuse_lost(raised)
                error = raised
                if not isinstance(error, OmniError):
                    logger.error("%s failed:\n%s", control.action, told(error))
            self._send(Controlled(control.control_id, self.control.condition, error))

    def _add(self, command: Add) -> None:
        if not self._log_prompts:
            texts = [command.params, command.prompt if isinstance(command.prompt, dict) else {"prompt": command.prompt}]
            self._private[command.request_id] = [v for text in texts for v in text.values() if isinstance(v, str)]
        try:
            params = OmniDiffusionSamplingParams(**command.params)
            prompt = command.prompt
            request = OmniDiffusionRequest(command.request_id, prompt, normalise_prompt(prompt), params, command.salt)
            self.engine.add_request(request, command.priority, command.arrived)
        except Exception as error:  # whatever a value of the wrong kind raises is that request's fault alone
            refuse_lost(error)
            self._send(Refused(command.request_id, error))
            private = self._private.pop(command.request_id, ())
            if not isinstance(error, OmniError):
                logger.error("request %s is refused:\n%s", command.request_id, told(error, private))
            return
        if command.deadline is not None:
            self._deadlines[command.request_id] = command.deadline

    def _abort(self, request_ids: list[str], ended: list[OmniRequestOutput]) -> None:
        """Abort requests, also those whose picture was made in the step just done and has not been sent."""
        for request_id in request_ids:
            if (stage := self.engine.stage(request_id)) is not None:
                self._aborts[stage] += 1
        self.engine.abort(request_ids)
        for output in ended:
            if output.request_id in request_ids and output.error is None:
                self._aborts["decode"] += 1
                output.images, output.videos, output.audio, output.latents = [], [], [], None
                output.error = RequestAbortedError(f"request {output.request_id} was aborted")

    def _expire(self) -> None:
        now = time.monotonic()
        for request_id in [i for i, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[request_id]
            reached = {"queued": "it had not begun", "encode": "it had just begun", "decode": "it was decoding"}
            where = reached.get(self.engine.stage(request_id) or "", "it was denoising")
            late = DeadlineExceededError(f"request {request_id} did not end within its time-out; {where}")
            self.engine.abort([request_id], late)

    def _send_outputs(self, ended: list[OmniRequestOutput]) -> None:
        now = time.monotonic()
        for output in ended:
            self._note_end(output)
        due = now - self._progressed >= self._progress_every_s
        if due:
            self._progressed = now
        if outputs := [*self.engine.progress(previews_only=not due), *ended]:
            for output in outputs:
                output.prompt = None  # known to whoever asked
            self._send(Outputs(outputs))
        if now - self._reported >= REPORT_EVERY_S:
            self._report()

    def _note_end(self, output: OmniRequestOutput) -> None:
        self._deadlines.pop(output.request_id, None)
        private = self._private.pop(output.request_id, ())
        forget_locals(output.error)
        if output.error is not None and not isinstance(output.error, OmniError):
            logger.error("request %s failed:\n%s", output.request_id, told(output.error, private))
        self._steps["computed"] += output.computed_steps
        self._steps["skipped"] += output.skipped_steps
        self._seconds["queue"] += output.stage_durations.get("queue_s", 0.0)
        self._seconds["decode"] += output.stage_durations.get("decode_s", 0.0)
        if output.error is None and output.cache_settings is not None:
            cost.note_share(self.costs, output.computed_steps, output.skipped_steps)
        error = type(output.error).__name__ if output.error is not None else None
        self._recent.append(
            {
                "request_id": output.request_id,
                "error": error,
                "num_inference_steps": output.num_inference_steps,
                "computed_steps": output.computed_steps,
                "skipped_steps": output.skipped_steps,
                "cache_settings": output.cache_settings,
                "total_s": round(output.metrics.get("total_s", 0.0), 4),
            }
        )

    def _measure(self) -> None:
        for done in self.engine.reports():
            if done.rows:
                self._batches[done.rows] += 1
                self._seconds["denoise"] += done.forward_s
                table = self.costs.skipped if done.skipped else self.costs.computed
                cost.note_rows(table, done.pixels, done.forward_s, done.rows)
                if not done.skipped:
                    cost.note_line(self._lines, self.costs, done.pixels, done.rows, done.forward_s)
            if done.ended:
                cost.note(self.costs.ends, done.pixels, done.coding_s / done.ended)

    def _report(self) -> None:
        """Send counters and gauges as they stand."""
        self._reported = time.monotonic()
        worker, scheduler, running = self.engine.worker, self.engine.scheduler, self.engine.progress_steps()
        needs, alone = self._needs(), cost.by_itself(self.costs)
        stats = EngineStats(
            running=len(scheduler.running) - len(scheduler.idle),
            waiting=len(scheduler.waiting),
            max_num_seqs=scheduler.max_num_seqs,
            steps_computed=self._steps["computed"] + running[0],
            steps_skipped=self._steps["skipped"] + running[1],
            forwards_computed=worker.runner.forwards["computed"],
            forwards_skipped=worker.runner.forwards["skipped"],
            aborts_by_stage=dict(self._aborts),
            batch_sizes=dict(self._batches),
            cache_bytes=worker.cache_bytes,
            prompt_hits=worker.runner.prompts.hits,
            prompt_misses=worker.runner.prompts.misses,
            prompt_bytes=worker.runner.prompts.bytes,
            queue_wait_s=self._seconds["queue"],
            denoise_s=self._seconds["denoise"],
            decode_s=self._seconds["decode"],
            queued_cost_s=cost.total(self.costs, needs.values()),
            denoisers={name: denoiser.facts() for name, denoiser in worker.runner.denoisers.items()},
            recent=tuple(self._recent),
            profiles=tuple(worker.profile_names),
            learning=self.learning.progress if self.learning is not None else "",
        )
        jobs = {name: (cost.planned_seconds(alone, *need), need[0]) for name, need in needs.items()}
        self._send(StatsReport(stats, self.costs, jobs))

    def _needs(self) -> dict[str, tuple[int, float, float, float]]:
        """Pixels, rows to compute, rows to skip, and ends, of every unfinished request."""
        share, needs = self.costs.cached_share, {}
        for need in self.engine.remaining_work():
            computed, skipped = need.computed, need.skipped
            if need.cached and not need.begun and not skipped:  # no plan and no budget yet
                computed, skipped = computed * share, computed * (1 - share)
            needs[need.request_id] = (need.pixels, computed, skipped, 1.0)
        return needs


def _run_alone(engine: DiffusionEngine, costs: UnitCosts) -> None:
    """Run what is in the engine to its end, and note what it cost."""
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.error is not None:
                logger.warning("warm-up did not work: %s", output.error)
        for done in engine.reports():
            if done.rows:  # the last forward's time stands: the first ones paid for what is loaded once
                costs.computed[done.pixels] = done.forward_s / done.rows
            if done.ended:
                costs.ends[done.pixels] = done.coding_s / done.ended


def _report_graphs() -> None:
    """Say what was compiled, and where a graph is broken: there Python runs in every step."""
    from vllm_omni.kernels.graphs import graph_breaks, graphs_made

    breaks = list(graph_breaks())
    for reason in breaks:
        logger.warning("a graph breaks at: %s", reason)
    logger.info("compiled %d graphs%s", graphs_made(), "" if breaks else ", none of them broken")


def warm_up(engine: DiffusionEngine, info: ModelInfo, costs: UnitCosts) -> dict[int, int]:
    """Run once, shortly, at the model's own size (few frames): first-call costs are paid, and a row's cost is known.

    Where it matters, two requests at once follow: what is compiled is compiled for one row and for several, and memory
    grows from one to two by what each further one takes. Returns the denoiser's latent tokens by pixels of the picture.
    A model that will not run so is served all the same.
    """
    seen: dict[int, int] = {}
    prompt, size = sample_prompt(info, "warm-up")
    pixels = size.get("height", 0) * size.get("width", 0)

    def look(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden = kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and hidden.ndim == 3 and pixels:
            seen[pixels] = hidden.shape[1]

    few: dict[str, Any] = {"num_frames": 1 + info.frame_multiple} if info.video_output else {}
    params = OmniDiffusionSamplingParams(num_inference_steps=3, seed=0, cache="off", **size, **few)
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in engine.worker.runner.modules.values()]
    room = engine.worker.runner.room
    several = engine.config.max_num_seqs > 1 and (room.free is not None or not engine.config.enforce_eager)
    try:
        for count in (1, 2) if several else (1,):
            for i in range(count):
                asked = OmniDiffusionRequest(f"warm-up {count}.{i}", prompt, normalise_prompt(prompt), params)
                engine.add_request(asked)
            _run_alone(engine, costs if count == 1 else cost.no_costs())
        if room.free is not None:  # less than at the start by what the first kernels have loaded
            room.free = engine.worker.runner.memory.free(engine.config.gpu_memory_utilization)
        if told := room.told():
            logger.info("memory: %s", told)
        if not engine.config.enforce_eager:
            _report_graphs()
    except OmniError as error:
        refuse_lost(error)
        logger.warning("no warm-up: %s", error)
    finally:
        for hook in hooks:
            hook.remove()
    engine.worker.runner.forwards.update(computed=0, skipped=0)
    return seen
