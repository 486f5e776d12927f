"""Ray Serve's replicas as engines of a pool: who there is, and frames to one of them by name. Needs the extra `[ray]`.

Serve starts, watches, replaces and scales the replicas; the pool decides which of them takes a request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vllm_omni.replicas.remote import LinkLostError

_members: set[str] = set()  # replicas that Serve routes to, in this process


def members() -> set[str]:
    """The names of the replicas, as Serve last said."""
    return set(_members)


class NamedRouter(RequestRouter):
    """Sends a call to the replica that it names, and notes which there are."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named one alone; all, if a call names none."""
        name = pending_request.kwargs.get("replica") if pending_request is not None else None
        return [[one for one in candidate_replicas if name in (None, one.replica_id.unique_id)]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        _members.clear()
        _members.update(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        _members.discard(replica_id.unique_id)


class RayLink:
    """A `Link` to one replica of a deployment whose methods are those of `EngineHost`."""

    def __init__(self, handle: Any, replica: str) -> None:
        self._handle, self._replica = handle, replica

    async def describe(self) -> bytes:
        with _lost():
            answer: bytes = await self._handle.describe.remote(replica=self._replica)
            return answer

    def watch(self) -> AsyncGenerator[bytes, None]:
        return self._stream(self._handle.watch)

    def generate(self, frame: bytes, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        return self._stream(self._handle.generate, frame, timeout_s)

    async def control(self, frame: bytes) -> bytes:
        with _lost():
            answer: bytes = await self._handle.control.remote(frame, replica=self._replica)
            return answer

    async def abort(self, request_ids: list[str]) -> None:
        with _lost():
            await self._handle.abort.remote(request_ids, replica=self._replica)

    async def _stream(self, method: Any, *args: Any) -> AsyncGenerator[bytes, None]:
        """What a method yields; leaving it cancels the method where it runs."""
        stream = method.options(stream=True).remote(*args, replica=self._replica)
        try:
            with _lost():
                async for frame in stream:
                    yield frame
        finally:
            stream.cancel()


@contextmanager
def _lost() -> Any:
    try:
        yield
    except (RayError, RayServeException) as error:
        raise LinkLostError(type(error).__name__) from error
