"""What Ray Serve asks of us: which replica takes a call, and how many there should be. Needs the extra `[ray]`.

Serve copies this module with its classes and functions into other processes: it keeps nothing of its own.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vllm_omni.replicas import members
from vllm_omni.replicas.scaling import Window, wanted_replicas

QUEUED = "queued_seconds"  # the metric by which is scaled


class NamedRouter(RequestRouter):
    """Sends a call to the replica that it names, and notes which there are; the pool has chosen."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named one alone; all, if a call names none."""
        name = None
        if pending_request is not None:
            name = pending_request.kwargs.get("replica")
            pending_request.routing_context.should_backoff = True  # else it is asked again and again without a pause
        found = [one for one in candidate_replicas if name in (None, one.replica_id.unique_id)]
        return [found]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        members.note(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        members.lost(replica_id.unique_id)


class QueuedSeconds:
    """Serve's autoscaling policy: as many replicas as what is left to do asks for, fewer only after a while."""

    def __init__(self, target_s: float, patience_s: float) -> None:
        self._target_s, self._window = target_s, Window(patience_s)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        lowest, highest = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        told = (ctx.aggregated_metrics or {}).get(QUEUED)
        if not told:  # nobody has reported yet
            return max(lowest, ctx.target_num_replicas), {}
        wanted = wanted_replicas(sum(told.values()), self._target_s, lowest, highest)
        return self._window.note(float(ctx.current_time or 0.0), wanted), {}
