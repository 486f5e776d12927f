"""Requests as other people's clients shape them: nested fields, files as replies, fields of other servers."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import zipfile
from typing import Any

import httpx
import pytest
import requests
from hostile import saved, scene
from http_replies import envelope, picture, pixels, told
from http_server import AUTH, CHAT, EDITS, GENERATIONS, Running
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from PIL import Image

SGLANG = {"response_format": "b64_json", "generator_device": "cuda", "enable_teacache": True, "background": "auto"}
OMNI = {"bot_task": "think", "sys_type": "en", "system_prompt": "draw", "flow_shift": 3.0, "return_stage_metrics": True}


def message(text: str = "cat", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def warnings(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [warning.split()[0] for warning in reply.json()["omni"]["warnings"]]


# -------------------------------------------------------------------------------------------------------- nested fields


@pytest.mark.parametrize("outer", ["extra_body", "extra_params"])
def test_nested_fields_mean_what_they_mean_outside(http: httpx.Client, outer: str) -> None:
    fields = {"seed": 5, "steps": 3, "width": 64, "height": 48, "cache": "off"}
    plain = http.post(GENERATIONS, json={"prompt": "cat", **fields})
    nested = http.post(GENERATIONS, json={"prompt": "cat", outer: fields})
    chat = http.post(CHAT, json=message(**{outer: fields}))
    assert (pixels(nested) == pixels(plain)).all() and nested.json()["size"] == "64x48"
    part = chat.json()["choices"][0]["message"]["content"][0]["image_url"]["url"]
    assert part.partition(",")[2] == plain.json()["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("nested", "param", "code"),
    [
        ({"seed": 6}, "seed", "invalid_value"),
        ({"sede": 6}, "sede", "unknown_parameter"),
        ({"steps": 1000}, "steps", "invalid_value"),
        (["seed"], "extra_body", "invalid_value"),
        ("seed", "extra_body", "invalid_value"),
    ],
)
def test_a_nested_mistake_is_named(http: httpx.Client, nested: Any, param: str, code: str) -> None:
    for path, body in ((GENERATIONS, {"prompt": "x"}), (CHAT, message())):
        envelope(http.post(path, json=body | {"seed": 5, "extra_body": nested}), 400, code, param)


# ---------------------------------------------------------------------------------------------- fields of other servers


def test_fields_without_a_meaning_are_named_in_the_reply(http: httpx.Client, openai: Any) -> None:
    body = {"prompt": "cat", "steps": 2, "style": "vivid", "quality": "auto", **SGLANG, **OMNI}
    reply = http.post(GENERATIONS, json=body)
    ignored = {"style", "generator_device", "enable_teacache", "bot_task", "sys_type", "system_prompt", "flow_shift"}
    assert set(warnings(reply)) == ignored
    assert reply.json()["omni"]["images"][0]["timings"]  # return_stage_metrics has a meaning
    nothing = {"enable_teacache": False, "generator_device": "cpu", "bot_task": None}
    nothing |= {"complexity": None, "frame_count": None, "svg": None, "input_fidelity": None}
    assert not warnings(http.post(GENERATIONS, json={"prompt": "cat", "steps": 2, **nothing}))
    assert "bot_task" in warnings(http.post(CHAT, json=message(extra_body={"steps": 2, "bot_task": "think"})))
    events = list(openai.images.generate(prompt="cat", stream=True, extra_body={"steps": 2, "flow_shift": 3.0}))
    assert events[-1].model_extra["omni"]["warnings"][0].startswith("flow_shift")


def test_a_typo_beside_them_is_still_refused(http: httpx.Client) -> None:
    error = told(http.post(GENERATIONS, json={"prompt": "x", "enable_teacach": True, **SGLANG}))
    assert (error["param"], error["code"]) == ("enable_teacach", "unknown_parameter")


def test_a_lossless_quality_is_without_cache(http: httpx.Client) -> None:
    made = http.post(GENERATIONS, json={"prompt": "cat", "steps": 9, "quality": "lossless"}).json()
    assert made["quality"] == "lossless" and made["omni"]["images"][0]["skipped_steps"] == 0


CHAT_FIELDS: dict[str, Any] = {
    "audio": {"voice": "x", "format": "wav"}, "function_call": "auto", "functions": [{"name": "f"}],
    "prediction": {"type": "content", "content": "x"}, "tools": [{"type": "function", "function": {"name": "f"}}],
    "web_search_options": {}, "n": 1, "seed": 1, "stream": False, "model": "demo", "safety_identifier": "u",
    "user": "u", "stream_options": None, "modalities": ["image"],
}  # fmt: skip


def test_every_official_field_of_a_chat_is_taken(http: httpx.Client) -> None:
    """What a client may expect to be acted on, and is not, is named."""
    official = set(CompletionCreateParamsBase.__annotations__) - {"messages"}
    assert set(CHAT_FIELDS) - {"stream"} <= official and {"tools", "logit_bias", "service_tier"} <= official
    nested = {"steps": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0, "chat_template_kwargs": {}}  # vLLM's
    reply = http.post(CHAT, json=message(**{name: CHAT_FIELDS.get(name, 1) for name in official}, extra_body=nested))
    acted_on = {"audio", "function_call", "functions", "prediction", "tools"}
    assert reply.status_code == 200 and set(warnings(reply)) == acted_on
    for name in official:
        assert http.post(CHAT, json=message(steps=1, **{name: None})).status_code == 200, name
    error = told(http.post(CHAT, json=message(steps=1, tool=[])))
    assert (error["param"], error["code"]) == ("tool", "unknown_parameter")


def test_a_streamed_chat_ends_with_its_usage_if_asked_to(openai: Any) -> None:
    asked = {
        "model": "demo",
        "messages": [{"role": "user", "content": "red apple"}],
        "extra_body": {"steps": 2, "n": 2},
    }
    whole = openai.chat.completions.create(**asked).usage
    chunks = list(openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole and not chunks[-1].choices and whole.total_tokens > whole.prompt_tokens > 0
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in openai.chat.completions.create(**asked, stream=True))


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client, whose type of a message is text
def test_the_official_clients_helper_adds_a_stream_up(openai: Any) -> None:
    """To the message of the same request without a stream."""
    asked = {"model": "demo", "messages": [{"role": "user", "content": "red apple"}]}
    fields = {"steps": 2, "n": 3, "seed": 1, "cache": "off"}
    whole = openai.chat.completions.create(**asked, extra_body=fields).choices[0].message
    with openai.chat.completions.stream(**asked, extra_body=fields) as stream:
        roles = [e.chunk.choices[0].delta.role for e in stream if e.type == "chunk"]
        (choice,) = stream.get_final_completion().choices
    assert roles == ["assistant", None, None, None]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    urls = [part["image_url"]["url"] for part in choice.message.content]
    assert [part["index"] for part in choice.message.content] == [0, 1, 2]
    assert set(urls) == {part["image_url"]["url"] for part in whole.content} and len(set(urls)) == 3


# ---------------------------------------------------------------------------------------------------------------- files


URL = "data:image/png;base64," + base64.b64encode(saved(scene())).decode()


@pytest.mark.parametrize(
    "given", [{"images": [{"image_url": URL}]}, {"image": URL}, {"image": [URL]}, {"image": {"image_url": URL}}]
)
def test_an_edit_in_json_is_that_of_a_form(repainter: Running, given: dict[str, Any]) -> None:
    fields, name = {"prompt": "cat", "steps": 3, "seed": 1}, next(iter(given))
    form = httpx.post(repainter.url + EDITS, data=fields, files={"image": saved(scene())}, timeout=60)
    made = httpx.post(repainter.url + EDITS, json=fields | given, timeout=60)
    assert made.status_code == 200 and made.json()["data"] == form.json()["data"], made.text
    text = given[name] if isinstance(given[name], str) else json.dumps(given[name])
    made = httpx.post(repainter.url + EDITS, data=fields, files={name: (None, text)}, timeout=60)
    assert made.status_code == 200 and made.json()["data"] == form.json()["data"], made.text
    for wrong, code in (
        ([{"file_id": "file-1"}], "unsupported_parameter"),
        ([5], "invalid_image"),
        ([URL, URL], "invalid_value"),
        ({"image_url": "https://a.b/c.png"}, "invalid_image"),
    ):
        envelope(httpx.post(repainter.url + EDITS, json=fields | {name: wrong}, timeout=60), 400, code, name)
    envelope(httpx.post(repainter.url + EDITS, json=fields | {name: []}, timeout=60), 400, "invalid_value", "image")


def test_a_content_type_is_read_in_any_letters(repainter: Running) -> None:
    fields = {"prompt": "cat", "steps": 2, "seed": 1}
    form = httpx.Request("POST", repainter.url + EDITS, data=fields, files={"image": saved(scene())})
    boundary = form.headers["content-type"].partition("; ")[2]
    json_of = {"content": json.dumps(fields | {"image": URL}), "headers": {"Content-Type": "Application/JSON"}}
    made = [
        httpx.post(repainter.url + EDITS, timeout=60, **sent).json()["data"]
        for sent in (json_of, {"content": form.read(), "headers": {"Content-Type": f"Multipart/Form-Data; {boundary}"}})
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["image[0]", "image[17]", "images", "images[]"])
def test_parts_may_be_numbered(repainter: Running, name: str) -> None:
    """As PHP's clients name the files of a list."""
    fields, file = {"prompt": "cat", "steps": "3", "seed": "1"}, saved(scene())
    wanted = httpx.post(repainter.url + EDITS, data=fields, files={"image": file}, timeout=60).json()["data"]
    made = httpx.post(repainter.url + EDITS, data=fields, files={name: file}, timeout=60)
    assert made.status_code == 200 and made.json()["data"] == wanted, made.text
    two = [(name, ("a.png", file)), (name, ("b.png", file))]
    refused, word = httpx.post(repainter.url + EDITS, data=fields, files=two, timeout=60), name.partition("[")[0]
    envelope(refused, 400, "invalid_value", word)


