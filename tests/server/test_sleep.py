"""Sleep and wake over HTTP, and new weights between two steps: nothing lost, nothing mixed, all or nothing."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from adapters import save_adapter
from closeness import levels_apart
from diffusers import DiffusionPipeline
from http_server import AUTH, ENGINE_ARGS, GENERATIONS, KEY, Held, Running, replace_engine, serve
from paths import DEMO
from PIL import Image
from pipelines import save_tiny_flux
from safetensors.torch import load_file, save_file
from waiting import until

UPDATE = "/update_weights_from_disk"
FEW = {"prompt": "red apple", "steps": 3, "seed": 1, "cache": "off"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights: changed ones as a model's folder has them, and alone; of other models, incomplete, cut; an adapter."""
    root = tmp_path_factory.mktemp("weights")
    state = load_file(DEMO / "transformer" / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        state[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    def save(folder: str, tensors: dict[str, torch.Tensor]) -> None:
        (root / folder).mkdir(parents=True)
        save_file(tensors, root / folder / WEIGHTS)

    first = next(iter(state))
    save("changed/transformer", state)
    save("both/transformer", state)
    save("both/vae", {name: 1.5 * tensor for name, tensor in load_file(DEMO / "vae" / WEIGHTS).items()})
    save("alone", {name: tensor.float() for name, tensor in state.items()})
    save("lacks/transformer", {name: tensor for name, tensor in state.items() if name != first})
    save("more/transformer", state | {"other.weight": torch.zeros(1)})
    save("shape/transformer", state | {first: torch.zeros(3, dtype=torch.float16)})
    save("dtype/transformer", state | {first: state[first].to(torch.int8)})
    shutil.copytree(DEMO / "vae", root / "lacks" / "vae")
    save("cut/transformer", state)
    with (root / "cut" / "transformer" / WEIGHTS).open("r+b") as file:
        file.truncate(10_000)
    (root / "empty").mkdir()
    save_tiny_flux(root / "other")
    save_adapter(DiffusionPipeline.from_pretrained(DEMO), root / "ink", 0)
    return root


@pytest.fixture(scope="module")
def sleeper(folders: Path) -> Iterator[Running]:
    with serve(ENGINE_ARGS, api_key=(KEY,), allowed_model_folders=(folders, DEMO.parent)) as running:
        yield running


@pytest.fixture
def http(sleeper: Running) -> Iterator[httpx.Client]:
    """A client; whatever a test does, the server is awake afterwards and has its own weights."""
    with httpx.Client(base_url=sleeper.url, headers=AUTH, timeout=60) as client:
        yield client
        assert client.post("/wake_up").status_code == 200
        assert client.post(UPDATE, json={"model_path": str(DEMO)}).status_code == 200


def picture(http: httpx.Client, **more: object) -> str:
    reply = http.post(GENERATIONS, json=FEW | more)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"][0]["b64_json"]


def refused(reply: httpx.Response, status: int, code: str) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code), reply.text
    return error["message"]


def apart(one: str, other: str) -> int:
    """Levels between two pictures: a joint forward rounds otherwise than one alone."""
    return levels_apart(*(Image.open(io.BytesIO(base64.b64decode(text))) for text in (one, other)))


def memory_kb(server: Running) -> int:
    engine = server.engine._engine
    assert engine is not None
    lines = Path(f"/proc/{engine.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_sleeps_and_wakes(sleeper: Running, http: httpx.Client, level: int) -> None:
    before, memory = picture(http), memory_kb(sleeper)
    told = http.post(f"/sleep?level={level}").json()
    assert told["is_sleeping"] and told["level"] == level
    assert http.get("/is_sleeping").json() == {"is_sleeping": True, "level": level}
    reply = http.post(GENERATIONS, json=FEW)
    refused(reply, 503, "asleep")
    assert int(reply.headers["Retry-After"]) > 0
    assert http.get("/health/ready").status_code == 503 and http.get("/health").status_code == 200
    if level == 2:  # 9.3 million weights in fp32
        until(lambda: memory_kb(sleeper) < memory - 30_000, 20)
    assert http.post("/sleep", json={"level": level}).status_code == 200  # it sleeps already
    assert not http.post("/wake_up").json()["is_sleeping"]
    assert picture(http) == before and http.get("/health/ready").status_code == 200
    assert http.post("/wake_up").status_code == 200  # it is awake already


@pytest.mark.slow
def test_running_requests_end_before_the_sleep_and_new_ones_are_refused(sleeper: Running, http: httpx.Client) -> None:
    alone = picture(http, steps=150)
    running = [Held(sleeper, FEW) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(http.post, "/sleep")
        status = until(lambda: {http.post(GENERATIONS, json=FEW | {"steps": 1}).status_code} - {200})
        assert status == {503} and not asleep.done()
        assert asleep.result(60).json()["is_sleeping"]
    assert all(apart(one.picture(), alone) <= 1 for one in running)


def test_a_sleep_begins_when_the_last_request_is_cancelled(sleeper: Running, http: httpx.Client) -> None:
    held = Held(sleeper, FEW | {"n": 2})
    with ThreadPoolExecutor(2) as pool:
        asleep = pool.submit(http.post, "/sleep")
        (job,) = sleeper.app.state.omni.jobs.running
        until(lambda: http.get("/health/ready").status_code == 503)  # from the order on
        assert http.get("/is_sleeping").json()["level"] == 0
        assert http.delete(f"/v1/images/jobs/{job}").status_code == 200
        assert asleep.result(60).json()["is_sleeping"]
        assert http.delete(f"/v1/images/jobs/{job}").status_code == 404  # nothing runs while it sleeps
        awake = [pool.submit(http.post, "/wake_up") for _ in range(2)]  # at once
        assert [one.result(60).status_code for one in awake] == [200, 200]
    held.thread.join(60)
    assert held.reply.status_code == 499 and picture(http)


def test_requests_during_a_wake_are_answered(sleeper: Running, http: httpx.Client) -> None:
    before = picture(http)
    http.post("/sleep?level=2")
    with ThreadPoolExecutor(9) as pool:
        awake = pool.submit(http.post, "/wake_up")
        replies = list(pool.map(lambda _: http.post(GENERATIONS, json=FEW), range(8)))
        assert awake.result(60).status_code == 200
    assert {reply.status_code for reply in replies} <= {200, 503}
    pictures = [reply.json()["data"][0]["b64_json"] for reply in replies if reply.status_code == 200]
    assert all(apart(one, before) <= 1 for one in pictures)  # they may share a batch
    assert picture(http) == before


@pytest.mark.parametrize("query", ["level=0", "level=3", "level=x", "level="])
def test_an_unknown_level_is_refused(http: httpx.Client, query: str) -> None:
    refused(http.post(f"/sleep?{query}"), 400, "invalid_value")
    assert picture(http)


def test_a_sleeping_engine_is_changed_by_nothing_but_its_wake(
    sleeper: Running, folders: Path, http: httpx.Client
) -> None:
    http.post("/sleep?level=2")
    for path, body in (
        (UPDATE, {"model_path": "changed"}),
        ("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "ink"}),
    ):
        assert "wake" in refused(http.post(path, json=body), 409, "conflict")


@pytest.mark.slow
def test_a_process_that_dies_asleep_is_replaced_by_one_that_sleeps(sleeper: Running, http: httpx.Client) -> None:
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "ink", "lora_path": "ink"}).status_code == 200
    assert http.post(UPDATE, json={"model_path": "changed"}).status_code == 200
    before = picture(http), picture(http, lora="ink")
    http.post("/sleep?level=2")
    replace_engine(sleeper, http, "/health")
    assert http.get("/is_sleeping").json()["level"] == 2
    refused(http.post(GENERATIONS, json=FEW), 503, "asleep")
    assert http.post("/wake_up").json()["weights"] == "changed"
    assert (picture(http), picture(http, lora="ink")) == before
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "ink"}).status_code == 200


