"""Schemathesis against the real server and engine: valid and invalid requests of every route, and chains of requests.

Three servers, one after another: the demo model, the same weights repainting pictures (`/v1/images/edits`), and a tiny
video model (`/v1/videos`), each with small limits, so that a valid case takes no second. All that holds: no 5xx but 503
and 504, every body as `/openapi.json` describes it, no address, path or traceback in an error, and each within
`--limit` seconds. Prints what was asked, and JSON on the last line; exit code 0 where all holds.

PYTHONPATH=.:tests/helpers python tests/stress/http_fuzz.py --cases 500
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzzing import MODES, Fuzz
from http_server import ENGINE_ARGS, repaint_folder, serve, video_folder

SMALL: dict[str, Any] = {"max_steps": 4, "max_n": 2, "max_pixels": 64 * 64, "max_frames": 9, "request_timeout_s": 0.9,
                         "max_body_mb": 1, "ui": True}  # fmt: skip
SERVERS = {"demo": "", "edits": "/v1/images/edits", "videos": "/v1/videos"}  # and what is asked of each


def engine_args(name: str, folder: Path) -> dict[str, Any]:
    if name == "demo":
        return ENGINE_ARGS
    model = repaint_folder(folder) if name == "edits" else video_folder(folder)
    return {"model": str(model), "max_num_seqs": 4}


def fuzz(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All that is asked of one server, as figures."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serve(engine_args(name, Path(folder)), **SMALL) as server:
        one = Fuzz(server.url, limit_s=args.limit)
        for mode in MODES:
            one.operations(mode, args.cases, args.only or SERVERS[name], args.seed)
        if args.chains and not args.only:
            one.sequences(args.chains, number=args.seed)
        stats = server.do(server.engine.stats())
    for operation, seen in one.statuses.items():
        print(f"{name:7}{operation:55}", dict(sorted(seen.items())), flush=True)
    for failure in one.failures:
        print(f"FAILED {name}: {failure}", flush=True)
    total = sum(one.statuses.values(), Counter[int]())
    meant = sum((seen for op, seen in one.statuses.items() if op.endswith("meant")), Counter[int]())
    return {"requests": total.total(), "statuses": dict(sorted(total.items())), "failures": len(one.failures),
            "meant_200": meant[200], "meant": meant.total(), "pictures": stats.requests.get("finished", 0),
            "over_limit": one.over_limit, "slowest_s": round(one.slowest[0], 3), "slowest": one.slowest[1],
            "restarts": stats.restarts, "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="of each operation and kind of case (500)")
    parser.add_argument("--chains", type=int, default=100, help="chains of 8 requests per server (100; 0: none)")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds that one reply may take (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    parser.add_argument("--server", choices=SERVERS, action="append", help="these alone; again for several")
    parser.add_argument("--only", default="", metavar="REGEX", help="operations that match, e.g. 'POST /v1/chat'")
    args = parser.parse_args()
    logging.getLogger("vllm_omni").setLevel(logging.ERROR)
    told = {name: fuzz(name, args) for name in args.server or SERVERS}
    holds = all(not one["failures"] and not one["over_limit"] and not one["restarts"] for one in told.values())
    print(json.dumps({"cases": args.cases, "seed": args.seed, "holds": holds, "servers": told}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
