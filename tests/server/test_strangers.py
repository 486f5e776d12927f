"""What strangers do by accident: numbers beyond sense, a retry before the connection is known to be gone, SIGHUP."""

from __future__ import annotations

import http.client
import json
import math
import signal
from functools import partial
from operator import contains
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from http_replies import envelope
from http_server import AUTH, GENERATIONS, KEY, Running, command
from lanes import full_set
from waiting import until

from vllm_omni.diffusion.cache.settings import DiffusionCacheConfig
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

NAN, INF = math.nan, math.inf
BEYOND: list[dict[str, Any]] = [
    {"mag_ratios": [1e308] * 50}, {"mag_ratios": [1e-308] * 50}, {"mag_ratios": [5e-324] * 50},
    {"mag_ratios": [1e308, 1e-308] * 25}, {"speedup": 1e308}, {"seconds": 1e308}, {"nfe": 2**62},
    {"backend": "teacache", "coefficients": [1e308] * 5}, {"backend": "teacache", "coefficients": [1e308, -1e308, 1.0]},
]  # fmt: skip


@pytest.mark.parametrize("cache", BEYOND, ids=lambda cache: str(cache)[:40])
def test_a_number_beyond_sense_is_a_400(server: Running, cache: dict[str, Any]) -> None:
    reply = httpx.post(server.url + GENERATIONS, headers=AUTH, timeout=60,
                       json={"prompt": "x", "size": "64x64", "steps": 2, "cache": cache})  # fmt: skip
    assert reply.status_code == 400, reply.text
    assert next(name for name in cache if name != "backend") in reply.json()["error"]["message"]


def test_coefficients_and_noise_levels_are_finite() -> None:
    for values in ([NAN, 1.0], [INF], [1e308], [-1e10]):
        with pytest.raises(InvalidValueError, match="coefficients"):
            DiffusionCacheConfig(coefficients=values)
        for name in ("sigmas", "timesteps"):
            with pytest.raises(InvalidValueError, match=name):
                OmniDiffusionSamplingParams(**{name: values if values != [-1e10] else [1e7]})


def test_noise_levels_count_as_steps() -> None:
    with Omni("demo", max_inference_steps=50) as omni:
        for more in ({}, {"num_inference_steps": 2}):
            asked = OmniDiffusionSamplingParams(sigmas=[1.0] * 2000, **more)
            (output,) = omni.generate("x", asked, use_tqdm=False)
            assert isinstance(output.error, InvalidValueError) and "2000 values" in str(output.error)


def test_an_id_is_free_as_soon_as_its_client_has_left(server: Running) -> None:
    place, body = urlsplit(server.url), json.dumps({"prompt": "x", "size": "128x128", "steps": 60})
    for i in range(8):
        name = f"retry-{i}"
        headers = AUTH | {"Content-Type": "application/json", "X-Request-Id": name}
        connection = http.client.HTTPConnection(place.hostname or "", place.port)
        connection.request("POST", GENERATIONS, body, headers)
        until(partial(contains, server.app.state.omni.jobs.running, name), pause_s=0.002)
        connection.close()
        reply = httpx.post(server.url + GENERATIONS, headers=AUTH | {"X-Request-Id": name}, timeout=60,
                           json={"prompt": "x", "size": "64x64", "steps": 1})  # fmt: skip
        assert reply.status_code == 200 and reply.headers["x-request-id"] == name, reply.text


def test_an_id_in_use_is_refused(server: Running) -> None:
    fields = {"prompt": "x", "size": "128x128", "steps": 200, "cache": "off", "stream": True}
    headers = AUTH | {"X-Request-Id": "used"}
    with httpx.stream("POST", server.url + GENERATIONS, json=fields, headers=headers, timeout=60):
        again = httpx.post(server.url + GENERATIONS, json={"prompt": "x"}, headers=headers, timeout=60)
    envelope(again, 400, "invalid_value", "X-Request-Id")
    server.idle()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGTERM, marks=full_set)])
def test_a_hangup_drains_like_the_other_signal(tmp_path: Path, number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup a server ignores it, as it should
    with command(tmp_path, "demo", "--api-key", KEY) as server:
        place = urlsplit(server.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        connection.request("POST", GENERATIONS, json.dumps({"prompt": "x", "size": "128x128", "steps": 100}),
                           AUTH | {"Content-Type": "application/json"})  # fmt: skip
        running = 'vllm:num_requests_running{model_name="demo"} 1.0'
        until(lambda: running in httpx.get(server.url + "/metrics", headers=AUTH).text)
        server.process.send_signal(number)
        assert connection.getresponse().status == 200
        assert server.process.wait(120) == 0