# -------------------------------------------------------------------------------------------------------------- weights


def test_new_weights_are_taken_and_survive_a_sleep(folders: Path, http: httpx.Client) -> None:
    old = picture(http)
    told = http.post(UPDATE, json={"model_path": str(folders / "changed")}).json()
    assert told["success"] and told["weights"] == "changed" and str(folders) not in json.dumps(told)
    new = picture(http)
    assert new != old
    http.post("/sleep?level=2")
    assert http.post("/wake_up").status_code == 200 and picture(http) == new
    assert http.post(UPDATE, json={"model_path": str(DEMO), "target_modules": ["transformer"]}).status_code == 200
    assert picture(http) == old
    assert http.post(UPDATE, json={"model_path": "alone"}).status_code == 200  # the denoiser's weights alone, in fp32
    assert picture(http) == new


@pytest.mark.slow
def test_each_component_keeps_its_own_last_weights(sleeper: Running, folders: Path, http: httpx.Client) -> None:
    """Updates of two components from two folders survive a sleep and a death; what was left out of one stays out."""
    old = picture(http)
    assert http.post(UPDATE, json={"model_path": "both", "target_modules": ["transformer"]}).status_code == 200
    first = picture(http)
    assert first not in (old, picture(http, prompt="blue apple"))
    http.post("/sleep?level=2")
    assert http.post("/wake_up").json()["weights"] == "both" and picture(http) == first  # not the VAE of that folder
    assert http.post(UPDATE, json={"model_path": "both", "target_modules": ["vae"]}).status_code == 200
    assert http.post(UPDATE, json={"model_path": str(DEMO), "target_modules": ["transformer"]}).status_code == 200
    second = picture(http)
    assert second not in (old, first)
    for end in ("sleep", "death"):
        if end == "death":
            replace_engine(sleeper, http, "/health")
        http.post("/sleep?level=2")
        assert http.post("/wake_up").status_code == 200 and picture(http) == second, end


