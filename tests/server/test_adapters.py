"""Adapters that come and go while the server runs: whose they are, where they may come from, and who must make room."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import save_adapter
from diffusers import DiffusionPipeline
from http_server import AUTH, ENGINE_ARGS, GENERATIONS, KEY, Held, Running, replace_engine, serve
from paths import DEMO

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FEW = {"prompt": "red apple", "steps": 3, "seed": 1, "cache": "off"}
NAMES = ("ink", "clay", "wax", "chalk")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An allowed folder with four adapters, and beside it what must not be read."""
    root = tmp_path_factory.mktemp("adapters")
    pipeline = DiffusionPipeline.from_pretrained(DEMO)
    for seed, name in enumerate(NAMES):
        save_adapter(pipeline, root / "allowed" / name, seed)
    shutil.copytree(root / "allowed" / "ink", root / "outside")
    (root / "allowed" / "link").symlink_to(root / "outside")
    (root / "allowed" / "leak").mkdir()
    inner = root / "allowed" / "leak" / "pytorch_lora_weights.safetensors"
    inner.symlink_to(root / "outside" / inner.name)
    (root / "allowed" / "loop").symlink_to(root / "allowed" / "loop")
    (root / "allowed" / "empty").mkdir()
    shutil.copytree(DEMO / "vae", root / "allowed" / "vae")
    (root / "allowed" / "pickled.bin").write_bytes(b"\x80\x04")
    return root


@pytest.fixture(scope="module")
def adaptable(folders: Path) -> Iterator[Running]:
    args = ENGINE_ARGS | {"max_loras": 3, "lora_modules": {"own": str(folders / "allowed" / "chalk")}}
    with serve(args, api_key=(KEY,), png_metadata=False, allowed_model_folders=(folders / "allowed",)) as running:
        yield running


@pytest.fixture
def http(adaptable: Running) -> Iterator[httpx.Client]:
    """A client; adapters that a test leaves behind are unloaded."""
    with httpx.Client(base_url=adaptable.url, headers=AUTH, timeout=60) as client:
        yield client
        adaptable.idle()
        for name in listed(client)[1:]:
            assert unload(client, name).status_code == 200


def load(http: httpx.Client, name: str, path: str | Path | None = None, **more: Any) -> httpx.Response:
    return http.post(LOAD, json={"lora_name": name, "lora_path": str(path or name)} | more)


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post(UNLOAD, json={"lora_name": name})


def listed(http: httpx.Client) -> list[str]:
    """Adapters among the models, the one of start-up first."""
    names = [model["id"] for model in http.get("/v1/models").json()["data"] if model.get("parent") == "demo"]
    return sorted(names, key=lambda name: name != "own")


def picture(http: httpx.Client, **more: Any) -> str:
    reply = http.post(GENERATIONS, json=FEW | more)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"][0]["b64_json"]


def refused(reply: httpx.Response, status: int, code: str) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code), reply.text
    return error["message"]


def test_an_adapter_is_loaded_used_and_unloaded(folders: Path, http: httpx.Client) -> None:
    bare = picture(http)
    reply = load(http, "ink", folders / "allowed" / "ink")
    assert reply.status_code == 200 and reply.json()["adapters"] == ["own", "ink"]
    assert listed(http) == ["own", "ink"] and http.get("/v1/models/ink").json()["parent"] == "demo"
    assert str(folders) not in http.get("/v1/models").text
    inked = picture(http, lora="ink")
    assert inked != bare and picture(http, model="ink") == inked == picture(http, lora=[{"name": "ink"}])
    assert http.post(GENERATIONS, json=FEW | {"model": "ink"}).json()["omni"]["model"] == "ink"
    assert picture(http) == bare != picture(http, lora={"name": "ink", "scale": 0.5}) != inked
    refused(http.post(GENERATIONS, json=FEW | {"model": "ink", "lora": "own"}), 400, "invalid_value")
    assert unload(http, "ink").json()["adapters"] == ["own"]
    refused(http.post(GENERATIONS, json=FEW | {"model": "ink"}), 404, "model_not_found")
    assert "own" in refused(http.post(GENERATIONS, json=FEW | {"lora": "ink"}), 400, "invalid_value")
    assert picture(http) == bare


def test_a_start_up_adapter_is_the_same_one_that_is_loaded_by_its_folder(http: httpx.Client) -> None:
    assert load(http, "chalk").status_code == 200
    assert picture(http, lora="chalk") == picture(http, lora="own")


