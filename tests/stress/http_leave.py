"""Clients that leave at every point of their request, on every route: the server drops it within one step.

PYTHONPATH=.:tests/helpers python tests/stress/http_leave.py [--count 50] [--kinds images edits videos]

The points: while queued, in the text encoder, at each step in turn, in the VAE, while the file is encoded, and in the
middle of a stream. Each part is made some hundredths of a second slower, so that it can be met; what is counted is
whether it was. Videos outlive their connection: it is reset, and the job is deleted at once. The last line is JSON,
exit code 0 if all holds.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import http_server
from leaving import Left, leaving
from PIL import Image
from pipelines import tiny_wan

MOST_STEPS = 1
LIMIT_S = 0.5


def model_of(kind: str, folder: Path) -> str:
    if kind == "edits":
        return str(http_server.repaint_folder(folder))
    if kind == "videos":
        tiny_wan().save_pretrained(folder / "wan")
        own = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4}
        (folder / "wan/generation_config.json").write_text(json.dumps(own))
        return str(folder / "wan")
    return "demo"


def main(kinds: list[str], count: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    came: dict[str, Left] = {}
    logging.disable(logging.WARNING)
    began = time.monotonic()
    for kind in kinds:
        with (
            tempfile.TemporaryDirectory() as folder,
            leaving(kind, model_of(kind, Path(folder)), buffer.getvalue(), url) as clients,
        ):
            for name, route in clients.routes.items():
                for point in route.points:
                    left = came[f"{kind}: {name}, {point}"] = clients.run(route, point, count)
                    print(f"{kind}: {name}, {point}: {left}", flush=True)
    bad = [
        name
        for name, left in came.items()
        if left.count < count or left.most_steps_after > MOST_STEPS or left.longest_s >= LIMIT_S or left.wrong
    ]
    return {
        "left": sum(left.count for left in came.values()),
        "points": len(came),
        "each": count,
        "missed": sum(left.missed for left in came.values()),
        "most_steps_after": max(left.most_steps_after for left in came.values()),
        "longest_s": round(max(left.longest_s for left in came.values()), 3),
        "bad": bad,
        "seconds": round(time.monotonic() - began),
        "ok": not bad,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", default=["images", "edits", "videos"])
    args = parser.parse_args()
    told = main(args.kinds, args.count)
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)
