"""The front on Ray Serve, without a Ray: it follows its replicas, whatever one of them does or does not do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from loose_link import LooseHandle, LooseLink
from process_client import until

from vllm_omni.errors import EngineDeadError
from vllm_omni.replicas import members
from vllm_omni.replicas.pool import ReplicaPool

pytest.importorskip("ray", reason="pip install 'vllm-omni-magcache[ray]'")
ray_serve = pytest.importorskip("vllm_omni.entrypoints.ray_serve")


class Front(ray_serve.Front):  # type: ignore[misc,name-defined]
    def __del__(self) -> None:
        """Serve awaits the other one; the fixture does."""


@pytest_asyncio.fixture
async def front(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Front]:
    """Over a replica `a`; `b` and `c` have not come yet."""
    monkeypatch.setattr(ray_serve, "keep_to_loopback", lambda: None)
    members.note(["a"])
    made = Front.__new__(Front)
    await made.__init__(LooseHandle({name: LooseLink() for name in "abc"}), {"model": "demo"})  # type: ignore[misc]
    assert names(made) == {"a"}
    yield made
    members.note([])
    await ray_serve.Front.__del__(made)


def names(front: Front) -> set[str]:
    return {replica.name for replica in front._pool.replicas}


def links(front: Front) -> dict[str, LooseLink]:
    return front._handle.links  # type: ignore[no-any-return]


async def test_a_replica_that_does_not_hear_what_waits_keeps_no_other_from_joining(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its machine is lost under load: what waits changes, and Ray tries to say so for ever."""
    links(front)["a"].hangs = True
    monkeypatch.setattr(ray_serve, "TELL_S", 0.2, raising=False)
    monkeypatch.setattr(ReplicaPool, "waiting_s", 6.0)
    await asyncio.sleep(2 * ray_serve.LOOK_EVERY_S)
    members.note("ab")
    await until(lambda: names(front) == {"a", "b"})
    await until(lambda: links(front)["b"].waiting_s == 3.0)
    members.note("b")
    await until(lambda: names(front) == {"b"} and links(front)["b"].waiting_s == 6.0)
    await front.check_health()


async def test_one_that_comes_for_another_is_told_though_the_share_is_the_same(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplicaPool, "waiting_s", 6.0)
    await until(lambda: links(front)["a"].waiting_s == 6.0)
    members.note("b")
    await until(lambda: links(front)["b"].waiting_s == 6.0)


async def test_one_that_does_not_describe_itself_holds_up_nobody(front: Front) -> None:
    links(front)["b"].hangs = True
    members.note("abc")
    began = time.monotonic()
    await until(lambda: names(front) == {"a", "c"})
    members.note("bc")
    await until(lambda: names(front) == {"c"})
    assert time.monotonic() - began < ray_serve.JOIN_S


async def test_a_fault_ends_neither_the_front_nor_its_following(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    look: Callable[[], set[str]] = members.members
    faults = [OSError("a fault"), KeyError("another")]

    def looked() -> Any:
        if faults:
            raise faults.pop()
        return look()

    monkeypatch.setattr(ray_serve, "members", looked)
    members.note("ab")
    await until(lambda: names(front) == {"a", "b"})
    assert not faults
    await front.check_health()


async def test_a_front_that_looks_no_more_says_so(front: Front) -> None:
    front._following.cancel()
    front._looked -= ray_serve.UNSEEN_S + 1
    with pytest.raises(EngineDeadError, match="has not looked after its replicas"):
        await front.check_health()
