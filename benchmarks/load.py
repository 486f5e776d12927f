"""Many users: throughput and latency of mixed-step requests under load, against what else could serve them.

Closed loop: so many clients, each asking again as soon as it has its picture. Open loop: requests arrive at random
(Poisson), whether or not others are done. Peers run on the same weights, uncached and with the very plans of the engine
(the published rule without a guard; `rows computed` counts them):

- diffusers one by one; with its own MagCache; with cache-dit, which computes its first block in every step all the same
- diffusers in static batches, with and without its own MagCache: waiting requests of equal step counts go together

A peer that serves one request at a time needs no load to run under: every request's service time is measured,
interleaved with the rounds of the others, and waiting follows from the order of arrival. All others really run.

Bar: never slower than any peer. How near the batching limit the engine comes is `batching.py`'s question.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from common import arguments, begin, last_line, now, table

from vllm_omni.bench.stats import PERCENTILES, arrivals, percentile
from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.quality.peers import private

STEPS = (10, 20, 28, 50)
RULE = {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1}
EQUAL = {"predictor": "reuse", "compute_last_step": False, "curve_resampling": "nearest"}
PROMPTS = ["red apple", "penguin", "guitar", "octopus", "sunflower", "soccer ball", "rainbow", "sailboat"]

ENGINE, OWN = "engine", "diffusers, own MagCache"

Request = tuple[str, int, int]  # prompt, steps, seed
Run = tuple[float, list[float]]  # seconds in all, latency of each request


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=32, help="per round (default %(default)s)")
    parser.add_argument(
        "--open-loads", type=float, nargs="*", default=[0.7, 1.2], help="of diffusers' MagCache capacity"
    )
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "load", **begin(options), "model": "demo", "requests": options.requests}
    requests = [(PROMPTS[i % len(PROMPTS)], STEPS[(i * 3) % len(STEPS)], i) for i in range(options.requests)]
    engine, serial, static = Engine(), peers(), static_peers()
    loads = [("closed", clients) for clients in options.clients]
    loads += [("open", share) for share in options.open_loads if options.clock == "wall"]  # arrivals are in wall time
    shares = computed_shares(engine, serial, static, requests[: len(STEPS)])  # and everything has run once
    services: dict[str, list[list[float]]] = {name: [] for name in serial}
    rounds: dict[str, dict[tuple[str, float], list[Run]]] = {
        name: {load: [] for load in loads if name == ENGINE or (load[0] == "closed" and load[1] > 1)}
        for name in (ENGINE, *static)
    }
    for _ in range(options.repeats):
        for name, run in serial.items():
            services[name].append([run(request) for request in requests])
        capacity = 1 / np.mean(services[OWN][-1])
        for load in loads:
            kind, amount = load
            if kind == "open":
                came = arrivals(len(requests), amount * capacity)
                rounds[ENGINE][load].append(engine.open(requests, came))
            else:
                rounds[ENGINE][load].append(engine.closed(requests, int(amount)))
            for name, call in static.items():
                if load in rounds[name]:
                    rounds[name][load].append(serve_static(call, requests, int(amount)))
    result["rows_computed"] = shares
    result["loads"] = [compare(load, rounds, services) for load in loads]
    report(result)
    last_line(result)


def compare(
    load: tuple[str, float],
    rounds: dict[str, dict[tuple[str, float], list[Run]]],
    services: dict[str, list[list[float]]],
) -> dict[str, Any]:
    """Every system under one load: pictures per second and latency percentiles, medians over the rounds."""
    kind, amount = load
    systems = {name: measured[load] for name, measured in rounds.items() if load in measured}
    for name, served in services.items():
        systems[name] = [_queue(load, times, services, i) for i, times in enumerate(served)]
    figures = {}
    for name, runs in systems.items():
        percentiles = np.median([[percentile(latency, p) for p in PERCENTILES] for _, latency in runs], axis=0)
        figures[name] = {
            "pictures_per_s": float(np.median([len(latency) / total for total, latency in runs])),
            **{f"p{p}_s": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
            "engine_times": float(np.median([a / b for (a, _), (b, _) in zip(runs, systems[ENGINE], strict=True)])),
        }
    return {"loop": kind, "amount": amount, "systems": figures}


def report(result: dict[str, Any]) -> None:
    rows = []
    for load in result["loads"]:
        what = f"{load['amount']} clients" if load["loop"] == "closed" else f"{load['amount']} of capacity"
        for name, f in load["systems"].items():
            rows.append([f"{load['loop']}, {what}", name, *f.values()])
    quantiles = [f"p{p} s" for p in PERCENTILES]
    table(["load", "system", "pictures/s", *quantiles, "engine's throughput, times"], rows)
    print("rows computed:", ", ".join(f"{name} {share:.3f}" for name, share in result["rows_computed"].items()))


def _queue(
    load: tuple[str, float], times: list[float], services: dict[str, list[list[float]]], round_: int
) -> tuple[float, list[float]]:
    """(total, latencies) of one server, first come first served, from measured service times."""
    kind, amount = load
    capacity = 1 / np.mean(services[OWN][round_])
    came = arrivals(len(times), amount * capacity) if kind == "open" else []
    clock, ends, latencies = 0.0, [], []
    for i, seconds in enumerate(times):
        if kind == "closed":  # a client asks again when its last picture is done
            asked = ends[i - int(amount)] if i >= amount else 0.0
        else:
            asked = came[i]
        clock = max(clock, asked) + seconds
        ends.append(clock)
        latencies.append(clock - asked)
    return clock, latencies


def serve_static(call: Callable[[list[Request]], Any], requests: list[Request], clients: int) -> Run:
    """Static batches in a closed loop: the waiting requests of equal step counts, oldest first, in one call."""
    began = now()
    waiting = list(range(min(clients, len(requests))))
    asked, upcoming, latencies = dict.fromkeys(waiting, 0.0), len(waiting), []
    while waiting:
        batch = [i for i in waiting if requests[i][1] == requests[waiting[0]][1]]
        call([requests[i] for i in batch])
        passed = now() - began
        for i in batch:
            waiting.remove(i)
            latencies.append(passed - asked[i])
            if upcoming < len(requests):
                waiting.append(upcoming)
                asked[upcoming] = passed
                upcoming += 1
    return now() - began, latencies


def peers() -> dict[str, Callable[[Request], float]]:
    """Name: a function that serves one request and gives the seconds it took."""
    plain, defaults = _plain()
    cached = private(plain)
    serial: dict[str, Callable[[Request], float]] = {
        "diffusers": lambda request: _timed(lambda: _call(plain, defaults, [request])),
        OWN: lambda request: _timed(lambda: _with_own_cache(cached, defaults, [request])),
    }
    if find_spec("cache_dit") is None:
        return serial
    import cache_dit

    masked = {}
    for steps in STEPS:  # a pipeline each: cache-dit's settings are a pipeline's
        masked[steps] = private(plain)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=1,
            num_inference_steps=steps,
            steps_computation_mask=[int(computed) for computed in plan_of(steps)],
            steps_computation_policy="static",
        )
        cache_dit.enable_cache(masked[steps], cache_config=config)
    return serial | {"cache-dit": lambda request: _timed(lambda: _call(masked[request[1]], defaults, [request]))}


def static_peers() -> dict[str, Callable[[list[Request]], Any]]:
    """Name: a function that serves requests of equal step counts in one call."""
    plain, defaults = _plain()
    cached = private(plain)
    return {
        "diffusers, static batches": lambda requests: _call(plain, defaults, requests),
        "diffusers, own MagCache, static batches": lambda requests: _with_own_cache(cached, defaults, requests),
    }


def rule() -> dict[str, Any]:
    """The cache settings that make the engine run its peer's plans, on the curve that the peer gets."""
    return RULE | EQUAL | {"mag_ratios": shipped_profile("demo").ratios}