def test_names_of_sglang_are_there_too(http: httpx.Client) -> None:
    body = {"lora_name": "ink", "lora_path": "ink"}
    assert http.post("/load_lora_adapter", json=body).status_code == 200
    assert http.post("/unload_lora_adapter", json={"lora_name": "ink"}).json()["adapters"] == ["own"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("gone", 404, "not_found"),
        ("../outside", 403, "forbidden_path"),
        ("ink/../../outside", 403, "forbidden_path"),
        ("link", 403, "forbidden_path"),
        ("leak", 403, "forbidden_path"),
        ("loop", 403, "forbidden_path"),
        ("/etc", 403, "forbidden_path"),
        ("/does/not/exist", 403, "forbidden_path"),
        ("a\0b", 403, "forbidden_path"),
        ("x" * 3000, 403, "forbidden_path"),
        ("vae", 400, "invalid_model"),
        ("empty", 400, "invalid_model"),
        ("pickled.bin", 400, "invalid_model"),
        (".", 403, "forbidden_path"),
    ],
)
def test_what_is_no_adapter_or_lies_outside_is_refused(
    folders: Path, http: httpx.Client, path: str, status: int, code: str
) -> None:
    bare = picture(http)
    reply = load(http, "x", path)
    assert str(folders) not in refused(reply, status, code)
    assert listed(http) == ["own"] and picture(http) == bare
    assert load(http, "x", "ink").status_code == 200  # the name is free, and nothing of the failure is left
    assert picture(http, lora="x") != bare


@pytest.mark.parametrize(
    "body",
    [
        {"lora_name": "own", "lora_path": "ink"},
        {"lora_name": "demo", "lora_path": "ink"},
        {"lora_name": "a.b", "lora_path": "ink"},
        {"lora_name": "", "lora_path": "ink"},
        {"lora_name": "../x", "lora_path": "ink"},
        {"lora_name": "x"},
        {"lora_name": "x", "lora_path": ["ink"]},
        {"lora_name": "x", "lora_path": "ink", "load_inplace": True},
        {"lora_name": "x", "lora_path": "ink", "typo": 1},
    ],
)
def test_a_wrong_body_is_refused(http: httpx.Client, body: dict[str, Any]) -> None:
    refused(http.post(LOAD, json=body), 400, "invalid_value")
    assert listed(http) == ["own"]


def test_an_unknown_adapter_cannot_be_unloaded(http: httpx.Client) -> None:
    assert "lora_name" in refused(unload(http, "gone"), 404, "not_found")
    assert load(http, "ink").status_code == 200
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: unload(http, "ink").status_code, range(2)))
    assert sorted(replies) == [200, 404]


def test_the_least_recently_used_makes_room(http: httpx.Client) -> None:
    """Three places: one for the adapter of start-up, which stays."""
    for name in ("ink", "clay"):
        assert load(http, name).status_code == 200
    picture(http, lora="ink")
    assert load(http, "wax").json()["adapters"] == ["own", "ink", "wax"]
    refused(http.post(GENERATIONS, json=FEW | {"lora": "clay"}), 400, "invalid_value")
    refused(load(http, "wax"), 400, "invalid_value")
    refused(load(http, "x", "empty"), 400, "invalid_model")
    assert listed(http) == ["own", "ink", "wax"]  # a failure pushes nobody out