def test_a_picture_as_a_file(http: httpx.Client) -> None:
    body = {"prompt": "cat", "steps": 3, "seed": 1, "cache": "off"}
    plain = http.post(GENERATIONS, json=body | {"n": 2})
    alone = http.post(GENERATIONS, json=body).json()["data"][0]["b64_json"]
    one = http.post(GENERATIONS, json=body | {"response_format": "file"})
    assert one.headers["content-type"] == "image/png" and Image.open(io.BytesIO(one.content)).info["vllm_omni"]
    assert one.content == base64.b64decode(alone)
    jpg = http.post(GENERATIONS, json=body | {"response_format": "file", "output_format": "jpg"})
    assert jpg.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(jpg.content)).format == "JPEG"
    several = http.post(GENERATIONS, json=body | {"response_format": "file", "n": 2, "output_format": "webp"})
    assert several.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(several.content)) as archive:
        assert archive.namelist() == ["0.webp", "1.webp"]
        assert Image.open(io.BytesIO(archive.read("1.webp"))).size == picture(plain.json()["data"][1]["b64_json"]).size
    streamed = http.post(GENERATIONS, json=body | {"response_format": "file", "stream": True})
    envelope(streamed, 400, "invalid_value", "response_format")


# --------------------------------------------------------------------------------------------- one client after another