def plan_of(steps: int) -> tuple[bool, ...]:
    """What the published rule computes on the demo's curve, without a guard."""
    from vllm_omni.diffusion.cache.magcache import MagCacheBackend
    from vllm_omni.diffusion.data import DiffusionCacheConfig

    pipe, _ = _plain()
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.0)
    backend = MagCacheBackend(DiffusionCacheConfig(**rule()))
    backend.enable(pipe, standalone=False)
    record = backend.refresh(pipe, steps, request_id="plan")
    assert record is not None and record.plan is not None
    return record.plan.compute


def computed_shares(
    engine: Engine,
    serial: dict[str, Callable[[Request], float]],
    static: dict[str, Callable[[list[Request]], Any]],
    requests: list[Request],
) -> dict[str, float]:
    """Rows that went through an attention, over those of an uncached run, for one request of each step count."""
    from diffusers.models.transformers.transformer_flux import FluxAttention

    jobs: dict[str, Callable[[], Any]] = {ENGINE: lambda: engine.closed(requests, len(requests))}
    jobs |= {name: (lambda run=run: [run(request) for request in requests]) for name, run in serial.items()}
    jobs |= {name: (lambda call=call: [call([request]) for request in requests]) for name, call in static.items()}
    counts = dict.fromkeys(jobs, 0)
    own = FluxAttention.forward
    for name, job in jobs.items():

        def counted(self: Any, hidden_states: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
            counts[name] += len(hidden_states)
            return own(self, hidden_states, *args, **kwargs)

        FluxAttention.forward = counted
        try:
            job()
        finally:
            FluxAttention.forward = own
    return {name: count / counts["diffusers"] for name, count in counts.items()}


class Engine:
    """The engine under test, driven by hand so that arrivals happen when they should."""

    def __init__(self) -> None:
        from vllm_omni import Omni

        self.omni = Omni("demo", max_num_seqs=32, cache_backend="magcache", cache_config=rule())
        self._made = 0

    def _add(self, request: Request) -> str:
        from vllm_omni import OmniDiffusionSamplingParams
        from vllm_omni.diffusion.request import OmniDiffusionRequest
        from vllm_omni.inputs.data import normalise_prompt

        self._made += 1
        prompt, steps, seed = request
        params = OmniDiffusionSamplingParams(num_inference_steps=steps, seed=seed)
        self.omni.engine.add_request(
            OmniDiffusionRequest(f"load-{self._made}", prompt, normalise_prompt(prompt), params)
        )
        return f"load-{self._made}"

    def closed(self, requests: list[Request], clients: int) -> tuple[float, list[float]]:
        return self._run(requests, [0.0] * min(clients, len(requests)), clients)

    def open(self, requests: list[Request], came: list[float]) -> tuple[float, list[float]]:
        return self._run(requests, came, 0)

    def _run(self, requests: list[Request], came: list[float], clients: int) -> tuple[float, list[float]]:
        began, asked, latencies, sent = now(), {}, [], 0
        while len(latencies) < len(requests):
            passed = now() - began
            while sent < len(came) and came[sent] <= passed:
                asked[self._add(requests[sent])] = came[sent] if not clients else passed
                sent += 1
            if not self.omni.engine.has_unfinished_requests():
                time.sleep(max(0.0, came[sent] - passed))
                continue
            for output in self.omni.engine.step():
                if output.error is not None:
                    raise output.error
                passed = now() - began
                latencies.append(passed - asked.pop(output.request_id))
                if clients and len(came) < len(requests):
                    came.append(passed)
        return now() - began, latencies


def _plain() -> tuple[Any, dict[str, Any]]:
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.model_folder import generation_defaults

    return load_pipeline(OmniDiffusionConfig(model="demo")), generation_defaults("demo")


def _call(pipe: Any, defaults: dict[str, Any], requests: list[Request]) -> Any:
    """One call for requests of equal step counts."""
    generators = [torch.Generator("cpu").manual_seed(seed) for _, _, seed in requests]
    arguments = defaults | {"num_inference_steps": requests[0][1]}
    return pipe([prompt for prompt, _, _ in requests], **arguments, generator=generators).images


def _with_own_cache(pipe: Any, defaults: dict[str, Any], requests: list[Request]) -> Any:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(
        threshold=RULE["mag_threshold"],
        max_skip_steps=int(RULE["mag_max_skip_steps"]),
        retention_ratio=RULE["mag_retention_ratio"],
        num_inference_steps=requests[0][1],
        mag_ratios=list(shipped_profile("demo").ratios),
    )
    pipe.transformer.enable_cache(config)
    try:
        return _call(pipe, defaults, requests)
    finally:
        pipe.transformer.disable_cache()


def _timed(job: Callable[[], Any]) -> float:
    began = now()
    job()
    return now() - began


if __name__ == "__main__":
    main()
