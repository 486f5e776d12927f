"""Many users: throughput and latency of mixed-step requests under load, against what else could serve them.

Closed loop: so many clients, each asking again as soon as it has its picture. Open loop: requests arrive at random
(Poisson), whether or not others are done. Peers run on the same weights:

- diffusers one by one, uncached; with its own MagCache; with cache-dit where it is installed
- diffusers in static batches: requests of equal step counts that are waiting go together

A peer serves one call at a time, so its queue is arithmetic: every request's service time is measured, interleaved with
the engine's rounds, and waiting follows from the order of arrival. The engine really runs under the load. The engine
and diffusers' MagCache run the same plans (published rule, no guard), so full forwards are equal; cache-dit decides for
itself, and its computed share is printed.

Bars: at 16 clients >= 0.9 of the batching limit over diffusers' MagCache (see batching.py); never slower than it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, begin, last_line, table

STEPS = (10, 20, 28, 50)
RULE = {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1}
EQUAL = {"predictor": "reuse", "compute_last_step": False, "curve_resampling": "nearest"}
PROMPTS = ["red apple", "penguin", "guitar", "octopus", "sunflower", "soccer ball", "rainbow", "sailboat"]

Request = tuple[str, int, int]  # prompt, steps, seed


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=32, help="per round (default %(default)s)")
    parser.add_argument(
        "--open-loads", type=float, nargs="+", default=[0.7, 1.2], help="of diffusers' MagCache capacity"
    )
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "load", **begin(options), "model": "demo", "requests": options.requests}
    requests = [(PROMPTS[i % len(PROMPTS)], STEPS[(i * 3) % len(STEPS)], i) for i in range(options.requests)]
    engine, serial = Engine(), peers()
    services = {name: [run(request) for request in requests[:4]] and [] for name, run in serial.items()}
    loads = [("closed", clients) for clients in options.clients] + [("open", share) for share in options.open_loads]
    rounds: dict[tuple[str, float], list[tuple[float, list[float]]]] = {load: [] for load in loads}
    engine.closed(requests[:4], 4)
    for _ in range(options.repeats):
        for name, run in serial.items():
            services[name].append([run(request) for request in requests])
        capacity = 1 / np.mean(services["diffusers, own MagCache"][-1])
        for kind, amount in loads:
            if kind == "closed":
                rounds[kind, amount].append(engine.closed(requests, int(amount)))
            else:
                rounds[kind, amount].append(engine.open(requests, arrivals(len(requests), amount * capacity)))
    shares = computed_shares(serial, requests[:4])
    result["computed_share"] = shares
    result["loads"] = [compare(load, rounds[load], services, requests) for load in loads]
    report(result)
    last_line(result)


def compare(
    load: tuple[str, float],
    rounds: list[tuple[float, list[float]]],
    services: dict[str, list[list[float]]],
    requests: list[Request],
) -> dict[str, Any]:
    """Every system under one load: pictures per second and latency percentiles, medians over the rounds."""
    kind, amount = load
    systems: dict[str, list[tuple[float, list[float]]]] = {"engine": rounds}
    for name, served in services.items():
        systems[name] = [_queue(load, times, services, i) for i, times in enumerate(served)]
    batches = [_static(load, times, services, requests, i) for i, times in enumerate(services["diffusers"])]
    if kind == "closed":
        systems["diffusers, static batches"] = batches
    figures = {}
    for name, runs in systems.items():
        percentiles = np.median([np.percentile(latency, (50, 95, 99)) for _, latency in runs], axis=0)
        figures[name] = {
            "pictures_per_s": float(np.median([len(latency) / total for total, latency in runs])),
            **{f"p{p}_s": float(v) for p, v in zip((50, 95, 99), percentiles, strict=True)},
            "engine_times": float(np.median([a / b for (a, _), (b, _) in zip(runs, rounds, strict=True)])),
        }
    return {"loop": kind, "amount": amount, "systems": figures}


def report(result: dict[str, Any]) -> None:
    rows = []
    for load in result["loads"]:
        what = f"{load['amount']} clients" if load["loop"] == "closed" else f"{load['amount']} of capacity"
        for name, f in load["systems"].items():
            rows.append([f"{load['loop']}, {what}", name, *f.values()])
    table(["load", "system", "pictures/s", "p50 s", "p95 s", "p99 s", "engine's throughput, times"], rows)
    print("blocks computed:", ", ".join(f"{name} {share:.2f}" for name, share in result["computed_share"].items()))


def arrivals(count: int, rate: float) -> list[float]:
    """Seconds at which requests arrive: the same random draw for everybody."""
    draw = random.Random(0)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + draw.expovariate(rate))
    return times


def _queue(
    load: tuple[str, float], times: list[float], services: dict[str, list[list[float]]], round_: int
) -> tuple[float, list[float]]:
    """(total, latencies) of one server, first come first served, from measured service times."""
    kind, amount = load
    capacity = 1 / np.mean(services["diffusers, own MagCache"][round_])
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


def _static(
    load: tuple[str, float], times: list[float], services: Any, requests: list[Request], round_: int
) -> tuple[float, list[float]]:
    """Static batches: the waiting requests of equal step counts, oldest first, served by a batched call."""
    waiting = list(range(min(int(load[1]), len(requests)))) if load[0] == "closed" else []
    asked = dict.fromkeys(waiting, 0.0)
    upcoming, clock, latencies = len(waiting), 0.0, []
    while waiting:
        steps = requests[waiting[0]][1]
        batch = [i for i in waiting if requests[i][1] == steps]
        clock += sum(times[i] for i in batch) * BATCHED.seconds_share(len(batch))
        for i in batch:
            waiting.remove(i)
            latencies.append(clock - asked[i])
            if upcoming < len(requests):
                waiting.append(upcoming)
                asked[upcoming] = clock
                upcoming += 1
    return clock, latencies


class _Batched:
    """What a batched diffusers call costs per picture, over a single one; measured once per size."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {1: 1.0}

    def seconds_share(self, size: int) -> float:
        if size not in self._shares:
            pipe, defaults = _plain()
            alone, together = [], []
            for _ in range(2):
                alone.append(_timed(lambda: _call(pipe, defaults, (PROMPTS[0], 10, 0))))
                prompts = [PROMPTS[i % len(PROMPTS)] for i in range(size)]
                together.append(_timed(lambda p=prompts: _call(pipe, defaults, (p, 10, 0))))
            self._shares[size] = min(together) / (size * min(alone))
        return self._shares[size]


