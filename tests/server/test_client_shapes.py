"""Requests field by field as five clients of others send them, each by every means of sending one.

The clients: vllm-omni's serving benchmark and its chat example, its ComfyUI nodes, SGLang's serving benchmark and its
ComfyUI nodes. The means: aiohttp, httpx, requests, the official OpenAI client, curl.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from adapters import save_adapter
from diffusers import DiffusionPipeline
from hostile import saved, scene
from http_replies import picture
from http_server import AUTH, CHAT, EDITS, ENGINE_ARGS, GENERATIONS, KEY, Running, serve, video_folder
from openai import OpenAI
from paths import DEMO
from waiting import until

PNG = saved(scene())
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
VIDEOS = "/v1/videos"
SIDE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo with an adapter of start-up, and another one that may be loaded."""
    root = tmp_path_factory.mktemp("shapes")
    pipeline = DiffusionPipeline.from_pretrained(DEMO)
    for seed, name in enumerate(("own", "ink")):
        save_adapter(pipeline, root / name, seed)
    args = ENGINE_ARGS | {"lora_modules": {"own": str(root / "own")}}
    with serve(args, api_key=(KEY,), allowed_model_folders=(root,)) as running:
        yield running


@pytest.fixture(scope="module")
def filmer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = video_folder(tmp_path_factory.mktemp("film"))
    with serve({"model": str(model), "max_num_seqs": 4}, api_key=(KEY,), warmup=False) as running:
        yield running


@dataclass(frozen=True)
class Shape:
    """One request: to which of the servers, where, and what it holds. Without a file a form is urlencoded."""

    server: str
    path: str
    body: dict[str, Any]
    form: bool = False
    files: list[tuple[str, str, str]] = field(default_factory=list)  # name, file name, type; each is the picture
    ignored: set[str] = field(default_factory=set)  # what the reply's warnings name

    @property
    def texts(self) -> dict[str, str]:
        """The fields as a form has them."""
        return {k: json.dumps(v) if isinstance(v, dict | list) else str(v) for k, v in self.body.items()}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


NODES = {"n": 1, "num_inference_steps": 2, "guidance_scale": 7.5, "true_cfg_scale": 1.0, "vae_use_slicing": False,
         "vae_use_tiling": False, "seed": 3}  # fmt: skip
LORA = {"local_path": "/adapters/own", "name": "own", "scale": 0.5, "int_id": 7}
SGLANG = {"prompt": "cat", "size": "32x32", "n": 1, "response_format": "b64_json", "guidance_scale": 3.5, "seed": 3,
          "num_inference_steps": 2, "enable_teacache": True, "background": "auto", "output_format": "png",
          "generator_device": "cuda", "negative_prompt": "grey"}  # fmt: skip
TEACACHE = {"enable_teacache", "generator_device"}
ONE_FILE = [("image", "a.png", "image/png")]
WHOLE_EDIT = {"model": "repaint", "prompt": "cat", "size": "32x32", "response_format": "b64_json", "seed": 1,
              "num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "grey", "true_cfg_scale": 1.5,
              "sys_type": "en", "system_prompt": "draw", "bot_task": "think"}  # fmt: skip
FILM = {"prompt": "cat", **SIDE, "num_frames": 5, "num_inference_steps": 2, "seed": 1, "fps": 8}

