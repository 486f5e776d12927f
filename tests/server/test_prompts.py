"""Embeddings kept between requests, over HTTP: counted, the same to the bit, and not shared between askers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from http_server import CHAT, ENGINE_ARGS, GENERATIONS, Running, serve
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

FEW = {"prompt": "a red apple", "steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with serve(ENGINE_ARGS | {"prompt_cache_mb": 1}, api_key=("one", "two")) as running:
        yield running


class Asker:
    def __init__(self, server: Running, key: str) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return next(s.value for s in samples if s.labels.items() >= labels.items())

    def hit(self, path: str = GENERATIONS, **body: object) -> tuple[bool, str]:
        """Whether the prompt was there, and the reply's picture."""
        before = self._counts()
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        until(lambda: sum(self._counts()) > sum(before))
        now = self._counts()
        assert sum(now) == sum(before) + 1
        return now[0] > before[0], json.dumps(reply.json().get("data") or reply.json()["choices"])

    def _counts(self) -> tuple[float, float]:
        name = "vllm_omni:prompt_cache_total"
        return self.metric(name, result="hit"), self.metric(name, result="miss")


@pytest.fixture
def one(keyed: Running) -> Asker:
    return Asker(keyed, "one")


def test_the_second_request_hits_and_is_the_same_to_the_bit(one: Asker) -> None:
    miss, first = one.hit(**FEW)
    hit, second = one.hit(**FEW)
    assert (miss, hit) == (False, True) and first == second
    assert one.hit(**FEW | {"seed": 2, "steps": 3, "size": "32x32"})[0]  # it is about the text alone
    assert not one.hit(**FEW | {"prompt": "A red apple"})[0]
    messages = [{"role": "user", "content": FEW["prompt"]}]
    assert one.hit(CHAT, messages=messages, steps=2)[0]
    assert 0 < one.metric("vllm_omni:prompt_cache_bytes") < 2**20


def test_no_key_and_no_user_profits_from_what_another_asked(keyed: Running, one: Asker) -> None:
    other, body = Asker(keyed, "two"), FEW | {"prompt": "a secret"}
    asked = [one.hit(**body)[0], other.hit(**body)[0], one.hit(**body)[0], other.hit(**body)[0]]
    assert asked == [False, False, True, True]
    assert [one.hit(**body, user="x")[0], one.hit(**body, user="y")[0], one.hit(**body, user="x")[0]] == [0, 0, 1]
    assert [one.hit(**body, safety_identifier="z")[0], one.hit(**body, safety_identifier="z")[0]] == [0, 1]


@pytest.mark.slow
def test_it_can_be_off() -> None:
    with serve(ENGINE_ARGS | {"prompt_cache_mb": 0}) as running:
        asker = Asker(running, "any")
        before = asker.metric("vllm_omni:denoise_steps_total", kind="computed")
        for _ in range(2):
            assert asker.http.post(GENERATIONS, json=FEW | {"cache": "off"}).status_code == 200
        until(lambda: asker.metric("vllm_omni:denoise_steps_total", kind="computed") >= before + 4)  # it has been told
        assert asker._counts() == (0, 0) and asker.metric("vllm_omni:prompt_cache_bytes") == 0


@pytest.mark.slow
def test_a_full_cache_drops_the_oldest_and_no_picture_is_wrong() -> None:
    """Room for some four of the demo's prompts, of which ten are asked for in turn, twice."""
    with serve(ENGINE_ARGS | {"prompt_cache_mb": 0.02}) as running:
        asker = Asker(running, "any")
        prompts = [f"a red apple {i}" for i in range(10)]
        first = [asker.hit(**FEW | {"prompt": prompt}) for prompt in prompts]
        again = [asker.hit(**FEW | {"prompt": prompt}) for prompt in prompts]
        assert not any(hit for hit, _ in first + again)  # each was pushed out before its turn came
        assert [made for _, made in first] == [made for _, made in again] and len({made for _, made in first}) == 10
        assert asker.hit(**FEW | {"prompt": prompts[-1]}) == (True, again[-1][1])
        assert 0 < asker.metric("vllm_omni:prompt_cache_bytes") <= 0.02 * 2**20
