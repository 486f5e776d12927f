"""Engines at the end of a link: outputs, errors, actions and loads cross; one that is lost is another one's work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
from adapters import save_adapter
from closeness import levels_apart
from diffusers import DiffusionPipeline
from paths import DEMO
from PIL import Image
from pools import LONG, first_of
from process_client import ARGS, last, reported, until

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.engine.pictures import SharedMemory, SharedPicture
from vllm_omni.engine.wire import LoadAdapter, Sleep, UnloadAdapter, Wake
from vllm_omni.errors import ConflictError, EngineDeadError, InvalidValueError, RequestAbortedError, UnknownKeyError
from vllm_omni.replicas.pool import ReplicaPool
from vllm_omni.replicas.remote import EngineHost, LinkLostError, RemoteEngine, _that_travels

one_loop = pytest.mark.asyncio(loop_scope="module")


class Wire:
    """A link without a network that can be cut; bytes and plain values alone cross it."""

    def __init__(self, host: EngineHost) -> None:
        self.host, self.cut = host, asyncio.Event()

    async def describe(self) -> bytes:
        return await self._whole(self.host.describe())

    def watch(self) -> AsyncGenerator[bytes, None]:
        return self._stream(self.host.watch())

    def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        assert type(frame) is bytes
        return self._stream(self.host.generate(frame, timeout_s))

    async def control(self, frame: bytes) -> bytes:
        return await self._whole(self.host.control(frame))

    async def abort(self, request_ids: list[str]) -> None:
        await self._whole(self.host.abort(request_ids))

    def close(self) -> None:
        pass

    async def _whole(self, call):
        if self.cut.is_set():
            call.close()
            raise LinkLostError("cut")
        return await call

    async def _stream(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        cut = asyncio.create_task(self.cut.wait())
        async with aclosing(stream):
            while True:
                following = asyncio.ensure_future(anext(stream, None))
                try:
                    await asyncio.wait([cut, following], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait([following])
                if self.cut.is_set():
                    raise LinkLostError("cut")
                frame = following.result()
                if frame is None:
                    cut.cancel()
                    return
                assert type(frame) is bytes
                yield frame


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts() -> AsyncIterator[list[EngineHost]]:
    clients = [ProcessEngineClient(ARGS, warmup=False) for _ in range(2)]
    await asyncio.gather(*(client.start() for client in clients))
    yield [EngineHost(client) for client in clients]
    await asyncio.gather(*(client.shutdown() for client in clients))


@pytest_asyncio.fixture(loop_scope="module")
async def pool(hosts: list[EngineHost]) -> AsyncIterator[ReplicaPool]:
    """Two that have joined an empty pool."""
    made = ReplicaPool([], 4, 8)
    assert not made.ready
    with pytest.raises(EngineDeadError, match="no engine"):
        await last(made, "early")
    with pytest.raises(EngineDeadError, match="no engine"):
        await made.check_health()
    for name, host in zip("ab", hosts, strict=True):
        engine = RemoteEngine(Wire(host), lambda name=name: made.changed(name))
        await engine.start()
        made.join(name, engine)
    await until(lambda: made.ready)
    yield made
    await made.shutdown()
    for host in hosts:
        await until(lambda host=host: not host.engine.load.jobs)


def wire_of(pool: ReplicaPool, index: int) -> Wire:
    return pool.replicas[index].engine._link  # type: ignore[attr-defined]


@one_loop
async def test_what_crosses_is_what_the_engine_says(pool: ReplicaPool, hosts: list[EngineHost]) -> None:
    await asyncio.gather(*(reported(host.engine) for host in hosts))
    before = sum(host.engine.ledger._stats.steps_computed for host in hosts)
    direct = await last(hosts[0].engine, "direct", num_inference_steps=9)  # type: ignore[arg-type]
    engines = [replica.engine for replica in pool.replicas]
    await until(lambda: not any(one.load.jobs for one in engines) and engines[0].ledger.costs.computed)
    outputs = await asyncio.gather(*(last(pool, f"far-{i}", num_inference_steps=9) for i in range(4)))
    assert all(output.ok and output.plan == direct.plan and output.prompt == "red apple" for output in outputs)
    assert all(levels_apart(output.images[0], direct.images[0]) <= 1 for output in outputs)
    assert {replica.answered for replica in pool.replicas} == {2}
    with pytest.raises(InvalidValueError, match="height must be a multiple of 8") as refused:
        await last(pool, "bad", height=63)
    assert refused.value.field == "height"
    with pytest.raises(UnknownKeyError, match="did you mean"):
        await last(pool, "bad", cache={"treshold": 0.1})
    assert pool.info == hosts[0].engine.info
    steps = before + direct.computed_steps + sum(output.computed_steps for output in outputs)
    await until(lambda: sum(one._stats.steps_computed for one in engines) == steps)
    stats = await pool.stats()
    assert [one.name for one in stats.replicas] == ["a", "b"] and stats.requests["finished"] == 4
    assert stats.steps_computed == steps


@one_loop
async def test_leaving_and_aborting_reach_the_engine(pool: ReplicaPool, hosts: list[EngineHost]) -> None:
    async with aclosing(await first_of(pool, "left", **LONG)):
        assert sum(len(host.engine.load.jobs) for host in hosts) == 1
    await until(lambda: not any(host.engine.load.jobs for host in hosts), 5)
    task = asyncio.create_task(last(pool, "aborted", **LONG))
    await until(lambda: any(host.engine.load.jobs for host in hosts))
    await pool.abort("aborted")
    assert isinstance((await task).error, RequestAbortedError)


@one_loop
async def test_the_load_has_what_was_sent_and_what_others_have_sent(pool: ReplicaPool, hosts: list[EngineHost]) -> None:
    async with aclosing(await first_of(hosts[0].engine, "other-front", **LONG)):  # type: ignore[arg-type]
        await until(lambda: len(pool.replicas[0].engine.load.jobs) == 1)
        assert not pool.replicas[1].engine.load.jobs
        task = asyncio.create_task(last(pool, "ours", num_inference_steps=40, cache="off"))
        await asyncio.sleep(0.02)  # sooner than a report
        assert [len(replica.engine.load.jobs) for replica in pool.replicas] == [1, 1]
        assert (await task).ok
    await until(lambda: not pool.replicas[0].engine.load.jobs)


@pytest.mark.slow
@one_loop
async def test_a_replica_that_is_lost_leaves_its_requests_to_the_other(
    pool: ReplicaPool, hosts: list[EngineHost]
) -> None:
    tasks = [asyncio.create_task(last(pool, f"kept-{i}", seed=i, **LONG)) for i in range(4)]
    await until(lambda: all(len(replica.engine.load.jobs) == 2 for replica in pool.replicas))
    wire_of(pool, 0).cut.set()
    await until(lambda: pool.replicas[0].engine.state == "starting", 5)
    assert pool.ready
    await pool.check_health()
    await pool.leave("a")
    assert all(output.ok for output in await asyncio.gather(*tasks))
    stats = await pool.stats()
    assert stats.requests == {"finished": 4} and [one.name for one in stats.replicas] == ["b"]
    assert stats.max_num_seqs == 4 and stats.steps_computed > 0


@one_loop
async def test_one_that_joins_is_brought_to_the_condition_of_the_others(
    pool: ReplicaPool, hosts: list[EngineHost], tmp_path: Path
) -> None:
    save_adapter(DiffusionPipeline.from_pretrained(DEMO), tmp_path / "ink", 0)
    await pool.leave("b")
    await pool.control(LoadAdapter("ink", str(tmp_path / "ink")))
    with pytest.raises(InvalidValueError, match="must be new"):
        await pool.control(LoadAdapter("ink", str(tmp_path / "ink")))
    with pytest.raises(ConflictError):
        from vllm_omni.engine.wire import StopProfile

        await pool.control(StopProfile())
    engine = RemoteEngine(Wire(hosts[1]), lambda: pool.changed("b"))
    await engine.start()
    pool.join("b", engine)
    await until(lambda: all(replica.able({}) for replica in pool.replicas))
    assert all("ink" in host.engine.condition.adapters for host in hosts)
    assert (await pool.control(Sleep())).asleep == 1 and not pool.ready
    assert (await pool.control(Wake())).asleep == 0 and pool.ready
    assert not (await pool.control(UnloadAdapter("ink"))).adapters


def test_pictures_in_shared_memory_travel_as_pictures() -> None:
    memory = SharedMemory()
    with open(memory.path, "r+b") as file:
        file.write(bytes(range(12)))
    shared = SharedPicture("RGB", (2, 2), memory, 0)
    prompt = {"prompt": "x", "multi_modal_data": {"image": shared, "images": [shared], "mask": "kept"}}
    media = _that_travels(prompt)["multi_modal_data"]
    assert isinstance(media["image"], Image.Image) and media["image"].tobytes() == bytes(range(12))
    assert isinstance(media["images"][0], Image.Image) and media["mask"] == "kept"
    assert prompt["multi_modal_data"]["image"] is shared and _that_travels("red") == "red"


@one_loop
async def test_reports_that_end_for_a_moment_are_asked_for_again(pool: ReplicaPool) -> None:
    wire = wire_of(pool, 0)
    wire.cut.set()
    await until(lambda: not pool.replicas[0].engine.ready)
    wire.cut.clear()
    await until(lambda: pool.replicas[0].engine.ready)
    outputs = await asyncio.gather(*(last(pool, f"then-{i}", num_inference_steps=3) for i in range(4)))
    assert all(output.ok for output in outputs)


@pytest.mark.slow
@one_loop
async def test_a_process_that_dies_within_a_replica_loses_nothing(pool: ReplicaPool, hosts: list[EngineHost]) -> None:
    """The last test of this file: it takes the engine some seconds to be back."""
    tasks = [asyncio.create_task(last(pool, f"kept-{i}", seed=i, **LONG)) for i in range(4)]
    await until(lambda: all(host.engine.load.jobs for host in hosts))
    process = hosts[0].engine._engine.process  # type: ignore[attr-defined]
    process.kill()
    outputs = await asyncio.gather(*tasks)
    assert [output.error for output in outputs] == [None] * 4
    await until(lambda: all(replica.engine.ready for replica in pool.replicas), 120)
