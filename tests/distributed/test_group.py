"""What rank 0 makes of a failure: whether all ranks report it, in their own time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_omni.distributed import group as module
from vllm_omni.distributed.group import LEAD, Group, Member
from vllm_omni.distributed.messages import Done, Failed, Verdict, receive, send
from vllm_omni.errors import DeviceLostError

GRACE_S = 0.2


class Played:
    """A group of rank 0 and one other, whose part the test plays."""

    def __init__(self, timeout_s: float) -> None:
        self.group, self.killed = Group(2, timeout_s), threading.Event()
        ours, self.end = socket.socketpair()
        process: Any = SimpleNamespace(poll=lambda: None, kill=self.killed.set)
        self.member = Member(1, process, ours)
        self.group.members.append(self.member)
        threading.Thread(target=self.group._hear, args=(self.member,), daemon=True).start()
        threading.Thread(target=self.group._watch, daemon=True).start()

    def says(self, after_s: float, *messages: Any) -> None:
        def say() -> None:
            time.sleep(after_s)
            for message in messages:
                send(self.end, message)

        threading.Thread(target=say, daemon=True).start()

    def begin(self, turn: int) -> None:
        self.says(0.0, Done(turn - LEAD))
        self.group.keep_up(turn)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    monkeypatch.setattr(module, "GRACE_S", GRACE_S)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    one = Played(timeout_s=30.0)
    yield one
    one.group._closed = True
    one.end.close()
    one.group._folder.cleanup()


def test_a_rank_that_is_turns_behind_has_the_time_to_fail_alike(played: Played) -> None:
    """One user's bad request, without a collective before it fails: the group goes on."""
    played.begin(LEAD + 1)
    played.says(3 * GRACE_S, Done(LEAD))
    played.says(3.5 * GRACE_S, Failed("bad"))
    assert played.group.fails_alike("bad")
    assert receive(played.end, to_rank=True) == Verdict() and not played.killed.is_set()


def test_a_rank_has_as_long_for_a_forward_as_rank_0_had(played: Played) -> None:
    played.begin(1)
    played.says(0.0, Done(0))
    time.sleep(2 * GRACE_S)
    played.says(2 * GRACE_S, Failed("bad"))
    assert played.group.fails_alike("bad")


@pytest.mark.parametrize("said", [[Done(8)], [Done(8), Failed("worse")]], ids=["nothing", "another"])
def test_what_one_rank_alone_says_ends_the_group(played: Played, said: list[Any]) -> None:
    played.begin(9)
    played.says(0.0, *said)
    assert not played.group.fails_alike("bad") and played.killed.is_set()
    with pytest.raises(DeviceLostError, match="failed on some ranks only"):
        played.group.check()


def test_a_rank_that_fails_while_rank_0_goes_on_is_not_waited_for(played: Played) -> None:
    played.begin(1)
    played.says(0.0, Failed("bad"))
    assert played.killed.wait(20.0)
    with pytest.raises(DeviceLostError, match="rank 1 has failed alone: bad"):
        played.group.check()
