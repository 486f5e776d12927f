"""Several engines behind one HTTP server: what clients and operators see of them, also when one dies."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from closeness import levels_apart
from http_server import AUTH, GENERATIONS, KEY, Running, command, serve
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vllm_omni.engine.interface import ReplicaStats
from vllm_omni.entrypoints.serve_config import Limits, ServeConfig
from vllm_omni.errors import InvalidValueError
from vllm_omni.replicas.pool import ReplicaPool


@pytest.fixture(scope="module")
def pooled() -> Iterator[Running]:
    with serve(api_key=(KEY,), data_parallel_size=2) as running:
        yield running


@pytest.fixture
def http(pooled: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pooled.url, headers=AUTH, timeout=120) as client:
        yield client


def replicas(http: httpx.Client) -> list[dict[str, object]]:
    return http.get("/v1/omni/replicas").json()["data"]


def pixels(reply: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))


def by_replica(http: httpx.Client) -> dict[str, list[float]]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {family.name: [sample.value for sample in family.samples] for family in families if "replica" in family.name}


@pytest.mark.slow
def test_both_engines_answer_and_a_killed_one_loses_nothing(pooled: Running, http: httpx.Client) -> None:
    pool: ReplicaPool = pooled.engine  # type: ignore[assignment]
    assert [one["state"] for one in replicas(http)] == ["ready", "ready"]

    def ask(seed: int) -> httpx.Response:
        body = {"prompt": "penguin", "steps": 190, "seed": seed, "cache": "off"}
        return httpx.post(pooled.url + GENERATIONS, json=body, headers=AUTH, timeout=120)

    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(ask, seed) for seed in range(8)]
        until = time.monotonic() + 60
        while int(str(replicas(http)[0]["running"])) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(pool.replicas[0].engine._engine.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        assert http.get("/health").status_code == http.get("/health/ready").status_code == 200
        assert {str(one["state"]) for one in replicas(http)} <= {"ready", "starting"}
        made = [answer.result() for answer in answers]
    assert [reply.status_code for reply in made] == [200] * 8
    assert all(levels_apart(pixels(ask(seed).json()), pixels(made[seed].json())) <= 1 for seed in (0, 5))
    told = replicas(http)
    assert sum(int(str(one["answered"])) for one in told) == 10 and int(str(told[0]["lost"])) > 0
    seen = by_replica(http)
    assert seen["vllm_omni:replica_lost_requests"] == [told[0]["lost"], 0.0]
    assert sum(seen["vllm_omni:replica_requests"]) == 10 and seen["vllm_omni:replica_restarts"] == [1.0, 0.0]
    assert {"vllm_omni:replica_ready", "vllm_omni:replica_queued_cost_seconds"} <= seen.keys()
    assert 'finished_reason="finished",model_name="demo"} 10.0' in http.get("/metrics").text


def test_sleep_is_for_all(http: httpx.Client) -> None:
    until = time.monotonic() + 90
    while any(one["state"] != "ready" for one in replicas(http)) and time.monotonic() < until:
        time.sleep(0.1)
    assert http.post("/sleep").json()["is_sleeping"] and http.get("/is_sleeping").json()["level"] == 1
    assert {one["state"] for one in replicas(http)} == {"asleep"} and http.get("/health/ready").status_code == 503
    refused = http.post(GENERATIONS, json={"prompt": "x"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "asleep"
    assert not http.post("/wake_up").json()["is_sleeping"]
    assert http.post(GENERATIONS, json={"prompt": "x", "steps": 2}).status_code == 200


def test_a_single_engine_is_a_list_of_one_without_metrics_of_replicas(server: Running) -> None:
    with httpx.Client(base_url=server.url, headers=AUTH) as http:
        (one,) = replicas(http)
        assert one["state"] == "ready" and one.keys() == {field for field in vars(ReplicaStats("0", "ready"))}
        assert not by_replica(http)


def test_a_single_engine_that_will_not_start_any_more_is_dead(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with httpx.Client(base_url=server.url, headers=AUTH) as http:
        monkeypatch.setattr(server.engine, "_draining", True)
        assert replicas(http)[0]["state"] == "ready" and http.get("/health/ready").status_code == 503
        monkeypatch.setattr(server.engine, "_dead", "it died too often")
        assert replicas(http)[0]["state"] == "dead"


def test_places_are_those_of_all_engines() -> None:
    args = {"model": "demo", "max_num_seqs": 4}
    config = ServeConfig(engine_args=args, data_parallel_size=3, limits=Limits(max_queued_requests=5))
    assert config.places == 17
    with pytest.raises(InvalidValueError, match="data_parallel_size"):
        ServeConfig(engine_args=args, data_parallel_size=0)


@pytest.mark.slow
def test_the_command_starts_several_engines_and_leaves_none(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="tools/setup.sh installs it")
    words = ("demo", "--data-parallel-size", "2", "--log-json", "--max-num-seqs", "2")
    with command(tmp_path, *words) as server:
        told = httpx.get(server.url + "/v1/omni/replicas").json()["data"]
        assert [one["state"] for one in told] == ["ready", "ready"]
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        engines = [pid for pid, line in lines.items() if "vllm_omni.engine.process" in line]
        assert len(engines) == 2
        assert httpx.post(server.url + GENERATIONS, json={"prompt": "x", "steps": 2}, timeout=60).status_code == 200
    assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]
    logged = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    ready = sorted(line["message"] for line in logged if "is ready after" in line["message"])
    assert [line.split(" is ready")[0] for line in ready] == ["replica 0", "replica 1"]