@pytest.mark.parametrize(
    ("body", "status", "code", "told"),
    [
        ({"model_path": "other"}, 400, "invalid_value", "another"),
        ({"model_path": "lacks"}, 400, "invalid_value", "must hold all weights"),
        ({"model_path": "more"}, 400, "invalid_value", "another model"),
        ({"model_path": "shape"}, 400, "invalid_value", "another shape"),
        ({"model_path": "dtype"}, 400, "invalid_value", "type I8"),
        ({"model_path": "cut"}, 400, "invalid_model", "safetensors"),
        ({"model_path": "empty"}, 400, "invalid_value", "must hold .safetensors"),
        ({"model_path": "changed", "target_modules": ["transformer", "vae"]}, 400, "invalid_value", "vae"),
        ({"model_path": "changed", "target_modules": ["unet"]}, 400, "invalid_value", "target_modules"),
        ({"model_path": "gone"}, 404, "not_found", ""),
        ({"model_path": "/etc"}, 403, "forbidden_path", ""),
        ({"model_path": 7}, 400, "invalid_value", ""),
        ({}, 400, "invalid_value", ""),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    http: httpx.Client, body: dict[str, object], status: int, code: str, told: str
) -> None:
    before = picture(http)
    assert told in refused(http.post(UPDATE, json=body), status, code)
    assert picture(http) == before


@pytest.mark.slow
def test_no_request_mixes_old_and_new_weights(sleeper: Running, http: httpx.Client) -> None:
    old = picture(http, steps=150)
    running = [Held(sleeper, FEW) for _ in range(4)]  # all places
    with ThreadPoolExecutor(3) as pool:
        queued = pool.submit(picture, http, steps=10)
        until(lambda: sleeper.do(sleeper.engine.stats()).waiting)
        updated = pool.submit(http.post, UPDATE, json={"model_path": "changed"})
        assert updated.result(60).status_code == 200
        assert queued.result(60) == picture(http, steps=10)  # it had to wait, and has the new ones
    assert all(apart(one.picture(), old) <= 1 for one in running)
    assert apart(picture(http, steps=150), old) > 8


def test_weights_change_under_an_adapter(http: httpx.Client) -> None:
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "ink", "lora_path": "ink"}).status_code == 200
    old, inked = picture(http), picture(http, lora="ink")
    assert http.post(UPDATE, json={"model_path": "changed"}).status_code == 200
    assert len({old, inked, picture(http), picture(http, lora="ink")}) == 4
    assert http.post(UPDATE, json={"model_path": str(DEMO)}).status_code == 200
    assert (picture(http), picture(http, lora="ink")) == (old, inked)
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "ink"}).status_code == 200
    assert picture(http) == old
