"""The first run on a GPU: does everything hold there that was found without one? One command, at most ten minutes.

    .venv/bin/python tools/gpu_check.py                 # the first CUDA device; report in gpu_check.json
    .venv/bin/python tools/gpu_check.py --device cpu    # or cuda:1, or fake (tests/fake_cuda)

Runs the models that ship, and FLUX and Wan with random weights, as large as the device takes in the time. Of each:
isolation (a request in a batch against the same alone), efficiency and tax, batching, memory (also when it is short),
peers, what was predicted without a GPU against what is seen, and parts or blocks in main memory; of the models that
ship also an engine process and, on several devices, ranks. Nothing is downloaded or sent. The report holds
figures, names of packages and of the device, no paths and no names of yours; the last line of the output is JSON, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ |= dict.fromkeys(("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "CACHE_DIT_LOG_LEVEL"), "error")

MODELS = ("demo", "demo-video", "flux", "wan")
STARTED = time.perf_counter()


def main() -> int:
    """Run to the end whatever fails on the way; 1 if a section could not be run."""
    options = _options()
    from gpu_checks.machines import machine

    from vllm_omni.errors import OmniError

    try:
        with machine(options.device) as device:
            report = check(device, options)
    except OmniError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    Path(options.out).write_text(json.dumps(report, indent=1), encoding="utf-8")
    _say(f"the report is in {options.out}")
    summary = {name: report[name] for name in ("check", "device", "dtype", "seconds", "held", "missed", "failed")}
    print(json.dumps(summary), flush=True)
    return 1 if report["failed"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:N, cpu or fake (default: cuda)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the random models")
    parser.add_argument("--size", choices=("full", "half", "small", "tiny"), help="of them (default: what fits)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=10.0, help="choose sizes for this long (default %(default)g)")
    parser.add_argument("--steps", type=int, default=8, help="of a request, at least 6 (default %(default)d)")
    parser.add_argument("--rows", type=int, default=8, help="requests at once (default %(default)d)")
    parser.add_argument("--rounds", type=int, default=3, help="of each timing (default %(default)d)")
    parser.add_argument("--out", default="gpu_check.json", help="the report (default %(default)s)")
    options = parser.parse_args()
    if options.steps < 6 or options.rows < 2 or options.rounds < 1 or options.minutes <= 0:
        parser.error("--steps must be at least 6, --rows 2, --rounds 1, and --minutes more than 0")
    options.device = options.device or "cuda"
    return options


def check(device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    import torch
    from gpu_checks.subjects import subjects

    from vllm_omni.collect_env import report as environment

    dtype = options.dtype or ("bfloat16" if device.kind == "cuda" else "float32")
    _say(f"{device.name}, {dtype}, {device.free() / 2**30:.1f} of {device.total() / 2**30:.1f} GiB free")
    found = environment()
    for problem in found.problems:
        _say(f"problem: {problem}")
    report: dict[str, Any] = {"check": "gpu", "device": device.name, "kind": device.kind, "dtype": dtype}
    report |= {"memory": device.total(), "facts": {**found.facts, "python": platform.python_version()}}
    report |= {"problems": found.problems, "models": {}, "failed": [], "missed": [], "held": 0}
    each = options.minutes * 60 / len(options.models)
    for name, make in subjects(device, getattr(torch, dtype), options.size, options.models, each):
        report["models"][name] = _model(device, name, make, options, report)
    report["seconds"] = round(time.perf_counter() - STARTED, 1)
    return report


def _model(device: Any, name: str, make: Any, options: argparse.Namespace, report: dict[str, Any]) -> dict[str, Any]:
    """All sections of one model; one that fails leaves its traceback, and the next follows."""
    from gpu_checks.places import PLACES
    from gpu_checks.sections import SECTIONS, Bench

    _say(f"{name}: loading")
    try:
        subject = make()
        bench = Bench(device, subject, options.steps, options.rows, options.rounds)
    except Exception as error:  # as below
        return _failure(report, name, "loading", error)
    parameters = sum(p.numel() for p in subject.pipeline.transformer.parameters())
    told: dict[str, Any] = {"model": subject.name, "parameters": parameters, "dtype": str(subject.dtype)}
    for section, measure in (SECTIONS | PLACES).items():
        _say(f"{subject.name}, {parameters / 1e6:.1f} M parameters: {section}")
        began, findings = time.perf_counter(), []
        try:
            for finding in measure(bench):
                findings.append(asdict(finding) | {"value": _rounded(finding.value)})
                _note(report, f"{name}: {section}: {finding.what}", finding)
        except Exception as error:  # a check ends with a report, whatever it meets
            told[section] = [*findings, _failure(report, name, section, error)]
            continue
        told[section] = [*findings, {"what": "seconds", "value": round(time.perf_counter() - began, 2)}]
    try:
        bench.omni.close()
        subject.pipeline.to("meta")
    except Exception as error:  # on a device that is lost, say; the models before it have been measured
        told["end"] = [_failure(report, name, "end", error)]
    return told


def _note(report: dict[str, Any], what: str, finding: Any) -> None:
    value = _rounded(finding.value)
    mark = {True: "ok", False: "MISSED", None: ""}[finding.holds]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    print(f"    {finding.what:<84} {shown:>10}  {finding.wanted:<12} {mark}", flush=True)
    report["held"] += finding.holds is True
    if finding.holds is False:
        report["missed"].append(f"{what}: {shown}, wanted {finding.wanted}")


def _failure(report: dict[str, Any], name: str, section: str, error: Exception) -> dict[str, Any]:
    """Of a traceback the lines of code, without the paths of this machine."""
    frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    said = f"{type(error).__name__}: {error}"
    report["failed"].append(f"{name}: {section}: {said}"[:300])
    print(f"    FAILED: {said}", flush=True)
    return {"what": "failed", "value": said[:2000], "frames": frames[-12:]}


def _rounded(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else str(value)
    return value


def _say(what: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
