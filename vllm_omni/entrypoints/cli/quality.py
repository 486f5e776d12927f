"""`vllm-omni quality`: settings and peers against the uncached pictures; a table, a JSON file, a chart, a sheet."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.cache.settings import override
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli.engine_flags import (
    MODEL,
    add_engine_flags,
    add_extra,
    add_size,
    call_arguments,
    engine_args,
)
from vllm_omni.entrypoints.cli.flags import command_parser
from vllm_omni.entrypoints.cli.values import writable
from vllm_omni.errors import InvalidValueError
from vllm_omni.model_folder import resolve_model
from vllm_omni.quality.pairs import HELD_OUT_SEED, held_out
from vllm_omni.quality.rows import read_settings

DESCRIPTION = """Prompts are drawn uncached, with each setting, and with fewer steps as the
control. PSNR, SSIM and times go to report.json and report.md, with a Pareto
chart and a sheet of pictures. A run that was interrupted continues."""
EXAMPLES = """
  vllm-omni quality demo                                          the whole scan, 64 pairs at 28 and 50 steps
  vllm-omni quality demo --pairs 8 --steps 28 --settings fast '{"speedup": 3}'
  vllm-omni quality MODEL --prompts prompts.txt --suite peers     other packages' caches as well
"""
LEGEND = """PSNR in dB and SSIM to the uncached picture. NFE: full forwards. Work: multiply-adds in the blocks, in full
forwards. × ideal: uncached work over work. × measured: one picture alone, time uncached over time."""


def add_parser(commands: Any, summary: str) -> argparse.ArgumentParser:
    """Add the command with its options."""
    parser = command_parser(commands, "quality", summary, DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    settings = "presets' names, JSON objects as in a request's `cache`, or files with a JSON list of these"
    scan = " (default: a scan of budgets, other predictors, and the published rule)"
    add("--settings", nargs="+", metavar="SETTING", help=settings + scan)
    add("--suite", choices=("default", "peers"), default="default", help="peers: other packages' caches as well")
    add("--pairs", type=int, default=64, metavar="N", help="captions with a seed each (default: 64)")
    add("--steps", type=int, nargs="+", default=[28, 50], metavar="N", help="numbers of steps (default: 28 50)")
    add_size(parser)
    add_extra(parser)
    add("--prompts", metavar="FILE", help="one prompt a line (default: the model's held-out captions)")
    add("--seed", type=int, metavar="N", help="seed of the first pair, counted up (default: held out)")
    add("--limit-minutes", type=float, metavar="N", help="start nothing new after so long; run again to go on")
    processes = "models side by side (default: one per core, at most 2; 1 on an accelerator)"
    add("--processes", type=int, metavar="N", help=processes)
    add("--out", default="outputs/quality", metavar="FOLDER", help="of the report (default: outputs/quality)")
    add_engine_flags(parser, "dtype", "device")
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw, measure, write and print; the last line is JSON."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it logs a dozen lines for each pipeline
    plan = plan_of(args)

    from vllm_omni.quality import jobs

    print(f"{args.model}: {len(plan.pairs)} pairs, {' and '.join(map(str, plan.steps))} steps", flush=True)
    outcome = jobs.run(plan)
    summary = write(plan, outcome, Path(args.out))
    print(json.dumps(summary))
    return 0


def plan_of(args: argparse.Namespace) -> Any:
    """The options, checked before anything loads. InvalidValueError names what cannot be used."""
    config = OmniDiffusionConfig(**engine_args(args))
    for steps in args.steps:
        if steps < 2:
            raise InvalidValueError("--steps", steps, "must be at least 2")
    if args.processes is not None and args.processes < 1:
        raise InvalidValueError("--processes", args.processes, "must be at least 1")
    settings = None if args.settings is None else tuple(read_settings(args.settings))
    for entry in settings or ():
        override(entry, None)
    seed = HELD_OUT_SEED if args.seed is None else args.seed
    pairs = held_out(args.model, args.pairs, None if args.prompts is None else Path(args.prompts), seed)
    resolve_model(args.model)
    arguments = call_arguments(args)
    folder = writable("--out", Path(args.out) / "work")

    from vllm_omni.quality.bench import BenchModel  # with torch: what is wrong above shows before seconds of imports
    from vllm_omni.quality.jobs import ReportSettings

    return ReportSettings(
        model=BenchModel(args.model, config.dtype, config.device, arguments),
        pairs=tuple(pairs),
        steps=tuple(dict.fromkeys(args.steps)),
        folder=folder,
        settings=settings,
        peers=args.suite == "peers",
        processes=args.processes or _processes(config.device),
        limit_s=None if args.limit_minutes is None else 60 * args.limit_minutes,
    )


def write(plan: Any, outcome: Any, folder: Path) -> dict[str, Any]:
    """Write the files and tables of an outcome; returns what the last line says."""
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


def _processes(device: str | None) -> int:
    """The number of models that run side by side by default."""
    import torch

    accelerated = torch.cuda.is_available() if device is None else not device.startswith("cpu")
    return 1 if accelerated else min(2, len(os.sched_getaffinity(0)))
