"""Models that cannot be served: each is said in one line within ten seconds, and no process is left.

`python tests/stress/engine_start_faults.py`; the last line is JSON, exit code 0 if all holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_common as common

from vllm_omni.engine.client import ProcessEngineClient
from vllm_omni.errors import InvalidValueError, ModelLoadError
from vllm_omni.model_folder import ASSETS

LIMIT_S = 10.0


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


FAULTS: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no index": lambda model: (model / "model_index.json").unlink(),
    "index is no JSON": lambda model: (model / "model_index.json").write_text("{"),
    "a part is missing": lambda model: shutil.rmtree(model / "vae"),
    "weights are truncated": lambda model: cut(next((model / "transformer").glob("*.safetensors"))),
    "no such pipeline": lambda model: rewrite(model / "model_index.json", _class_name="NoSuchPipeline"),
    "wrong shape, denoiser": lambda model: rewrite(model / "transformer/config.json", joint_attention_dim=96),
    "wrong shape, decoder": lambda model: rewrite(model / "vae/config.json", latent_channels=7),
    "wrong shape, encoder": lambda model: rewrite(model / "text_encoder_2/config.json", d_model=96),
}


async def told(arguments: dict[str, Any]) -> tuple[float, str]:
    """Seconds until the error, and its one line; empty where something else happened."""
    client = ProcessEngineClient({"cache_backend": "magcache"} | arguments)
    began, line = time.monotonic(), ""
    try:
        await client.start()
    except (ModelLoadError, InvalidValueError) as error:
        line = str(error)
    seconds = time.monotonic() - began
    await client.shutdown()
    return round(seconds, 2), line if "\n" not in line.strip() else ""


async def main() -> int:
    ends: dict[str, tuple[float, str]] = {}
    for name, damage in FAULTS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            shutil.copytree(ASSETS / "demo", model)
            damage(model)
            ends[name] = await told({"model": str(model)})
    ends["no such profile"] = await told({"model": "demo", "cache_config": {"profile": "no-such-profile"}})
    left = len(common.children(os.getpid()))
    good = all(line and seconds < LIMIT_S for seconds, line in ends.values()) and not left
    print(json.dumps({"told": ends, "children_left": left, "ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
