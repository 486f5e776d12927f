"""What the benchmarks share: random-weight Flux pipelines, interleaved timing, tables and the last JSON line.

Absolute times on a shared CPU are noise; ratios of interleaved medians are not. So everything that is compared runs
A B C A B C ... in one process, and every figure is a ratio of medians, with the spread of the repetitions beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

for _name, _value in (("TQDM_DISABLE", "1"), ("CACHE_DIT_LOG_LEVEL", "error"), ("TRANSFORMERS_VERBOSITY", "error")):
    os.environ.setdefault(_name, _value)  # a table is no place for bars and log lines

import torch  # noqa: E402

warnings.filterwarnings("ignore")


class Size(NamedTuple):
    """A FLUX transformer and what one request brings it. Image tokens: (latent side / 2)^2."""

    double: int  # blocks
    single: int
    heads: int
    head_size: int
    latent_side: int
    text_tokens: int = 8


SIZES = {
    "tiny": Size(2, 3, 2, 16, 8),
    "small": Size(2, 4, 4, 32, 32, 64),  # 2.3 M parameters, 256 image and 64 text tokens
    "large": Size(4, 8, 8, 64, 32, 64),  # 71 M parameters, the same tokens
    "small-72": Size(2, 4, 2, 64, 16),  # 2.4 M, 64 and 8 tokens: a step costs little more than its launches
    "large-72": Size(4, 8, 8, 64, 16),
    "large-1088": Size(4, 8, 8, 64, 64, 64),  # 1024 image tokens
}
_AXES = {16: (4, 6, 6), 32: (8, 12, 12), 64: (8, 28, 28), 128: (16, 56, 56)}
_TEXT_DIM = 64
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = "wall"


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> float:
    """Seconds on the clock that the command line chose; on a GPU, after what was launched before is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return _CLOCKS[_clock]()


def seconds_of(job: Callable[[], Any]) -> float:
    """How long a job takes: between two CUDA events on a GPU, by the chosen clock otherwise."""
    if DEVICE.type != "cuda":
        began = now()
        job()
        return now() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    job()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@dataclass(frozen=True)
