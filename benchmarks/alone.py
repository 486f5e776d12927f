"""One request at a time through a server, and sixteen clients: ways of waiting for threads, against plain diffusers.

Idle OpenMP threads either sleep at once (`passive`), spin for a number of rounds first, or spin as the library does
unless told (`unset`). One server process for each way; plain diffusers has a process of its own, with nothing set. What
is compared runs in turn, forwards and backwards, with a pause in which threads stop spinning. Every round has a prompt
of its own, so that nobody finds its embeddings kept. A server's time has the PNG and HTTP in it, the plain pipeline's
ends with the picture. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "plain diffusers"
START_S, PAUSE_S = 180, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default="red apple")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=15, help="requests alone of each, in turn")
    parser.add_argument("--load-rounds", type=int, default=3, help="rounds of --requests from --clients, in turn")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--waits", nargs="+", default=["default", "passive"], metavar="WAY")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(options)
        return
    with ExitStack() as running:
        sides: dict[str, Any] = {PLAIN: running.enter_context(plain_process(options))}
        sides |= {way: running.enter_context(server(options, way)) for way in options.waits}
        alone: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(options.rounds + 2):
            for name, ask in list(sides.items())[:: 1 if round_ % 2 else -1]:
                time.sleep(PAUSE_S)
                seconds = ask(options.steps, f"{options.prompt} {round_}")
                if round_ > 1:
                    alone[name].append(seconds)
        rates: dict[str, list[float]] = {way: [] for way in options.waits}
        for round_ in range(options.load_rounds):
            for way in options.waits[:: 1 if round_ % 2 else -1]:
                rates[way].append(load(sides[way], options, round_))
    _tell(options, alone, rates)


def _tell(options: argparse.Namespace, alone: dict[str, list[float]], rates: dict[str, list[float]]) -> None:
    base, result = alone[PLAIN], {}
    print(f"{options.model}, {options.steps} steps, {os.cpu_count()} cores")
    print(f"{'':16} {'alone, s':>9} {'/ plain':>8} {'fastest':>8} {f'{options.clients} clients, 1/s':>18}")
    for name, seconds in alone.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds, base, strict=True))
        fastest = min(seconds) / min(base)
        rate = statistics.median(rates[name]) if rates.get(name) else None
        result[name] = {"seconds": statistics.median(seconds), "ratio": ratio, "fastest": fastest, "rate": rate}
        shown = "" if rate is None else f"{rate:18.2f}"
        print(f"{name:16} {result[name]['seconds']:9.3f} {ratio:8.3f} {fastest:8.3f} {shown}")
    print(json.dumps({"benchmark": "alone", "model": options.model, "steps": options.steps, "sides": result}))


def plain(options: argparse.Namespace) -> None:
    """A picture for each line of the input, and its seconds as a line."""
    sys.path.insert(0, str(ROOT))
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.model_folder import generation_defaults

    pipeline = load_pipeline(OmniDiffusionConfig(model=options.model))
    pipeline.set_progress_bar_config(disable=True)
    arguments = generation_defaults(options.model)
    for line in sys.stdin:
        began = time.perf_counter()
        pipeline(**arguments | json.loads(line))
        print(time.perf_counter() - began, flush=True)


@contextmanager
def plain_process(options: argparse.Namespace) -> Iterator[Any]:
    command = [sys.executable, __file__, "--plain", "--model", options.model]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())
    assert process.stdin is not None and process.stdout is not None

    def ask(steps: int, prompt: str) -> float:
        print(json.dumps({"num_inference_steps": steps, "prompt": prompt}), file=process.stdin, flush=True)
        return float(process.stdout.readline())  # type: ignore[union-attr]

    try:
        yield ask
    finally:
        process.kill()


@contextmanager
def server(options: argparse.Namespace, way: str) -> Iterator[Any]:
    """`default` is what the package chooses; a number, rounds that a thread spins."""
    more = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "unset": {"OMP_WAIT_POLICY": "UNSET"}}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm_omni", "serve", options.model, "--omni", "--port", str(port)]
    environment = _environment() | more.get(way, {"GOMP_SPINCOUNT": way})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)

    def ask(steps: int, prompt: str) -> float:
        began = time.perf_counter()
        body = {"prompt": prompt, "steps": steps, "seed": 0, "response_format": "b64_json", "cache": "off"}
        client.post("/v1/images/generations", json=body).raise_for_status()
        return time.perf_counter() - began

    try:
        began = time.monotonic()
        while not _ready(client):
            if process.poll() is not None or time.monotonic() - began > START_S:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield ask
    finally:
        client.close()
        process.terminate()
        process.wait()


def load(ask: Any, options: argparse.Namespace, round_: int) -> float:
    """Pictures per second with so many clients."""
    steps = [options.steps, options.steps // 2, options.steps * 3 // 4]
    with ThreadPoolExecutor(options.clients) as clients:
        began = time.perf_counter()
        asked = range(options.requests)
        list(clients.map(lambda number: ask(steps[number % 3], f"{options.prompt} {round_} {number}"), asked))
        return options.requests / (time.perf_counter() - began)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _environment() -> dict[str, str]:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}


if __name__ == "__main__":
    main()