BATCHED = _Batched()


def peers() -> dict[str, Callable[[Request], float]]:
    """Name: a function that serves one request and gives the seconds it took."""
    from diffusers import MagCacheConfig

    from vllm_omni.diffusion.cache.profile import shipped_profile

    plain, defaults = _plain()
    cached, _ = _plain()
    ratios = list(shipped_profile("demo").ratios)

    def own_cache(request: Request) -> float:
        config = MagCacheConfig(
            threshold=RULE["mag_threshold"],
            max_skip_steps=int(RULE["mag_max_skip_steps"]),
            retention_ratio=RULE["mag_retention_ratio"],
            num_inference_steps=request[1],
            mag_ratios=ratios,
        )
        cached.transformer.enable_cache(config)
        try:
            return _timed(lambda: _call(cached, defaults, request))
        finally:
            cached.transformer.disable_cache()

    serial: dict[str, Callable[[Request], float]] = {
        "diffusers": lambda request: _timed(lambda: _call(plain, defaults, request)),
        "diffusers, own MagCache": own_cache,
    }
    try:
        import cache_dit
    except ImportError:
        return serial
    dit, _ = _plain()
    cache_dit.enable_cache(dit)
    return serial | {"cache-dit, its defaults": lambda request: _timed(lambda: _call(dit, defaults, request))}


def computed_shares(serial: dict[str, Callable[[Request], float]], requests: list[Request]) -> dict[str, float]:
    """Attention calls over those of an uncached run, per peer."""
    from diffusers.models.transformers.transformer_flux import FluxAttention

    counts: dict[str, int] = {}
    for name, run in serial.items():
        count = 0
        own = FluxAttention.forward

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return own(self, *args, **kwargs)  # noqa: B023

        FluxAttention.forward = counted
        try:
            for request in requests:
                run(request)
        finally:
            FluxAttention.forward = own
        counts[name] = count
    return {name: count / counts["diffusers"] for name, count in counts.items()}


class Engine:
    """The engine under test, driven by hand so that arrivals happen when they should."""

    def __init__(self) -> None:
        from vllm_omni import Omni

        self.omni = Omni("demo", max_num_seqs=32, cache_backend="magcache", cache_config=RULE | EQUAL)
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
        began, asked, latencies, sent = time.perf_counter(), {}, [], 0
        while len(latencies) < len(requests):
            passed = time.perf_counter() - began
            while sent < len(came) and came[sent] <= passed:
                asked[self._add(requests[sent])] = came[sent] if not clients else passed
                sent += 1
            if not self.omni.engine.has_unfinished_requests():
                time.sleep(max(0.0, came[sent] - passed))
                continue
            for output in self.omni.engine.step():
                if output.error is not None:
                    raise output.error
                passed = time.perf_counter() - began
                latencies.append(passed - asked.pop(output.request_id))
                if clients and len(came) < len(requests):
                    came.append(passed)
        return time.perf_counter() - began, latencies


def _plain() -> tuple[Any, dict[str, Any]]:
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import generation_defaults, load_pipeline

    return load_pipeline(OmniDiffusionConfig(model="demo")), generation_defaults("demo")


def _call(pipe: Any, defaults: dict[str, Any], request: Any) -> Any:
    prompt, steps, seed = request
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt, **(defaults | {"num_inference_steps": steps}), generator=generator).images


def _timed(job: Callable[[], Any]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
