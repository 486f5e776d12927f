"""A rank that ends, fails alone, stops or sleeps ends its group within seconds; the supervisor starts another one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lanes import ALL, full_set
from paths import ROOT
from pipelines import embeds, negative
from process_client import gone, until

from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.errors import EngineDeadError, InvalidValueError, OmniError, RequestAbortedError

HELPERS = ROOT / "tests" / "helpers"
FAULTS = ((1, "kill"), (1, "stop"), (0, "raise"))
MORE = ((1, "raise"), (1, "oom"), (1, "sleep"), (0, "kill"))  # with the full set
OTHERS = [
    ({"cfg_parallel_size": 2}, ((1, "raise"), (0, "kill"))),
    ({"tensor_parallel_size": 2}, ((1, "kill"), (0, "raise"))),
]
TIMEOUT_S = 5.0
Faults = Sequence[tuple[int, str]]
ARGS: dict[str, Any] = {"model": "demo", "dtype": "float32", "device": "cpu", "rank_timeout_s": TIMEOUT_S}
ULYSSES = ARGS | {"ulysses_degree": 2}
PROMPT = embeds(0) | negative(0)


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that says which rank is to fail, and how."""
    file = tmp_path / "fault"
    monkeypatch.setenv("OMNI_RANK_FAULT", str(file))
    monkeypatch.setenv("OMNI_RANK_FAMILY", "FLUX.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HELPERS / "ranks_on_cpu"), str(HELPERS)]))
    yield file


def params(steps: int = 6, **more: Any) -> Params:
    size = {"height": 32, "width": 32} | more
    return Params(num_inference_steps=steps, seed=0, output_type="latent", **size)


async def made(client: ProcessEngineClient, name: str, asked: Params, prompt: Any = PROMPT) -> Any:
    async for output in client.generate(prompt, asked, name):
        last = output
    return last


def ranks_of(client: ProcessEngineClient) -> list[int]:
    """The processes of the group: the engine's, and its children."""
    assert client._engine is not None
    leader = client._engine.process.pid
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return [leader, *map(int, children)]


@pytest.mark.slow
@pytest.mark.alone
def test_every_fault_of_a_rank_ends_in_restarted_or_failed_requests(fault: Path) -> None:
    async def scenario() -> None:
        async with ProcessEngineClient(ULYSSES, warmup=False, heartbeat_timeout_s=60.0) as client:
            wanted = await fail(client, fault, FAULTS + (MORE if ALL else ()), params())
            await aborted(client, wanted)
            await own_fault(client, wanted)
            processes = ranks_of(client)
        assert all(map(gone, processes))

    asyncio.run(scenario())


@full_set
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("how", "faults"), OTHERS, ids=["cfg", "tensor"])
def test_so_do_faults_in_other_kinds(fault: Path, how: dict[str, int], faults: Faults) -> None:
    """A guided request: a fault in one branch leaves the others without it."""

    async def scenario() -> None:
        async with ProcessEngineClient(ARGS | how, warmup=False, heartbeat_timeout_s=60.0) as client:
            await fail(client, fault, faults, params(true_cfg_scale=3.0))
            processes = ranks_of(client)
        assert all(map(gone, processes))

    asyncio.run(scenario())


async def fail(client: ProcessEngineClient, fault: Path, faults: Faults, asked: Params) -> Any:
    """Have each fault happen: its request ends, and the next group makes the same latents, which are returned."""
    wanted = (await made(client, "first", asked)).latents
    for rank, kind in faults:
        processes = ranks_of(client)
        assert len(processes) == 2
        fault.write_text(f"{rank} {kind}")
        began = time.monotonic()
        output = await made(client, f"{rank} {kind}", asked)
        assert isinstance(output.error, EngineDeadError), (rank, kind, output.error)
        assert time.monotonic() - began < 4 * TIMEOUT_S, (rank, kind)  # far more only if it hangs
        await until(lambda: client.ready, 120)
        assert not fault.exists() and all(map(gone, processes)), (rank, kind)
        again = await made(client, f"after {rank} {kind}", asked)
        assert (again.latents == wanted).all()
    assert (await client.stats()).restarts == len(faults)
    return wanted


async def aborted(client: ProcessEngineClient, wanted: Any) -> None:
    """An abort during a step: the request ends, the group and its neighbour go on."""
    neighbour = asyncio.create_task(made(client, "neighbour", params()))
    leaving = asyncio.create_task(made(client, "leaving", params(steps=500)))
    await asyncio.sleep(0.3)
    await client.abort("leaving")
    assert isinstance((await leaving).error, RequestAbortedError)
    assert float(abs((await neighbour).latents - wanted).max()) <= 1e-5 * float(abs(wanted).max())


async def own_fault(client: ProcessEngineClient, wanted: Any) -> None:
    """Tokens of a size, or a text, that cannot be shared fail on all ranks alike: the request alone ends."""
    restarts = (await client.stats()).restarts
    output = await made(client, "odd", params(height=20, width=20))
    assert isinstance(output.error, OmniError) and "ranks can share" in str(output.error)
    short = {name: value[:, :7] if value.ndim == 3 else value for name, value in PROMPT.items()}
    output = await made(client, "odd text", params(), short)
    said = "prompt must make a number of tokens that 2 ranks can share (ulysses_anything lifts that), got 7"
    assert isinstance(output.error, InvalidValueError) and str(output.error) == said
    assert ((await made(client, "last", params())).latents == wanted).all()
    assert (await client.stats()).restarts == restarts


@pytest.mark.slow
def test_heads_that_do_not_divide_are_refused_at_load(fault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_RANK_FAMILY")  # the demo has three heads

    async def scenario() -> None:
        with pytest.raises(InvalidValueError, match="must divide the 3 attention heads"):
            await ProcessEngineClient(ULYSSES, warmup=False).start()

    asyncio.run(scenario())