def test_requests_edits_as_the_comfyui_nodes_do(repainter: Running) -> None:
    data = {"prompt": "cat", "size": "64x48", "n": 1, "num_inference_steps": 4, "seed": 1, **SGLANG}
    files = {"image": ("a.png", saved(scene()), "image/png")}
    reply = requests.post(repainter.url + EDITS, data=data, files=files, timeout=60)
    assert reply.status_code == 200, reply.text
    ignored = {warning.split()[0] for warning in reply.json()["omni"]["warnings"]}
    assert ignored == {"generator_device", "enable_teacache"}


async def test_aiohttp_edits_and_chats_as_the_benchmark_does(repainter: Running, server: Running) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    form = aiohttp.FormData()
    for name, value in {"prompt": "cat", "size": "64x48", "response_format": "b64_json", "seed": "1"}.items():
        form.add_field(name, value)
    form.add_field("bot_task", "think")
    form.add_field("num_inference_steps", "4")
    form.add_field("image", saved(scene()), filename="a.png", content_type="image/png")
    nested = {"height": 48, "width": 64, "num_inference_steps": 3, "seed": 1}
    async with aiohttp.ClientSession(headers=AUTH) as session:
        async with session.post(repainter.url + EDITS, data=form) as reply:
            assert reply.status == 200 and (await reply.json())["size"] == "64x48", await reply.text()
        async with session.post(server.url + CHAT, json=message(model="demo", extra_body=nested)) as reply:
            assert reply.status == 200, await reply.text()
            assert (await reply.json())["choices"][0]["message"]["content"][0]["type"] == "image_url"


def test_curl_posts_a_nested_chat(server: Running) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("no curl here")
    body = json.dumps(message(extra_body={"num_inference_steps": 3}))
    command = [curl, "-sS", server.url + CHAT, "-H", "Authorization: Bearer a-key", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] == "stop"