SHAPES: dict[str, Shape] = {
    "omni benchmark, pictures": Shape("drawer", GENERATIONS, {
        "model": "demo", "prompt": "cat", "n": 1, "size": "32x32", "response_format": "b64_json", "seed": 1,
        "num_inference_steps": 2, "guidance_scale": 3.0, "true_cfg_scale": 1.0}),
    "omni benchmark, chat": Shape("drawer", CHAT, {
        "model": "demo", "messages": [{"role": "user", "content": "cat"}],
        "extra_body": SIDE | {"num_frames": 1, "num_inference_steps": 2, "seed": 1, "fps": 8}},
        ignored={"num_frames", "fps"}),
    "omni benchmark, chat with a picture": Shape("repainter", CHAT, {
        "model": "repaint", "extra_body": SIDE | {"num_inference_steps": 3, "seed": 1},
        "messages": [{"role": "user", "content": [text_part("cat"),
                                                  {"type": "image_url", "image_url": {"url": DATA_URL}}]}]}),
    "omni benchmark, edits": Shape("repainter", EDITS, WHOLE_EDIT, True, ONE_FILE,
                                   ignored={"sys_type", "system_prompt", "bot_task"}),
    "omni benchmark, videos": Shape("filmer", VIDEOS, FILM, True),
    "omni chat example": Shape("drawer", GENERATIONS, {
        "prompt": "cat", "response_format": "b64_json", "n": 2, "size": "32x32", "num_inference_steps": 2, "seed": 1,
        "true_cfg_scale": 4.0, "negative_prompt": "grey", "use_system_prompt": "en_unified", "system_prompt": "draw",
        "lora": {"name": "own", "scale": 0.5}}, ignored={"use_system_prompt", "system_prompt"}),
    "omni nodes, pictures": Shape("drawer", GENERATIONS, {
        "model": "demo", "prompt": "cat", "size": "32x32", "response_format": "b64_json", "negative_prompt": "grey",
        "lora": LORA, **NODES}, ignored={"lora.int_id", "lora.local_path"}),
    "omni nodes, edits": Shape("repainter", EDITS, {
        "model": "repaint", "prompt": "cat", "size": "32x32", "negative_prompt": "grey", **NODES}, True, ONE_FILE),
    "omni nodes, chat": Shape("drawer", CHAT, {
        "model": "demo", "messages": [{"role": "user", "content": [text_part("cat")]}], "modalities": ["image"],
        "extra_body": {n: v for n, v in NODES.items() if n != "n"}
        | SIDE | {"num_outputs_per_prompt": 2, "negative_prompt": "grey", "lora": None}}),
    "omni nodes, videos": Shape("filmer", VIDEOS, {
        "model": "wan", "negative_prompt": "grey", **FILM, **NODES, "flow_shift": 5.0}, True, ignored={"flow_shift"}),
    "sglang benchmark, pictures": Shape("drawer", GENERATIONS, {
        "model": "demo", "prompt": "cat", "n": 1, "response_format": "b64_json", "size": "32x32",
        "num_inference_steps": 2}),
    "sglang benchmark, edits": Shape("repainter", EDITS, {
        "model": "repaint", "prompt": "cat", "response_format": "b64_json", "size": "32x32", "num_inference_steps": 3},
        True, [("image", "a.png", "application/octet-stream")]),
    "sglang benchmark, videos": Shape("filmer", VIDEOS, {
        "model": "wan", "prompt": "cat", "size": "32x32", "num_frames": 5, "fps": 8, "num_inference_steps": 2}),
    "sglang benchmark, video form": Shape("filmer", VIDEOS, {
        "model": "wan", "prompt": "cat", "size": "32x32", "num_frames": 5, "fps": 8,
        "extra_body": {"num_inference_steps": 2, "seed": 1}}, True),
    "sglang nodes, pictures": Shape("drawer", GENERATIONS, SGLANG | {"quality": "auto", "style": "vivid"},
                                    ignored=TEACACHE | {"style"}),
    "sglang nodes, edits": Shape("repainter", EDITS, SGLANG | {"num_inference_steps": 3}, True, ONE_FILE,
                                 ignored=TEACACHE),
    "sglang nodes, videos": Shape("filmer", VIDEOS, {
        "prompt": "cat", "size": "32x32", "seconds": 4, "fps": 8, "num_frames": 5, "negative_prompt": "grey",
        "guidance_scale": 2.0, "num_inference_steps": 2, "seed": 1, "enable_teacache": True,
        "generator_device": "cuda", "output_path": "/out"}, ignored=TEACACHE | {"output_path", "seconds"}),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------- means of sending


def by_httpx(url: str, shape: Shape) -> Any:
    files = [(name, (file, PNG, kind)) for name, file, kind in shape.files] or None
    sent = {"data": shape.texts, "files": files} if shape.form else {"json": shape.body}
    return httpx.post(url + shape.path, headers=AUTH, timeout=60, **sent).raise_for_status().json()


def by_requests(url: str, shape: Shape) -> Any:
    files = [(name, (file, PNG, kind)) for name, file, kind in shape.files] or None
    sent: dict[str, Any] = {"data": shape.texts, "files": files} if shape.form else {"json": shape.body}
    reply = requests.post(url + shape.path, headers=AUTH, timeout=60, **sent)
    assert reply.status_code == 200, reply.text
    return reply.json()


def by_aiohttp(url: str, shape: Shape) -> Any:
    async def send() -> Any:
        form = aiohttp.FormData()
        for name, text in shape.texts.items():
            form.add_field(name, text)
        for name, file, kind in shape.files:
            form.add_field(name, PNG, filename=file, content_type=kind)
        sent: dict[str, Any] = {"data": form} if shape.form else {"json": shape.body}
        async with aiohttp.ClientSession(headers=AUTH) as session, session.post(url + shape.path, **sent) as reply:
            assert reply.status == 200, await reply.text()
            return await reply.json()

    return asyncio.run(send())


def by_openai(url: str, shape: Shape) -> Any:
    client = OpenAI(base_url=url, api_key=KEY, max_retries=0)
    sent: dict[str, Any] = {"body": shape.body}
    if shape.files:
        sent |= {"files": [(name, (file, PNG, kind)) for name, file, kind in shape.files]}
    if shape.form:
        sent |= {"body": shape.texts, "options": {"headers": {"Content-Type": "multipart/form-data"}}}
        sent.setdefault("files", [])
    return client.post(shape.path, cast_to=httpx.Response, **sent).json()


def by_curl(url: str, shape: Shape) -> Any:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("no curl here")
    command = [curl, "-sS", "--fail-with-body", url + shape.path, "-H", f"Authorization: {AUTH['Authorization']}"]
    if shape.form:
        command += [word for name, text in shape.texts.items() for word in ("--form-string", f"{name}={text}")]
        command += [w for name, file, kind in shape.files for w in ("-F", f"{name}=@-;filename={file};type={kind}")]
    else:
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(shape.body)]
    done = subprocess.run(command, input=PNG if shape.form else None, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


MEANS: dict[str, Callable[[str, Shape], Any]] = {
    "httpx": by_httpx, "requests": by_requests, "aiohttp": by_aiohttp, "openai": by_openai, "curl": by_curl,
}  # fmt: skip


def film(url: str, job: dict[str, Any]) -> bytes:
    """Wait for a job as the benchmarks do: poll, fetch, delete."""
    with httpx.Client(base_url=url, headers=AUTH, timeout=60) as http:

        def ended() -> dict[str, Any] | None:
            now = http.get(f"{VIDEOS}/{job['id']}").json()
            return now if now["status"] in ("completed", "failed") else None

        done = until(ended, pause_s=0.02)
        assert done["status"] == "completed", done
        content = http.get(f"{VIDEOS}/{job['id']}/content").content
        assert http.delete(f"{VIDEOS}/{job['id']}").status_code == 200
        return content


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("means", MEANS)
def test_a_shape_is_served(name: str, means: str, request: pytest.FixtureRequest) -> None:
    shape = SHAPES[name]
    url = request.getfixturevalue(shape.server).url
    reply = MEANS[means](url, shape)
    assert {warning.split()[0] for warning in reply["omni"]["warnings"]} == shape.ignored
    if shape.path == VIDEOS:
        assert film(url, reply)[4:8] == b"ftyp"
    elif shape.path == CHAT:
        parts = reply["choices"][0]["message"]["content"]
        assert len(parts) == shape.body["extra_body"].get("num_outputs_per_prompt", 1)
        assert picture(parts[0]["image_url"]["url"].partition(",")[2]).size == (32, 32)
    else:
        assert len(reply["data"]) == shape.body.get("n", 1)
        assert picture(reply["data"][0]["b64_json"]).size == (32, 32)


def test_every_client_and_every_field_of_the_list_is_there() -> None:
    """The fields that were refused when these clients were first tried."""
    sent = {key for shape in SHAPES.values() for key in {**shape.body, **shape.body.get("extra_body", {})}}
    wanted = "generator_device enable_teacache bot_task flow_shift extra_body sys_type num_outputs_per_prompt"
    assert set(wanted.split()) <= sent and {shape.server for shape in SHAPES.values()} == {
        "drawer", "repainter", "filmer"}  # fmt: skip


# ------------------------------------------------------------------------------- what SGLang's nodes ask for beside it


def test_the_nodes_that_ask_for_the_model_and_set_an_adapter(drawer: Running) -> None:
    few = {"prompt": "red apple", "steps": 3, "seed": 1, "cache": "off"}
    with httpx.Client(base_url=drawer.url, headers=AUTH, timeout=60) as http:

        def drawn(**more: Any) -> str:
            reply = http.post(GENERATIONS, json=few | more)
            assert reply.status_code == 200, reply.text
            return reply.json()["data"][0]["b64_json"]

        for path in ("/models", "/v1/model_info"):
            told = http.get(path).json()
            assert (told["model_path"], told["task_type"], told["pipeline_class"]) == ("demo", "T2I", "FluxPipeline")
        bare, own = drawn(), drawn(lora="own")
        reply = http.post("/v1/set_lora", json={"lora_nickname": "ink", "lora_path": "ink", "target": "all"})
        assert reply.status_code == 200 and reply.json()["status"] == "ok", reply.text
        inked = drawn(lora="ink")
        assert drawn() == inked != bare == drawn(lora=[]) and drawn(lora="own") == own
        listed = http.get("/v1/list_loras").json()
        assert {"nickname": "ink", "path": "ink"} in listed["loaded_adapters"] and len(listed["loaded_adapters"]) == 2
        assert listed["active"]["transformer"] == [{"nickname": "ink", "path": "ink", "merged": True, "strength": 1.0}]
        assert http.post("/v1/unmerge_lora_weights", json={"target": "all"}).json()["active"] == []
        assert drawn() == bare and http.get("/v1/list_loras").json()["active"] == {}
        assert http.post("/v1/merge_lora_weights", json={"strength": 0.5}).status_code == 200
        assert drawn() == drawn(lora={"name": "ink", "scale": 0.5}) not in (bare, inked)
        both = {"lora_nickname": ["own", "ink"], "lora_path": [None, None], "strength": [1.0, 0.5], "target": "all"}
        assert http.post("/v1/set_lora", json=both).status_code == 200
        assert drawn() == drawn(lora=[{"name": "own"}, {"name": "ink", "scale": 0.5}])
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "ink"}).status_code == 200
        assert drawn() == own  # what is gone is no longer set
        assert http.post("/v1/unmerge_lora_weights").status_code == 200 and drawn() == bare


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_nickname": "gone"}, 404, "lora_nickname"),
        ({"lora_nickname": "x", "lora_path": "gone"}, 404, "lora_path"),
        ({"lora_nickname": "x", "lora_path": "/etc"}, 403, "lora_path"),
        ({"lora_nickname": "demo", "lora_path": "ink"}, 400, "lora_nickname"),
        ({"lora_nickname": "a/b", "lora_path": "ink"}, 400, "lora_nickname"),
        ({"lora_nickname": "own", "lora_path": "ink"}, 409, "lora_nickname"),  # the weights of that name are others
        ({"lora_nickname": []}, 400, "lora_nickname"),
        ({"lora_nickname": ["own", "own"]}, 400, "lora_nickname"),
        ({"lora_nickname": ["own"], "strength": [1.0, 2.0]}, 400, "strength"),
        ({"lora_nickname": "own", "strength": 11.0}, 400, "strength"),
        ({"lora_nickname": "own", "target": "critic"}, 400, "target"),
        ({"lora_path": "ink"}, 400, "lora_nickname"),
    ],
)
def test_an_adapter_that_cannot_be_set_changes_nothing(
    drawer: Running, body: dict[str, Any], status: int, param: str
) -> None:
    before = httpx.get(drawer.url + "/v1/list_loras", headers=AUTH).json()
    reply = httpx.post(drawer.url + "/v1/set_lora", json=body, headers=AUTH)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
    assert httpx.get(drawer.url + "/v1/list_loras", headers=AUTH).json() == before
