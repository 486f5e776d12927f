"""`vllm-omni bench`: load on a running server, ours or any that speaks the OpenAI API; a table, and a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from math import isinf
from pathlib import Path
from typing import Any

from vllm_omni.bench.client import APIS, CHAT, IMAGES, Client, Target
from vllm_omni.bench.load import Body, closed, open_loop
from vllm_omni.bench.stats import PERCENTILES, Sample, Summary, arrivals, mix, summarise, weighted
from vllm_omni.entrypoints.cli.flags import command_parser
from vllm_omni.entrypoints.cli.values import json_object, parse_size, writable_file
from vllm_omni.errors import InvalidValueError, OmniError
from vllm_omni.quality.pairs import read_prompts

PROMPTS = ("red apple", "penguin", "guitar", "octopus", "sunflower", "soccer ball", "rainbow", "sailboat")
DESCRIPTION = """Closed loop: so many clients, each asking again as soon as it is answered. Open
loop: requests arrive at random (Poisson), whether or not others are answered,
and a latency counts from the arrival. A load can mix sizes, steps and caches:
--steps 20:3 50:1 is three requests of 20 steps for one of 50."""
EXAMPLES = """
  vllm-omni bench http://127.0.0.1:8000 --clients 1 4 16 --steps 28
  vllm-omni bench http://127.0.0.1:8000 --rate 0.5 1 2 --requests 100 --deadline 10
  vllm-omni bench http://127.0.0.1:8000 --clients 8 --steps 20:3 50 --size 512x512 1024x1024 --cache off fast
  vllm-omni bench http://peer:8091 --api chat --clients 4 --extra '{"extra_body": {"num_inference_steps": 28}}'
