"""The server on Ray Serve, by its real command: the same API, a replica that is killed, streams, cancellation, scaling.

Needs the extra `[ray]`, which is not among what the tests install: 300 MB. `pip install 'ray[serve]'` beside it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from closeness import levels_apart
from http_server import GENERATIONS
from PIL import Image
from process_client import ARGS
from ray_command import descendants, engine_replicas, ray_command

from vllm_omni import Omni

pytest.importorskip("ray", reason="pip install 'vllm-omni-magcache[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    with ray_command(tmp_path_factory.mktemp("ray"), "--replicas", "2", "--max-num-seqs", "4") as running:
        yield running


@pytest.fixture
def http(served: tuple[str, subprocess.Popen[bytes], Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served[0], timeout=120) as client:
        yield client


def replicas(http: httpx.Client) -> list[dict[str, Any]]:
    return http.get("/v1/omni/replicas").json()["data"]


def eventually(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def picture(reply: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))


def test_the_api_is_the_same_and_listens_on_loopback_alone(
    served: tuple[str, subprocess.Popen[bytes], Path], http: httpx.Client
) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == "demo"
    made = http.post(GENERATIONS, json={"prompt": "penguin", "seed": 3, "steps": 9})
    assert made.status_code == 200, made.text
    with Omni(**ARGS) as omni:
        (alone,) = omni.generate("penguin", {"seed": 3, "num_inference_steps": 9}, use_tqdm=False)
    assert levels_apart(picture(made.json()).convert("RGB"), alone.images[0].convert("RGB")) <= 1
    refused = http.post(GENERATIONS, json={"prompt": "x", "sizes": "64x64"})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unknown_parameter"
    assert [one["state"] for one in replicas(http)] == ["ready", "ready"]
    own = {served[1].pid, *descendants(served[1].pid)}
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout.splitlines()
    ours = [line.split()[3] for line in listening if any(f"pid={pid}," in line for pid in own)]
    assert ours and all(address.startswith(("127.", "[::1]", "[::ffff:127.")) for address in ours), ours
    home = served[2].parent / "home"
    assert not [file for file in home.rglob("*") if "token" in file.name.lower()]


def test_streams_come_through_and_a_client_that_leaves_ends_its_request(http: httpx.Client) -> None:
    body = {"prompt": "penguin", "steps": 30, "stream": True, "partial_images": 2, "cache": "off"}
    with http.stream("POST", GENERATIONS, json=body) as stream:
        kinds = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    for stream_too in (True, False):
        long = {"prompt": "x", "steps": 200, "cache": "off", "stream": stream_too}
        with pytest.raises(httpx.ReadTimeout):
            if stream_too:
                with http.stream("POST", GENERATIONS, json=long | {"stream_progress": True}, timeout=1.0) as stream:
                    time.sleep(1.0)
                    raise httpx.ReadTimeout("left")
            http.post(GENERATIONS, json=long, timeout=1.0)
        eventually(lambda: not any(one["running"] or one["waiting"] for one in replicas(http)), 15)


def test_an_action_is_done_to_all(http: httpx.Client) -> None:
    assert http.post("/sleep").json()["is_sleeping"]
    eventually(lambda: {one["state"] for one in replicas(http)} == {"asleep"}, 5)
    assert http.post(GENERATIONS, json={"prompt": "x"}).json()["error"]["code"] == "asleep"
    assert not http.post("/wake_up").json()["is_sleeping"]
    assert http.post(GENERATIONS, json={"prompt": "x", "steps": 2}).status_code == 200


def test_a_replica_that_is_killed_loses_nothing_and_another_one_comes(
    served: tuple[str, subprocess.Popen[bytes], Path], http: httpx.Client
) -> None:
    before = {one["name"] for one in replicas(http)}
    finished = finished_of(http)

    def ask(seed: int) -> httpx.Response:
        body = {"prompt": "penguin", "steps": 80, "seed": seed, "cache": "off"}
        return httpx.post(served[0] + GENERATIONS, json=body, timeout=120)

    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, seed) for seed in range(8)]
        eventually(lambda: sum(one["running"] for one in replicas(http)) == 8)
        victims = engine_replicas(served[1].pid)
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        made = [answer.result() for answer in answers]
    assert [reply.status_code for reply in made] == [200] * 8, [reply.text[:200] for reply in made]
    assert finished_of(http) - finished == 8
    eventually(lambda: len([one for one in replicas(http) if one["state"] == "ready"]) == 2, 120)
    assert len({one["name"] for one in replicas(http)} - before) == 1
    assert levels_apart(picture(made[5].json()), picture(ask(5).json())) <= 1


def finished_of(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "request_success_total" in line and '"finished"' in line)


def test_replicas_come_with_the_work_and_go_without_an_error(tmp_path: Path) -> None:
    words = ("--replicas", "1", "--max-replicas", "2", "--target-queued", "4", "--downscale-delay", "8")
    with ray_command(tmp_path, *words, "--max-num-seqs", "4") as (url, _, _), httpx.Client(base_url=url) as http:
        assert [one["state"] for one in replicas(http)] == ["ready"]
        counts: list[int] = []
        body = {"prompt": "penguin", "steps": 60, "cache": "off"}
        with ThreadPoolExecutor(16) as clients:
            until = time.monotonic() + 150
            statuses = []

            def client() -> None:
                while time.monotonic() < until and 2 not in counts[-20:]:
                    statuses.append(httpx.post(url + GENERATIONS, json=body, timeout=120).status_code)
                statuses.append(httpx.post(url + GENERATIONS, json=body, timeout=120).status_code)

            running = [clients.submit(client) for _ in range(16)]
            while not all(one.done() for one in running):
                counts.append(len([one for one in replicas(http) if one["state"] == "ready"]))
                time.sleep(0.25)
        assert max(counts) == 2, counts
        few = {"prompt": "x", "steps": 2}
        until = time.monotonic() + 90
        while len(replicas(http)) == 2 and time.monotonic() < until:
            statuses.append(http.post(GENERATIONS, json=few, timeout=60).status_code)
        assert len(replicas(http)) == 1
        statuses.append(http.post(GENERATIONS, json=few, timeout=60).status_code)
        assert set(statuses) == {200} and len(statuses) > 32, json.dumps(statuses)
