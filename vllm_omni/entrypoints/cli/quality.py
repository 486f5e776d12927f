"""`vllm-omni quality`: settings and peers against the uncached pictures; a table, a JSON file, a chart, a sheet."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

LEGEND = """PSNR in dB and SSIM to the uncached picture. NFE: full forwards. Work: multiply-adds in the blocks, in full
forwards. × ideal: uncached work over work. × measured: one picture alone, time uncached over time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; nothing heavy is imported for them."""
    parser.add_argument("model", help="'demo' (shipped with the package), a diffusers model folder, or a hub id")
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help="presets' names, JSON objects as in a request's `cache`, or files with a JSON list of these "
        "(default: a scan of promises, other predictors, and the published rule)",
    )
    parser.add_argument(
        "--suite", choices=("default", "peers"), default="default", help="peers: other packages' caches as well"
    )
    parser.add_argument("--pairs", type=int, default=64, help="captions with a seed each (default 64)")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50], help="step counts (default 28 50)")
    parser.add_argument("--out", default="outputs/quality", help="folder of the report (default outputs/quality)")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: the model's held-out captions)")
    parser.add_argument("--seed", type=int, help="seed of the first pair, counted up (default: held out)")
    parser.add_argument("--limit-minutes", type=float, help="begin nothing new after so long; run again to go on")
    parser.add_argument(
        "--processes", type=int, help="models side by side (default: one per core, at most 2; 1 on cuda)"
    )
    parser.add_argument("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the model's own)")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")


def run(args: argparse.Namespace) -> int:
    """Draw, measure, write and print; the last line is JSON."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it logs a dozen lines for each pipeline
    from vllm_omni.quality import jobs

    plan = plan_of(args)
    print(f"{args.model}: {len(plan.pairs)} pairs, {' and '.join(map(str, plan.steps))} steps", flush=True)
    outcome = jobs.run(plan)
    summary = write(plan, outcome, Path(args.out))
    print(json.dumps(summary))
    return 0


def plan_of(args: argparse.Namespace) -> Any:
    """The options, checked before anything loads. InvalidValueError names what cannot be used."""
    from vllm_omni.diffusion.cache.settings import override
    from vllm_omni.entrypoints.cli.generate import parse_size
    from vllm_omni.errors import InvalidValueError
    from vllm_omni.quality.bench import Model
    from vllm_omni.quality.jobs import Plan
    from vllm_omni.quality.pairs import HELD_OUT_SEED, held_out
    from vllm_omni.quality.rows import read_settings

    for steps in args.steps:
        if steps < 2:
            raise InvalidValueError("--steps", steps, "must be at least 2")
    settings = None if args.settings is None else tuple(read_settings(args.settings))
    for entry in settings or ():
        override(entry, None)
    seed = HELD_OUT_SEED if args.seed is None else args.seed
    pairs = held_out(args.model, args.pairs, None if args.prompts is None else Path(args.prompts), seed)
    width, height = parse_size(args.size)
    given = {"width": width, "height": height, "guidance_scale": args.guidance_scale}
    model = Model(args.model, args.dtype, args.device, {k: v for k, v in given.items() if v is not None})
    return Plan(
        model=model,
        pairs=tuple(pairs),
        steps=tuple(dict.fromkeys(args.steps)),
        folder=Path(args.out) / "work",
        settings=settings,
        peers=args.suite == "peers",
        processes=_processes(args),
        limit_s=None if args.limit_minutes is None else 60 * args.limit_minutes,
    )


def write(plan: Any, outcome: Any, folder: Path) -> dict[str, Any]:
    """Files and tables of an outcome; gives the last line."""
    from vllm_omni.quality import chart, report, sheet

    results = outcome.results
    margins = report.margins(results)
    files = {"report": str(folder / "report.json"), "tables": str(folder / "report.md")}
    if results:
        files["chart"] = str(folder / "pareto.png")
        chart.draw(results, Path(files["chart"]), f"{plan.model.name}, {len(plan.pairs)} pairs, mean over pairs")
    for steps, reference in outcome.references.items():
        files[f"sheet_{steps}"] = str(folder / f"sheet-{steps}.png")
        sheet.draw(sheet.chosen(results, steps), reference, Path(files[f"sheet_{steps}"]))
    summary = {
        "model": plan.model.name,
        "pairs": len(plan.pairs),
        "steps": list(plan.steps),
        "rows": len(results),
        "seconds": round(outcome.seconds, 1),
        "default_preset": report.default_preset(results),
        "margins_missed": sum(not margin.reached for margin in _judged(margins)),
        "margins": len(_judged(margins)),
        "files": files,
    }
    content = summary | {
        "prompts_and_seeds": [[pair.prompt, pair.seed] for pair in plan.pairs],
        "notices": outcome.notices,
        "all_margins": [vars(m) | {"margin_db": m.margin_db, "reached": m.reached} for m in margins],
        "results": report.as_json(results),
    }
    Path(files["report"]).write_text(json.dumps(content, indent=1) + "\n")
    remarks = _remarks(summary["default_preset"], outcome.notices)
    tables = [report.lines(results)] + ([report.margin_lines(_judged(margins))] if margins else [])
    Path(files["tables"]).write_text("\n\n".join([*map(report.markdown, tables), *remarks]) + "\n")
    print("", report.aligned(tables[0]), LEGEND, *map(report.aligned, tables[1:]), "\n".join(remarks), sep="\n\n")
    return summary


def _judged(margins: list[Any]) -> list[Any]:
    """Margins that a bar is about: of the peers only the best at each speed-up."""
    from vllm_omni.quality import report
    from vllm_omni.quality.peers import PEERS

    return [m for m in margins if m.over not in PEERS] + report.best_peers(margins)


def _remarks(preset: Any, notices: list[str]) -> list[str]:
    said = [f"Note: {notice}" for notice in notices]
    if preset is not None:
        limit = f"{preset['limit_db']:g} dB"
        said.insert(0, f"Default: {preset['speedup']:g}×, the largest scanned whose worst pair stays above {limit}.")
    return said


def _processes(args: argparse.Namespace) -> int:
    import torch

    from vllm_omni.errors import InvalidValueError

    if args.processes is not None:
        if args.processes < 1:
            raise InvalidValueError("--processes", args.processes, "must be at least 1")
        return args.processes
    accelerated = torch.cuda.is_available() if args.device is None else not args.device.startswith("cpu")
    return 1 if accelerated else min(2, len(os.sched_getaffinity(0)))
