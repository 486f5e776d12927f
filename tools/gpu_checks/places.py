"""Where a model is: its parts or its blocks in main memory, in an engine process, shared by ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gpu_checks.sections import ROUNDINGS, Bench, Finding, at_most, equals, roundings

SPLITS = ("ulysses_degree", "ring_degree", "cfg_parallel_size", "tensor_parallel_size")
_GROUPING = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def parts_offloaded(bench: Bench) -> Iterator[Finding]:
    """Parts that come to the device when they are called: one at a time, also for requests that overlap."""
    pipeline, device = bench.subject.pipeline, bench.machine.device
    usual = _overlaps(bench)
    pipeline.enable_model_cpu_offload(device=device)
    try:
        yield from _compared(bench, usual, _overlaps(bench))
        seen: list[int] = []
        _overlapping(bench, 2, lambda: seen.append(len(_resident(pipeline))))
        if bench.machine.kind != "cpu":
            yield equals("parts on the device at once", max(seen), 1)
    finally:
        pipeline.remove_all_hooks()
        pipeline.to(device)


def blocks_offloaded(bench: Bench) -> Iterator[Finding]:
    """A denoiser whose blocks come to the device one by one."""
    from vllm_omni.diffusion.denoiser.specs import denoisers_of
    from vllm_omni.kernels.placement import offload_blocks

    pipeline, device = bench.subject.pipeline, bench.machine.device
    usual = _overlaps(bench)
    offload_blocks(pipeline, str(device), [*denoisers_of(pipeline)])
    try:
        yield from _compared(bench, usual, _overlaps(bench))
        if bench.machine.kind != "cpu":
            yield equals("parts on the device between forwards", len(_resident(pipeline)), 0)
    finally:
        for part in _parts(pipeline).values():
            for module in part.modules():
                if (registry := vars(module).get("_diffusers_hook")) is not None:
                    for name in _GROUPING:
                        registry.remove_hook(name, recurse=False)
        pipeline.to(device)


def process(bench: Bench) -> Iterator[Finding]:
    """A model that ships, in an engine process: it makes the picture that it makes here."""
    from vllm_omni import OmniDiffusionSamplingParams
    from vllm_omni.engine.client import ProcessEngineClient

    if not _ships(bench):
        return
    params = OmniDiffusionSamplingParams(
        num_inference_steps=bench.steps, seed=0, cache="off", **bench.subject.arguments
    )
    arguments = {"model": bench.subject.name, "device": str(bench.machine.device), "dtype": "float32"}

    async def made() -> Any:
        async with ProcessEngineClient(arguments) as client:
            async for output in client.generate(bench.subject.prompt(0)["prompt"], params, "one"):
                last = output
        return last

    there, (here,) = asyncio.run(made()), bench.omni.generate([bench.subject.prompt(0)], params, use_tqdm=False)
    yield at_most("levels between its picture and ours", _levels(there, here), 1)


def ranks(bench: Bench) -> Iterator[Finding]:
    """A model that ships, shared by two devices in each way: it makes the picture that one device makes."""
    from vllm_omni import Omni, OmniDiffusionSamplingParams
    from vllm_omni.errors import InvalidValueError

    if not _ships(bench) or bench.machine.kind != "cuda" or torch.cuda.device_count() < 2:
        return
    params = OmniDiffusionSamplingParams(
        num_inference_steps=bench.steps, seed=0, cache="off", **bench.subject.arguments
    )
    asked: tuple[Any, Any] = [bench.subject.prompt(0)], params
    (alone,) = bench.omni.generate(*asked, use_tqdm=False)
    for split in SPLITS:
        try:
            with Omni(bench.subject.name, device="cuda", dtype="float32", **{split: 2}) as omni:
                (shared,) = omni.generate(*asked, use_tqdm=False)
                if shared.error is not None:
                    raise shared.error
        except InvalidValueError as error:
            yield Finding(f"{split} 2 is refused", str(error).splitlines()[0][:80])
        else:
            yield at_most(f"{split} 2: levels from one device's picture", _levels(shared, alone), 1)


PLACES: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "engine process": process,
    "ranks": ranks,
    "parts in main memory": parts_offloaded,
    "blocks in main memory": blocks_offloaded,
}
_Overlaps = tuple[int | None, int | None, float, list[torch.Tensor]]


def _overlaps(bench: Bench) -> _Overlaps:
    """The peak of a request alone, that of two, the seconds of the first, and the pictures of the two."""
    made: list[torch.Tensor] = []
    _overlapping(bench, 1)  # what a first run loads once
    one = bench.machine.peak(lambda: _overlapping(bench, 1))
    two = bench.machine.peak(lambda: made.extend(_overlapping(bench, 2)))
    return one, two, bench.machine.seconds(lambda: _overlapping(bench, 1)), made


def _compared(bench: Bench, usual: _Overlaps, offloaded: _Overlaps) -> Iterator[Finding]:
    dtype = bench.subject.dtype
    pairs = [(one.to(dtype), other.to(dtype)) for one, other in zip(offloaded[3], usual[3], strict=True)]
    apart = max(roundings(*pair) for pair in pairs)
    yield at_most("two requests that overlap, from those on the device, in roundings", apart, ROUNDINGS[dtype])
    yield Finding("of them bit by bit", all(torch.equal(*pair) for pair in pairs))
    yield Finding("seconds of one / on the device", offloaded[2] / usual[2])
    peaks = [peak for peak in (*usual[:2], *offloaded[:2]) if peak is not None]
    if len(peaks) == 4:
        yield Finding("peak MiB of one", peaks[2] / 2**20)
        rest = peaks[3] - (peaks[1] - peaks[0])
        yield at_most("peak of two that overlap, less a row, / of one", rest / peaks[2], 1.1)


def _overlapping(bench: Bench, count: int, look: Callable[[], Any] = lambda: None) -> list[torch.Tensor]:
    """The pictures of requests each of which begins when the one before has made some steps; `look` after each turn."""
    from vllm_omni import OmniDiffusionSamplingParams
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import normalise_prompt

    engine, made = bench.omni.engine, dict[str, torch.Tensor]()

    def turn() -> None:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            made[output.request_id] = torch.as_tensor(np.stack([*map(np.asarray, output.images or output.videos)]))
        look()

    for i in range(count):
        params = OmniDiffusionSamplingParams(num_inference_steps=bench.steps, seed=i, cache="off", output_type="np")
        prompt = bench.subject.prompt(i)
        engine.add_request(OmniDiffusionRequest(f"overlaps {i}", prompt, normalise_prompt(prompt), params))
        for _ in range(bench.steps // 2):
            turn()
    while engine.has_unfinished_requests():
        turn()
    return [made[name] for name in sorted(made)]


def _parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _resident(pipeline: Any) -> list[str]:
    """The parts that have a weight on the device."""
    return [name for name, part in _parts(pipeline).items() if any(weight.is_cuda for weight in part.parameters())]


def _ships(bench: Bench) -> bool:
    from vllm_omni.model_folder import shipped_models

    return bench.subject.name in shipped_models() and bench.machine.kind != "fake"


def _levels(one: Any, other: Any) -> int:
    """The largest difference between two outputs' pictures of 8 bits."""
    for output in (one, other):
        if output.error is not None:
            raise output.error
    pairs = zip(*(output.videos[0] if output.videos else output.images for output in (one, other)), strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in pairs)
