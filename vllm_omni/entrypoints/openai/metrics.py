"""`/metrics`: the engine's counters and gauges under the names that routers scrape, and ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from starlette.responses import PlainTextResponse, Response

from vllm_omni.engine.interface import EngineStats
from vllm_omni.entrypoints.openai.state import LATENCY_BOUNDS, AppState, State
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.omni
    task = asyncio.create_task(_log_stats(state)) if state.config.log_stats else None
    yield
    if task is not None:
        task.cancel()


router = APIRouter(tags=["server"], lifespan=_lifespan)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: State) -> Response:
    """Prometheus text."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(await state.engine.stats(), state))  # type: ignore[arg-type]
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def _log_stats(state: AppState) -> None:
    """Write a line whenever the interval is over and something was done in it or waits."""
    every, before = state.config.log_stats_interval_s, await state.engine.stats()
    while True:
        await asyncio.sleep(every)
        now = await state.engine.stats()
        computed, skipped = now.steps_computed - before.steps_computed, now.steps_skipped - before.steps_skipped
        done = now.requests.get("finished", 0) - before.requests.get("finished", 0)
        if now.running or now.waiting or computed or skipped or done:
            logger.info(
                "Running: %d reqs, Waiting: %d reqs, Finished: %.2f reqs/s, Steps: %.1f/s, Skipped: %.1f%%",
                now.running, now.waiting, done / every, (computed + skipped) / every,
                100 * skipped / max(1, computed + skipped),
            )  # fmt: skip
        before = now


class _Snapshot:
    """A prometheus_client collector of one moment: the engine counts, not the HTTP process."""

    def __init__(self, stats: EngineStats, state: AppState) -> None:
        self.stats, self.state, self.model = stats, state, state.config.model_names[0]

    def collect(self) -> Iterator[Metric]:
        s, state = self.stats, self.state
        total = s.steps_computed + s.steps_skipped
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", s.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", s.waiting)
        yield self._gauge("vllm_omni:ready", "1 while requests can be served.", int(state.engine.ready))
        yield self._gauge("vllm_omni:max_num_seqs", "Requests that may run together.", s.max_num_seqs)
        yield self._gauge("vllm_omni:cache_skip_ratio", "Skipped ÷ all steps.", s.steps_skipped / total if total else 0)
        yield self._gauge("vllm_omni:cache_state_bytes", "Bytes of all cached residuals.", s.cache_bytes)
        yield self._gauge("vllm_omni:cache_profiles", "Profiles of the checkpoint in use.", len(s.profiles))
        yield self._gauge("vllm_omni:cache_learning", "1 while a profile is being learnt.", int(bool(s.learning)))
        yield self._gauge("vllm_omni:queued_cost_seconds", "Planned seconds of all in flight.", s.queued_cost_s)
        late = s.requests.get("expired", 0)
        yield self._counter("vllm_omni:deadline_missed", "Requests ended by their time-out.", late)
        yield self._counter("vllm_omni:queue_wait_seconds", "Seconds waited.", s.queue_wait_s)
        yield self._counter("vllm_omni:denoise_seconds", "Seconds in the denoiser.", s.denoise_s)
        yield self._counter("vllm_omni:decode_seconds", "Seconds of decoding.", s.decode_s)
        yield self._counter("vllm_omni:worker_restarts", "Engine processes that were replaced.", s.restarts)
        yield self._counters("vllm:request_success", "Requests by how they ended.", "finished_reason", s.requests)
        steps = {"computed": s.steps_computed, "skipped": s.steps_skipped}
        yield self._counters("vllm_omni:denoise_steps", "Denoising steps of requests.", "kind", steps)
        prompts = {"hit": s.prompt_hits, "miss": s.prompt_misses}
        yield self._counters("vllm_omni:prompt_cache", "Prompts: embeddings kept, or not.", "result", prompts)
        yield self._gauge("vllm_omni:prompt_cache_bytes", "Bytes of kept embeddings.", s.prompt_bytes)
        forwards = {"computed": s.forwards_computed, "skipped": s.forwards_skipped}
        yield self._counters("vllm_omni:denoiser_forwards", "Forwards of batches.", "kind", forwards)
        yield self._counters("vllm_omni:aborted", "Aborted requests.", "where", s.aborts_by_stage)
        yield from self._of_replicas()
        statuses = {str(status): count for status, count in state.statuses.items()}
        yield self._counters("vllm_omni:http_replies", "Replies by status; 0: none was sent.", "status", statuses)
        rows = sum(rows * count for rows, count in s.batch_sizes.items())
        yield self._histogram("vllm_omni:denoise_batch_size", "Rows of a forward.", BATCH_BOUNDS, s.batch_sizes, rows)
        name, seconds = "vllm:e2e_request_latency_seconds", state.latency_sum
        yield self._histogram(name, "Seconds of a reply.", LATENCY_BOUNDS, state.latencies, seconds)

    def _of_replicas(self) -> Iterator[Metric]:
        """Of each engine behind a front of several."""
        gauges = {
            "vllm_omni:replica_ready": ("1 while requests can be sent there.", "ready"),
            "vllm_omni:replica_requests_running": ("Requests in its batch.", "running"),
            "vllm_omni:replica_requests_waiting": ("Requests that wait there.", "waiting"),
            "vllm_omni:replica_queued_cost_seconds": ("Planned seconds of all in flight there.", "queued_cost_s"),
        }
        counters = {
            "vllm_omni:replica_requests": ("Requests that ended there.", "answered"),
            "vllm_omni:replica_lost_requests": ("Requests that died with it and were asked again.", "lost"),
            "vllm_omni:replica_restarts": ("Times that its process was replaced.", "restarts"),
        }
        told = {one.name: vars(one) | {"ready": int(one.state == "ready")} for one in self.stats.replicas}
        for names, kind in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, (text, field) in names.items() if told else ():
                family = kind(name, text, labels=["model_name", "replica"])
                for replica, values in told.items():
                    family.add_metric([self.model, replica], values[field])
                yield family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([self.model, key], value)
        return family

    def _histogram(
        self, name: str, text: str, bounds: Iterable[float], counts: dict[float, int] | dict[int, int], total: float
    ) -> HistogramMetricFamily:
        buckets = [(str(float(b)), float(sum(c for v, c in counts.items() if v <= b))) for b in bounds]
        buckets.append(("+Inf", float(sum(counts.values()))))
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], buckets, total)
        return family