def test_what_is_set_for_all_requests_makes_room_for_nothing(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither for another that is set beside it, nor for one that is loaded later; unloading it is logged, once."""
    bare = picture(http)
    three = {"lora_nickname": ["ink", "clay", "wax"], "lora_path": ["ink", "clay", "wax"]}
    refused(http.post("/v1/set_lora", json=three), 409, "conflict")
    assert picture(http) == bare
    for name in ("ink", "clay"):
        assert unload(http, name).status_code == 200
    assert http.post("/v1/set_lora", json={"lora_nickname": "ink", "lora_path": "ink"}).status_code == 200
    for name in ("clay", "wax"):
        assert load(http, name).status_code == 200
    assert listed(http) == ["own", "ink", "wax"] and picture(http) == picture(http, lora="ink") != bare
    assert http.post("/v1/set_lora", json={"lora_nickname": ["ink", "wax"]}).status_code == 200
    refused(load(http, "clay"), 409, "conflict")
    assert unload(http, "wax").status_code == 200
    caplog.set_level("ERROR")
    assert picture(http) == picture(http) == picture(http, lora="ink")
    assert [one.message.split()[1] for one in caplog.records if "set for all requests" in one.message] == ["wax"]
    assert http.post("/v1/unmerge_lora_weights").status_code == 200
    assert "wax" in refused(http.post("/v1/merge_lora_weights"), 409, "conflict")
    assert picture(http) == bare


@pytest.mark.slow
def test_a_running_request_keeps_its_adapter(adaptable: Running, http: httpx.Client) -> None:
    assert load(http, "ink").status_code == 200
    alone = picture(http, steps=150, lora="ink")
    with_ink, without = Held(adaptable, FEW, lora="ink"), Held(adaptable, FEW)
    assert unload(http, "ink").json()["adapters"] == ["own"]
    refused(http.post(GENERATIONS, json=FEW | {"lora": "ink"}), 400, "invalid_value")
    refused(unload(http, "ink"), 404, "not_found")
    refused(load(http, "ink"), 409, "conflict")
    assert load(http, "clay").status_code == 200  # meanwhile another one comes, and is off for the two that run
    assert with_ink.picture() == alone and without.picture() == picture(http, steps=150)
    adaptable.idle()
    assert load(http, "ink").status_code == 200 and picture(http, steps=150, lora="ink") == alone


@pytest.mark.slow
def test_a_cached_request_does_not_notice_adapters_that_come_and_go(adaptable: Running, http: httpx.Client) -> None:
    cached = {"cache": "balanced", "steps": 150}
    alone = {
        name: http.post(GENERATIONS, json=FEW | cached | lora).json()
        for name, lora in (("own", {"lora": "own"}), ("", {}))
    }
    running = {"own": Held(adaptable, FEW, **cached, lora="own"), "": Held(adaptable, FEW, **cached)}
    for name in ("ink", "clay", "wax"):
        assert load(http, name).status_code == 200
    for name, held in running.items():
        assert held.picture() == alone[name]["data"][0]["b64_json"]
        facts, wanted = (reply["omni"]["images"][0] for reply in (held.reply.json(), alone[name]))
        assert facts["skipped_steps"] == wanted["skipped_steps"] > 0


@pytest.mark.slow
def test_adapters_in_use_are_not_pushed_out(adaptable: Running, http: httpx.Client) -> None:
    for name in ("ink", "clay"):
        assert load(http, name).status_code == 200
    inked, clayed = Held(adaptable, FEW, lora="ink"), Held(adaptable, FEW, lora="clay")
    refused(load(http, "wax"), 409, "conflict")
    assert listed(http) == ["own", "ink", "clay"]
    assert inked.picture() != clayed.picture()
    assert load(http, "wax").status_code == 200


@pytest.mark.slow
def test_a_queued_request_keeps_its_adapter_too(adaptable: Running, http: httpx.Client) -> None:
    assert load(http, "ink").status_code == 200
    alone = picture(http, lora="ink")
    running = [Held(adaptable, FEW, prompt=str(i)) for i in range(4)]  # all places
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(picture, http, lora="ink", priority=2)
        while not adaptable.do(adaptable.engine.stats()).waiting and not queued.done():
            time.sleep(0.01)
        assert unload(http, "ink").status_code == 200
        assert queued.result(60) == alone
    assert all(one.picture() for one in running)


@pytest.mark.slow
def test_adapters_come_back_with_a_new_engine_process(adaptable: Running, folders: Path, http: httpx.Client) -> None:
    assert load(http, "ink").status_code == 200
    gone = folders / "allowed" / "gone-later"
    shutil.copytree(folders / "allowed" / "clay", gone)
    assert load(http, "later", gone).status_code == 200
    inked = picture(http, lora="ink")
    shutil.rmtree(gone)
    replace_engine(adaptable, http)
    assert listed(http) == ["own", "ink"]  # the other one's folder is gone
    assert picture(http, lora="ink") == inked
    refused(http.post(GENERATIONS, json=FEW | {"lora": "later"}), 400, "invalid_value")


def test_an_adapter_of_the_start_that_was_unloaded_stays_away_after_a_restart(
    adaptable: Running, folders: Path, http: httpx.Client
) -> None:
    """And a name that is another adapter's by then keeps the other's weights."""
    original = picture(http, lora="own")
    assert unload(http, "own").status_code == 200
    replace_engine(adaptable, http)
    assert "own" not in listed(http)
    assert load(http, "own", folders / "allowed" / "clay").status_code == 200
    other = picture(http, lora="own")
    assert other != original
    replace_engine(adaptable, http)
    assert picture(http, lora="own") == other
    assert unload(http, "own").status_code == 200
    assert load(http, "own", folders / "allowed" / "chalk").status_code == 200


def test_without_the_flag_nothing_is_loaded(server: Running, folders: Path) -> None:
    with httpx.Client(base_url=server.url, headers=AUTH) as client:
        told = refused(load(client, "ink", folders / "allowed" / "ink"), 403, "not_enabled")
        assert "--allowed-model-folders" in told


def test_only_json_and_only_with_the_key(adaptable: Running) -> None:
    """What a page of another site can send without asking (text, a form, an empty body with its Origin) is refused."""
    body = '{"lora_name": "ink", "lora_path": "ink"}'
    with httpx.Client(base_url=adaptable.url) as client:
        assert client.post(LOAD, json={"lora_name": "ink", "lora_path": "ink"}).status_code == 401
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            reply = client.post(LOAD, content=body, headers=AUTH | ({"Content-Type": kind} if kind else {}))
            refused(reply, 400, "invalid_request")
        for path in ("/sleep", "/wake_up", "/start_profile", "/stop_profile"):
            refused(client.post(path, headers=AUTH | {"Origin": "https://evil.example"}), 403, "cross_origin")
        assert client.get("/is_sleeping", headers=AUTH).json() == {"is_sleeping": False, "level": 0}
