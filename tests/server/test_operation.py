"""What an operator switches on: traces, lines of statistics, defaults of requests."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_server import AUTH, ENGINE_ARGS, GENERATIONS, KEY, Running, serve
from waiting import until

from vllm_omni._vllm_compat import hide_requests
from vllm_omni.entrypoints.cli.serve_flags import refuse_early
from vllm_omni.entrypoints.serve_config import HttpOptions
from vllm_omni.errors import InvalidValueError, OmniError

DEFAULTS = {"num_inference_steps": 5, "width": 48, "height": 32}


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    traces = tmp_path_factory.mktemp("traces") / "made" / "later"
    args = ENGINE_ARGS | {"default_sampling_params": DEFAULTS}
    quiet = {"disable_access_log_for_endpoints": "/metrics, /version"}
    with serve(args, api_key=(KEY,), profiler_dir=traces, log_stats=True, log_stats_interval_s=0.2, **quiet) as running:
        yield running, traces


@pytest.fixture
def http(operated: tuple[Running, Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=operated[0].url, headers=AUTH, timeout=60) as client:
        yield client
        client.post("/stop_profile")


def draw(http: httpx.Client, **more: object) -> dict[str, object]:
    reply = http.post(GENERATIONS, json={"prompt": "red apple"} | more)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_trace_of_n_steps_ends_by_itself(operated: tuple[Running, Path], http: httpx.Client) -> None:
    told = http.post("/start_profile", json={"num_steps": 4}).json()
    assert told["profiling"] and str(operated[1]) not in json.dumps(told)
    assert http.post("/start_profile").json()["error"]["code"] == "conflict"
    assert http.post("/start_profile").status_code == 409
    draw(http, steps=20, cache="off")
    (file,) = operated[1].iterdir()
    names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert any("scaled_dot_product" in name for name in names)
    assert http.post("/stop_profile").status_code == 409  # it has ended
    file.unlink()


def test_a_trace_can_be_stopped_and_another_begun(operated: tuple[Running, Path], http: httpx.Client) -> None:
    assert http.post("/stop_profile").status_code == 409
    for _ in range(2):
        assert http.post("/start_profile").status_code == 200
        draw(http, steps=2)
        assert not http.post("/stop_profile").json()["profiling"]
    assert len(list(operated[1].iterdir())) == 2


@pytest.mark.parametrize("body", [{"num_steps": 0}, {"num_steps": 10**6}, {"num_steps": "5"}, {"output_dir": "/tmp/x"}])
def test_a_wrong_number_of_steps_or_a_folder_of_the_clients_is_refused(http: httpx.Client, body: object) -> None:
    assert http.post("/start_profile", json=body).status_code == 400
    assert http.post("/stop_profile").status_code == 409


def test_without_a_folder_there_are_no_traces(server: Running) -> None:
    reply = httpx.post(server.url + "/start_profile", headers=AUTH)
    assert reply.status_code == 400 and "--profiler-dir" in reply.text


def test_the_operators_defaults_count_unless_a_request_says_otherwise(http: httpx.Client) -> None:
    made = draw(http)
    assert made["size"] == "48x32" and made["omni"]["images"][0]["num_inference_steps"] == 5
    made = draw(http, size="32x32", steps=3)
    assert made["size"] == "32x32" and made["omni"]["images"][0]["num_inference_steps"] == 3
    assert http.get("/v1/models/demo").json()["omni"]["defaults"].items() >= DEFAULTS.items()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"steps": 5}, "steps"),
        ({"seed": 5}, "seed"),
        ({"height": 33}, "must be a multiple of"),
        ({"strength": 0.5}, "is not an argument of FluxPipeline"),
    ],
)
def test_wrong_defaults_are_refused_at_start(given: dict[str, object], told: str) -> None:
    from vllm_omni import Omni

    with pytest.raises(InvalidValueError, match=told):
        Omni("demo", default_sampling_params=given)


@pytest.mark.parametrize("text", ["5", "{", '{"steps": 5}', '{"num_inference_steps": "many"}'])
def test_wrong_defaults_are_refused_on_the_command_line(text: str) -> None:
    with pytest.raises(OmniError, match=r"default.sampling.params|num_inference_steps"):
        refuse_early(["demo", "--port", "0", "--default-sampling-params", text])


def test_addresses_that_are_asked_all_the_time_leave_no_line(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither ours nor uvicorn's."""
    with caplog.at_level(logging.INFO, "vllm_omni.entrypoints.openai.middleware"):
        for path in ("/metrics", "/version?x=1", "/v1/models", "/health"):
            assert http.get(path).status_code == 200
        until(lambda: "/v1/models -> 200" in caplog.text)
    assert not {"/metrics", "/version", "/health"} & set(re.findall(r"/\w+", caplog.text))
    access = logging.getLogger("uvicorn.access")
    hide_requests(HttpOptions(disable_access_log_for_endpoints="/metrics, /version").quiet_paths)
    try:
        lines = [("1.1.1.1:1", "GET", path, "1.1", 200) for path in ("/metrics", "/version", "/v1/models")]
        told = [access.filter(access.makeRecord("", 20, "", 0, "%s - %s %s %s %d", line, None)) for line in lines]
    finally:
        access.removeFilter(access.filters[-1])
    assert list(map(bool, told)) == [False, False, True]


@pytest.mark.slow
def test_statistics_are_logged_while_there_is_work(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        return [record.message for record in caplog.records if "Running:" in record.message]

    def silent() -> bool:
        before = lines()
        time.sleep(0.6)  # three lines, while there is work
        return lines() == before

    with caplog.at_level(logging.INFO, "vllm_omni.entrypoints.openai.metrics"):
        draw(http, steps=100, cache="off", size="128x128")
        until(silent)
    busy = lines()
    assert busy and any("Running: 1 reqs" in line for line in busy) and "Skipped: 0.0%" in busy[0]
