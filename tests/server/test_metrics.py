"""What the server reports: metrics, usage, health, models and the cache."""

from __future__ import annotations

import json

import httpx
import pytest
from http_server import GENERATIONS, LONG, Running
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

from vllm_omni.entrypoints.openai.middleware import OPEN_PATHS


def samples(http: httpx.Client) -> dict[tuple[str, str], float]:
    text = http.get("/metrics").text
    return {(s.name, json.dumps(s.labels)): s.value for f in text_string_to_metric_families(text) for s in f.samples}


GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm_omni:cache_state_bytes",
          "vllm_omni:queued_cost_seconds")  # fmt: skip
Samples = dict[tuple[str, str], float]


def ended(before: Samples, after: Samples) -> dict[str, float]:
    """How many requests ended in which way between the two."""
    return {json.loads(label)["finished_reason"]: value - before.get((name, label), 0)
            for (name, label), value in after.items() if name == "vllm:request_success_total"}  # fmt: skip


def settled(before: Samples, after: Samples) -> Samples | None:
    """Those after five requests, once nothing is left of them."""
    left = any(value for (name, _), value in after.items() if name in GAUGES)
    return after if not left and sum(ended(before, after).values()) == 5 else None


def test_metrics_add_up(server: Running, http: httpx.Client) -> None:
    server.idle()
    before = samples(http)
    for body in ({"steps": 3}, {"steps": 3, "n": 2}, LONG | {"timeout_s": 0.2}, {"steps": 0}):
        http.post(GENERATIONS, json={"prompt": "x"} | body)
    with pytest.raises(httpx.ReadTimeout):
        http.post(GENERATIONS, json={"prompt": "x"} | LONG, timeout=0.3)
    after = until(lambda: settled(before, samples(http)))
    counters = [key for key in before if key[0].endswith(("_total", "_bucket", "_count", "_sum"))]
    assert len(counters) > 30 and all(after[key] >= before[key] for key in counters)
    outcomes = ended(before, after)
    assert outcomes == {"finished": 3, "expired": 1, "aborted": 1} | {
        k: 0 for k in outcomes.keys() - {"finished", "expired", "aborted"}
    }
    for name in GAUGES:
        assert [value for (key, _), value in after.items() if key == name] == [0], name
    assert len(after) < 200


def test_usage_counts_what_the_text_encoder_reads(http: httpx.Client) -> None:
    def tokens(prompt: str) -> int:
        return http.post(GENERATIONS, json={"prompt": prompt, "steps": 1}).json()["usage"]["input_tokens_details"][
            "text_tokens"
        ]

    assert tokens("cat") < tokens("cat cat cat") < tokens("cat " * 200) == tokens("cat " * 400)  # it reads no further


def test_health_models_cache_and_metrics_answer(http: httpx.Client) -> None:
    assert http.post(GENERATIONS, json={"prompt": "x", "steps": 2}).status_code == 200
    assert [http.get(path).status_code for path in sorted(OPEN_PATHS)] == [200] * 4
    assert http.get("/version").json()["version"]
    (model,) = http.get("/v1/models").json()["data"]
    assert model == http.get("/v1/models/demo").json() and model["omni"]["limits"]["n"] == 10
    cache = http.get("/v1/omni/cache").json()
    assert cache["denoisers"]["transformer"]["cached"] and cache["denoisers"]["transformer"]["batched"]
    assert cache["backend"] == "magcache" and cache["recent"] and "prompt" not in cache["recent"][0]
    text = http.get("/metrics").text
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm_omni:denoise_steps_total",
                 "vllm_omni:denoise_batch_size_bucket", "vllm:e2e_request_latency_seconds_bucket",
                 'vllm_omni:http_replies_total{model_name="demo",status="200"}'):  # fmt: skip
        assert name in text, name