class Bench:
    """A pipeline without text encoders, and the arguments of one call of it."""

    pipe: Any
    side: int  # pixels; what `height` and `width` take
    text_tokens: int

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.pipe.transformer.parameters())

    def conditioning(self, seed: int = 0) -> dict[str, Any]:
        """A prompt: random embeddings."""
        generator = torch.Generator().manual_seed(10_000 + seed)
        kind = {"generator": generator, "dtype": self.pipe.transformer.dtype}
        return {
            "prompt_embeds": torch.randn(1, self.text_tokens, _TEXT_DIM, **kind).to(DEVICE),
            "pooled_prompt_embeds": torch.randn(1, _TEXT_DIM, **kind).to(DEVICE),
        }

    def plain(self, steps: int, seed: int = 0) -> torch.Tensor:
        """One call of the pipeline itself; gives latents."""
        return self.pipe(
            **self.conditioning(seed),
            height=self.side,
            width=self.side,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images


def build_flux(size: str | Size, share: Bench | None = None) -> Bench:
    """A random-weight FluxPipeline of a named size, or of any other.

    `share`: with the very weights of that one, in its own modules.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    double, single, heads, head_size, latent_side, text_tokens = SIZES[size] if isinstance(size, str) else size
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head_size,
        "num_attention_heads": heads,
        "joint_attention_dim": _TEXT_DIM,
        "pooled_projection_dim": _TEXT_DIM,
        "guidance_embeds": True,
        "axes_dims_rope": _AXES[head_size],
    }
    torch.manual_seed(0)
    if share is None:
        transformer = FluxTransformer2DModel(**config)
    else:
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(**config)
        transformer.load_state_dict(share.pipe.transformer.state_dict(), assign=True)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=2 * latent_side,
        shift_factor=0.1,
        scaling_factor=0.36,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer.eval(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return Bench(pipe.to(DEVICE), 2 * latent_side, text_tokens)


@dataclass
class Timing:
    """Seconds of each repetition of one job."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(largest − smallest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def interleaved(jobs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Every job once, in turn, `repeats` times; every other round backwards, so that no job always follows another."""
    for _ in range(warmup):
        for job in jobs.values():
            job()
    timings = {name: Timing() for name in jobs}
    for round_ in range(repeats):
        for name in list(jobs)[:: -1 if round_ % 2 else 1]:
            timings[name].seconds.append(seconds_of(jobs[name]))
    return timings


@contextmanager
def stamped_steps() -> Iterator[list[float]]:
    """For the duration, the list notes when each scheduler step ends. Enter it before anything wraps a scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    stamps: list[float] = []
    own = FlowMatchEulerDiscreteScheduler.step

    @functools.wraps(own)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        stamps.append(now())
        return result

    FlowMatchEulerDiscreteScheduler.step = stamped
    try:
        yield stamps
    finally:
        FlowMatchEulerDiscreteScheduler.step = own


def by_step(
    jobs: Mapping[str, Callable[[], Any]], repeats: int, stamps: list[float]
) -> dict[str, tuple[float, Timing]]:
    """As `interleaved`, for jobs that are one request each: (seconds summed over its steps, of each step its fastest
    round; the whole rounds).

    What a neighbour on the machine takes only ever adds, and it hits other steps in every round: the sum is steady to
    a percent where whole rounds differ by thirty.
    """
    parts: dict[str, list[list[float]]] = {name: [] for name in jobs}

    def timed(name: str) -> None:
        stamps[:] = [now()]
        jobs[name]()
        stamps.append(now())
        parts[name].append([b - a for a, b in pairwise(stamps)])

    interleaved({name: functools.partial(timed, name) for name in jobs}, repeats)
    measured = {name: rounds[1:] for name, rounds in parts.items()}  # the first one warms up
    return {
        name: (sum(map(min, zip(*rounds, strict=True))), Timing([sum(r) for r in rounds]))
        for name, rounds in measured.items()
    }


def paired_ratio(over: Timing, under: Timing) -> float:
    """Median of the ratios taken round by round: what drifts over a run (a neighbour's load) cancels."""
    return statistics.median(a / b for a, b in zip(over.seconds, under.seconds, strict=True))


class Stopwatch:
    """Seconds and calls per name. Nested measurements are taken out of the outer one (self time)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner: list[float] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        begin = now()
        try:
            yield
        finally:
            elapsed = now() - begin
            inside = self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - inside
            self.calls[name] = self.calls.get(name, 0) + 1

    @contextmanager
    def watching(self, *targets: tuple[Any, str, str | Callable[[], str]]) -> Iterator[None]:
        """For the duration, time `owner.attribute` under a name. A callable name is asked at each call."""
        restore: list[Callable[[], Any]] = []
        for owner, attribute, label in targets:
            original = getattr(owner, attribute)
            had = attribute in vars(owner)
            setattr(owner, attribute, self._timed(original, label))
            undo = (lambda o=owner, a=attribute, f=original: setattr(o, a, f)) if had else None
            restore.append(undo or (lambda o=owner, a=attribute: delattr(o, a)))
        try:
            yield
        finally:
            for undo in reversed(restore):
                undo()

    def _timed(self, original: Callable[..., Any], label: str | Callable[[], str]) -> Callable[..., Any]:
        @functools.wraps(original)  # diffusers looks at signatures
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(label if isinstance(label, str) else label()):
                return original(*args, **kwargs)

        return timed


def count_block_forwards(transformer: Any, run: Callable[[], Any]) -> int:
    """Blocks really computed during `run`, counted at each block's attention.

    (Diffusers' own hooks still call a skipped block and only then decide; its attention runs only if it computes.)
    """
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [block.attn.register_forward_hook(note) for block in blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return count


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=defaults.get("repeats", 5), help="interleaved rounds (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--clock",
        choices=list(_CLOCKS),
        default="wall",
        help="cpu: seconds of this process; with --threads 1 it stands in for wall time on a machine that is not quiet",
    )
    return parser


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Apply the shared options; returns what the JSON line says about the machine."""
    from vllm_omni.engine.malloc import keep_freed_memory

    keep_freed_memory()  # as the engine's own process does, for both sides of every comparison
    global _clock
    _clock = options.clock
    if options.threads:
        torch.set_num_threads(options.threads)
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "load_1min_at_start": round(os.getloadavg()[0], 2),
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under headers; floats with four significant digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    for number, row in enumerate(cells):
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
        if number == 0:
            print("  ".join("-" * w for w in widths))
    print(flush=True)


def last_line(result: Mapping[str, Any]) -> None:
    """The one JSON line that ends every benchmark."""
    print(json.dumps(_rounded(result), default=str), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
