"""The server on Ray Serve: one front with the whole HTTP application, and engines as replicas of a deployment.

`serve run vllm_omni.entrypoints.ray_serve:app model=demo` and the `import_path` of a Serve config file take `app`; the
command `vllm-omni ray` takes `application`. Needs the extra `[ray]`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.ray_config import RayConfig, RayOptions, app_config
from vllm_omni.errors import EngineDeadError, OmniError
from vllm_omni.logger import init_logger, told
from vllm_omni.replicas.kept import KeptTask
from vllm_omni.replicas.members import members
from vllm_omni.replicas.pool import ReplicaPool
from vllm_omni.replicas.ray_link import RayLink, keep_to_loopback
from vllm_omni.replicas.ray_policy import QUEUED, NamedRouter, QueuedSeconds
from vllm_omni.replicas.remote import EngineHost, LinkLostError, RemoteEngine

logger = init_logger(__name__)

LOOK_EVERY_S = 0.2  # at which replicas there are
JOIN_S = 10.0  # in which one must have described itself
TELL_S = 1.0  # in which one must have heard what waits here
UNSEEN_S = 30.0  # without a look, until the front itself counts as dead
_SCALE_EVERY_S = 1.0


class Engine:
    """One engine process, as a replica: the methods of `EngineHost`, with the replica's name for the router."""

    async def __init__(self, engine_args: dict[str, Any], warmup: bool, max_queued_requests: int) -> None:  # type: ignore[misc]
        keep_to_loopback()
        engine = ProcessEngineClient(engine_args, max_queued_requests=max_queued_requests, warmup=warmup)
        self._host, self._waiting = EngineHost(await engine.start()), 0.0

    async def describe(self, replica: str | None = None) -> bytes:
        return await self._host.describe()

    async def watch(self, replica: str | None = None) -> AsyncGenerator[bytes, None]:
        async for frame in self._host.watch():
            yield frame

    async def generate(
        self, frame: bytes, timeout_s: float | None, replica: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        async for answer in self._host.generate(frame, timeout_s):
            yield answer

    async def control(self, frame: bytes, replica: str | None = None) -> bytes:
        return await self._host.control(frame)

    async def abort(self, request_ids: list[str], replica: str | None = None) -> None:
        await self._host.abort(request_ids)

    async def check_health(self) -> None:
        """Raise if no engine process will come any more: Serve then replaces the replica."""
        if self._host.engine.state == "dead":
            raise EngineDeadError("the engine process is not restarted any more")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {QUEUED: sum(seconds for seconds, _ in self._host.engine.load.jobs) + self._waiting}

    async def note_waiting(self, seconds: float, replica: str | None = None) -> None:
        """Its share of what waits at the front and was sent to nobody."""
        self._waiting = seconds

    async def __del__(self) -> None:
        await self._host.engine.shutdown()


class Front:
    """The HTTP application before a pool of the engines that Serve has."""

    async def __init__(self, engines: DeploymentHandle, config: dict[str, Any]) -> None:  # type: ignore[misc]
        keep_to_loopback()
        self._config, self._handle = RayConfig(**config).serve_config(), engines
        limits, engine = self._config.limits, self._config.engine_config()
        self._pool = ReplicaPool([], engine.max_num_seqs, limits.max_queued_requests)
        self._links = dict[str, RayLink]()
        self._joining = dict[str, asyncio.Task[None]]()
        self._told = dict[str, float]()  # by replica: what waits here, as it was last told
        await self._handle.describe.remote()  # returns once there is a replica
        await self._meet()
        await asyncio.gather(*self._joining.values())
        self._looked = time.monotonic()
        self._following = KeptTask(self._follow, LOOK_EVERY_S, "looking after the replicas")

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._pool, self._config)

    async def check_health(self) -> None:
        """Raise if nobody looks after the replicas any more."""
        if (unseen_s := time.monotonic() - self._looked) > UNSEEN_S:
            raise EngineDeadError(f"the front has not looked after its replicas for {unseen_s:.0f} s")

    async def __del__(self) -> None:
        self._following.cancel()
        for task in self._joining.values():
            task.cancel()
        await self._pool.shutdown()

    async def _follow(self) -> None:
        while True:
            await self._meet()
            await self._tell_waiting()
            self._looked = time.monotonic()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _tell_waiting(self) -> None:
        """Tell each replica its share of what waits here, where that has changed."""
        share = self._pool.waiting_s / max(1, len(self._pool.replicas))
        names = [replica.name for replica in self._pool.replicas if self._told.get(replica.name) != share]
        await asyncio.gather(*(self._tell(name, share) for name in names))

    async def _tell(self, name: str, share: float) -> None:
        """One that does not answer keeps nobody waiting: Ray would try it again for ever."""
        with suppress(LinkLostError, TimeoutError):
            async with asyncio.timeout(TELL_S):
                await self._links[name].note_waiting(share)
                self._told[name] = share

    async def _meet(self) -> None:
        """Let the pool have the replicas that Serve has; those that come do so in their own time."""
        there, known = members(), {replica.name for replica in self._pool.replicas}
        for name in known - there:
            logger.info("replica %s has left", name)
            await self._pool.leave(name)
            del self._links[name]
            self._told.pop(name, None)
        for name in there - known - self._joining.keys():
            task = self._joining[name] = asyncio.create_task(self._join(name))
            task.add_done_callback(partial(self._joined, name))

    async def _join(self, name: str) -> None:
        link = RayLink(self._handle, name)
        engine = RemoteEngine(link, partial(self._pool.changed, name), self._pool.freed)
        try:
            async with asyncio.timeout(JOIN_S):
                await engine.start()
        except (OmniError, TimeoutError) as error:
            logger.warning("replica %s does not answer: %s", name, error)
            return
        self._links[name] = link
        self._pool.join(name, engine)
        logger.info("replica %s has joined", name)

    def _joined(self, name: str, task: asyncio.Task[None]) -> None:
        del self._joining[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("replica %s could not join:\n%s", name, told(error))


def application(config: RayConfig) -> Application:
    """The application of these settings, for `serve.run`."""
    server = config.serve_config()  # raises what is wrong, before anything starts
    options, seqs = config.options, server.engine_config().max_num_seqs
    waiting = config.limits.max_queued_requests
    drain_s = max(1.0, config.shutdown_timeout_s)
    engines = serve.deployment(
        name="Engine",
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
        max_ongoing_requests=seqs + waiting + 64,  # and what listens and controls
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=drain_s,
        request_router_config=RequestRouterConfig(request_router_class=NamedRouter),
        **_replicas(options),
    )(Engine)
    front = serve.deployment(
        name="Front",
        num_replicas=1,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0},  # it must find a place also where engines have taken every core
        graceful_shutdown_timeout_s=drain_s,
    )(serve.ingress()(Front))
    settings = config.model_dump(mode="json", exclude_unset=True)
    built: Application = front.bind(engines.bind(server.engine_args, config.warmup, waiting), settings)
    return built


def _replicas(options: RayOptions) -> dict[str, Any]:
    if options.max_replicas is None or options.max_replicas == options.replicas:
        return {"num_replicas": options.replicas}
    scaling = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=options.max_replicas,
        metrics_interval_s=_SCALE_EVERY_S,
        look_back_period_s=2 * _SCALE_EVERY_S,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,  # the policy itself waits
        policy=AutoscalingPolicy(
            policy_function=QueuedSeconds,
            policy_kwargs={"target_s": options.target_queued_s, "patience_s": options.downscale_delay_s},
        ),
    )
    return {"num_replicas": None, "autoscaling_config": scaling}


def app(args: dict[str, Any]) -> Application:
    """The application of a Serve config file, or of `serve run ... model=demo`; `app_config` says what `args` are."""
    return application(app_config(args))
