"""The config file that is shipped for Ray Serve, by Serve's own command: it serves here, to who has the key.

Needs the extra `[ray]`, as `test_ray_serve.py` does.
"""

from __future__ import annotations

import base64
import io
import subprocess
from pathlib import Path

import httpx
import pytest
from closeness import levels_apart
from http_server import GENERATIONS
from paths import ROOT
from PIL import Image
from process_client import ARGS, gone, until
from ray_command import descendants, engine_replicas, serve_run

from vllm_omni import Omni

pytest.importorskip("ray", reason="pip install 'vllm-omni-magcache[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.alone]


async def test_serve_runs_the_file_that_is_shipped(tmp_path: Path) -> None:
    file = ROOT / "deploy" / "ray" / "vllm-omni.yaml"
    body = {"prompt": "penguin", "seed": 3, "steps": 9}
    with serve_run(tmp_path, file, VLLM_API_KEY="secret") as (url, process, _):
        assert httpx.post(url + GENERATIONS, json=body, timeout=60).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        made = httpx.post(url + GENERATIONS, json=body, headers=headers, timeout=120)
        assert made.status_code == 200, made.text
        below = descendants(process.pid)
        assert len(engine_replicas(process.pid)) == 1
        listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True).stdout.splitlines()
        port = url.rpartition(":")[2]
        assert {line.split()[3] for line in listening if line.split()[3].endswith(f":{port}")} == {f"127.0.0.1:{port}"}
    await until(lambda: all(map(gone, below)), 60)
    with Omni(**ARGS) as omni:
        (alone,) = omni.generate("penguin", {"seed": 3, "num_inference_steps": 9}, use_tqdm=False)
    picture = Image.open(io.BytesIO(base64.b64decode(made.json()["data"][0]["b64_json"])))
    assert levels_apart(picture.convert("RGB"), alone.images[0].convert("RGB")) <= 1
