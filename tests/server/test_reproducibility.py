"""The same request is the same picture: alone, among others, after a restart, and from a file's own metadata."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from closeness import levels_apart
from http_replies import digest, pixels
from http_server import GENERATIONS, Running
from PIL import Image


@pytest.mark.slow
def test_a_seed_makes_the_same_picture_alone_reordered_and_after_a_restart(
    server: Running, proxied: Running, http: httpx.Client
) -> None:
    """Alone, among others, in another order: the same bytes; and after a restart."""
    bodies = [{"prompt": p, "seed": s, "steps": 9, "cache": c} for p, s, c in
              (("cat", 1, "fast"), ("rocket", 2, "off"), ("cat", 3, "balanced"))]  # fmt: skip
    alone = [digest(http.post(GENERATIONS, json=body)) for body in bodies]
    assert len(set(alone)) == 3
    again = [digest(http.post(GENERATIONS, json=body)) for body in reversed(bodies)]
    assert again == alone[::-1]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda body: pixels(http.post(GENERATIONS, json=body)), bodies))
    for body, picture in zip(bodies, together, strict=True):
        assert levels_apart(picture, pixels(http.post(GENERATIONS, json=body))) <= 1
    twin = http.post(GENERATIONS, json={"prompt": "cat", "seed": 0, "n": 2, "steps": 9, "cache": "fast"})
    assert levels_apart(pixels(twin, 1), pixels(http.post(GENERATIONS, json=bodies[0]))) <= 1
    headers = {"Authorization": "Bearer k"}
    restarted = [
        digest(httpx.post(proxied.url + GENERATIONS, json=body, timeout=60, headers=headers)) for body in bodies
    ]
    assert restarted == alone


def test_a_files_metadata_makes_its_picture_again(http: httpx.Client) -> None:
    first = http.post(
        GENERATIONS, json={"prompt": "penguin ☃", "steps": 11, "cache": {"threshold": 0.2}, "guidance_scale": 2.5}
    )
    file = Image.open(io.BytesIO(base64.b64decode(first.json()["data"][0]["b64_json"])))
    assert digest(http.post(GENERATIONS, json=json.loads(file.info["vllm_omni"]))) == digest(first)


@pytest.mark.slow
def test_simultaneous_requests_keep_their_own_data(server: Running, http: httpx.Client) -> None:
    """Pairs with marked prompts and seeds, at once: each gets its own prompt, seed, id and picture."""
    words = ("cat", "rocket", "guitar", "penguin")

    def one(index: int) -> tuple[int, httpx.Response]:
        body = {
            "prompt": f"{words[index % 4]} marker{index}",
            "seed": index,
            "steps": 4,
            "cache": ("off", "fast")[index % 2],
        }
        for _ in range(500):
            reply = http.post(GENERATIONS, json=body, headers={"X-Request-Id": f"marked-{index}"})
            if reply.status_code != 503:
                return index, reply
            time.sleep(0.02)
        raise AssertionError("never served")

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(one, range(80)))
    for index, reply in replies:
        told = reply.json()
        file = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
        own = json.loads(file.info["vllm_omni"])
        assert own["prompt"].endswith(f" marker{index}") and own["seed"] == told["data"][0]["seed"] == index
        assert told["omni"]["request_id"] == reply.headers["x-request-id"] == f"marked-{index}"
        assert (told["omni"]["images"][0]["cache"] == "off") == (index % 2 == 0)
        assert set(re.findall(r"marker(\d+)", file.info["parameters"] + file.info["vllm_omni"])) == {str(index)}
    for index, reply in replies[:6]:
        assert levels_apart(pixels(reply), pixels(one(index)[1])) <= 1