"""


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Add the command with its options."""
    parser = command_parser(commands, "bench", summary, DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("url", metavar="URL", help="the server, e.g. http://127.0.0.1:8000")
    add("--api", choices=tuple(APIS), default=IMAGES, help="which API is asked (default: images)")
    add("--model", help="the model's name (default: the first that the server lists)")
    add("--api-key", metavar="KEY", help="default: the environment's VLLM_API_KEY or OPENAI_API_KEY")
    load = parser.add_argument_group("load", "One load after another, in the order given; closed loops first.")
    add = load.add_argument
    add("--clients", type=int, nargs="+", default=[], metavar="N", help="clients of a closed loop (default: 8)")
    add(
        "--rate",
        type=float,
        nargs="+",
        default=[],
        metavar="N",
        help="arrivals a second of an open loop; inf: all at once",
    )
    add("--requests", type=int, default=64, metavar="N", help="requests of each load (default: 64)")
    add("--warmup", type=int, default=2, metavar="N", help="requests before the first load, not counted (default: 2)")
    add("--deadline", type=float, metavar="SECONDS", help="count as goodput what is answered in time")
    add(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="give a request up after so long (default: 600)"
    )
    asked = parser.add_argument_group("requests", "What is asked for; several values, with weights, make a mix.")
    add = asked.add_argument
    add("--prompts", metavar="FILE", help="one prompt a line (default: a few short ones)")
    add("--size", nargs="+", default=[], metavar="WxH[:N]", help="width and height (default: the server's own)")
    add("--steps", nargs="+", default=[], metavar="N[:N]", help="sent as num_inference_steps (default: not sent)")
    add("--cache", nargs="+", default=[], metavar="NAME[:N]", help="sent as cache: a preset or off (default: not sent)")
    add("--n", type=int, default=1, metavar="N", help="pictures of a request (default: 1)")
    add("--extra", metavar="JSON", help="more fields of every request")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the mix and the arrivals; with --steps or --cache, request i asks for seed + i (default: 0)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the summaries and every request to a JSON file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Warm up, run the loads, print; 1 if every request of a load failed. Ctrl-C ends the loads, not the table."""
    target = _target(args)
    _check(args)
    model = args.model or _model(target)
    bodies = make_bodies(args, model)
    if args.warmup:
        closed(target, bodies[: args.warmup], min(args.warmup, len(bodies)))
    loads: list[tuple[str, float]] = [("closed", clients) for clients in args.clients or ([] if args.rate else [8])]
    loads += [("open", rate) for rate in args.rate]
    done: list[tuple[str, float, Summary, list[Sample]]] = []
    whole = all(_run(load, target, bodies, args, done) for load in loads)
    print(_table([(_name(kind, amount), summary) for kind, amount, summary, _ in done]))
    line = {"benchmark": "bench", "url": args.url, "api": args.api, "model": model, "requests": args.requests}
    line["loads"] = [
        {"loop": kind, "amount": str(amount) if isinf(amount) else amount} | summary.as_json()
        for kind, amount, summary, _ in done
    ]
    if args.out:
        samples = [[vars(sample) | {"latency_s": sample.latency_s} for sample in found] for *_, found in done]
        Path(args.out).write_text(json.dumps(line | {"samples": samples}, indent=1) + "\n")
    print(json.dumps(line))
    if not whole:
        raise KeyboardInterrupt
    return 0 if all(summary.succeeded for _, _, summary, _ in done) else 1


def _run(
    load: tuple[str, float],
    target: Target,
    bodies: Sequence[Body],
    args: argparse.Namespace,
    done: list[tuple[str, float, Summary, list[Sample]]],
) -> bool:
    """Add to `done` what came of a load, or what had come of it until Ctrl-C; whether it ended by itself."""
    from tqdm import tqdm

    (kind, amount), samples, whole = load, list[Sample](), True
    with tqdm(total=len(bodies), desc=_name(kind, amount), unit="request", disable=None) as bar:

        def note(sample: Sample) -> None:
            samples.append(sample)
            bar.update()

        try:
            if kind == "closed":
                closed(target, bodies, int(amount), note)
            else:
                open_loop(target, bodies, arrivals(len(bodies), amount, args.seed), note)
        except KeyboardInterrupt:
            whole = False
    samples = list(samples)  # more may come
    done.append((kind, amount, summarise(samples, args.deadline), samples))
    return whole


def make_bodies(args: argparse.Namespace, model: str) -> list[Body]:
    """The requests of a load: prompts in turn, and the mix of sizes, steps and caches. The same for every load."""
    count = args.requests
    prompts = list(PROMPTS) if args.prompts is None else read_prompts(Path(args.prompts))
    sizes = _mixed("--size", args.size, count, args.seed)
    steps = _mixed("--steps", args.steps, count, args.seed + 1)
    caches = _mixed("--cache", args.cache, count, args.seed + 2)
    extra = {} if args.extra is None else json_object("--extra", args.extra)
    bodies: list[Body] = []
    for i in range(count):
        prompt = prompts[i % len(prompts)]
        asked = {"messages": [{"role": "user", "content": prompt}]} if args.api == CHAT else {"prompt": prompt}
        body: Body = {"model": model, **asked}
        if args.n > 1:
            body["n"] = args.n
        if args.api == IMAGES:
            body["response_format"] = "b64_json"
        given = {
            "size": sizes[i],
            "num_inference_steps": None if steps[i] is None else _whole("--steps", steps[i]),
            "cache": caches[i],
            "seed": args.seed + i if args.steps or args.cache else None,
        }
        bodies.append(body | {name: value for name, value in given.items() if value is not None} | extra)
    return bodies


def _mixed(flag: str, texts: Sequence[str], count: int, seed: int) -> list[Any]:
    """One value for each request; None for each if none is given."""
    if not texts:
        return [None] * count
    try:
        options = [weighted(text) for text in texts]
    except ValueError as error:
        raise InvalidValueError(flag, str(error), "must be VALUE or VALUE:WEIGHT, with a weight above 0") from None
    if flag == "--size":
        for size, _ in options:
            parse_size(size)
    return mix(options, count, seed)


def _whole(flag: str, text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10_000:
        raise InvalidValueError(flag, text, "must be a whole number from 1 to 10000")
    return int(text)


def _target(args: argparse.Namespace) -> Target:
    key = args.api_key or os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY") or None
    try:
        return Target(args.url, args.api, key, args.timeout)
    except ValueError as error:
        raise InvalidValueError("URL", args.url, str(error)) from None


def _check(args: argparse.Namespace) -> None:
    """InvalidValueError for a number that makes no load, or a file that cannot be written."""
    counted = {"--requests": [args.requests], "--clients": args.clients, "--rate": args.rate, "--n": [args.n]}
    counted |= {"--timeout": [args.timeout], "--deadline": [args.deadline or 1.0]}
    for flag, values in counted.items():
        for value in values:
            if not value > 0:
                raise InvalidValueError(flag, value, "must be above 0")
    if args.warmup < 0:
        raise InvalidValueError("--warmup", args.warmup, "must be 0 or more")
    if args.out:
        writable_file("--out", Path(args.out))


def _model(target: Target) -> str:
    client = Client(target)
    try:
        return client.model()
    except (OSError, ValueError) as error:
        raise OmniError(
            f"{target.url}/v1/models: {error}; is the server up? --model names a model it need not list"
        ) from None
    finally:
        client.close()


def _name(kind: str, amount: float) -> str:
    return f"{amount:g} clients" if kind == "closed" else f"{amount:g} a second"


def _table(rows: Sequence[tuple[str, Summary]]) -> str:
    """Aligned columns; errors by kind below."""
    head = [
        "load",
        "succeeded",
        "pictures/s",
        "mean s",
        *(f"p{q} s" for q in PERCENTILES),
        "max s",
        "goodput/s",
        "in time",
    ]
    lines = [head]
    for name, s in rows:
        times = [s.mean_s, *(s.percentiles_s or dict.fromkeys(PERCENTILES)).values(), s.max_s]
        cells = ["-" if value is None else f"{value:.3f}" for value in times]
        share = f"{100 * s.goodput_share:.1f} %"
        lines.append(
            [name, f"{s.succeeded}/{s.requests}", f"{s.pictures_per_s:.3f}", *cells, f"{s.goodput_per_s:.3f}", share]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for name, s in rows:
        shown += [f"{name}: {count} x {error}" for error, count in s.errors.items()]
    return "\n".join(shown)
