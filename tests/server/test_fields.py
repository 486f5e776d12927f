"""Values, prompts and names that no request may have: refused with one error format that names the field."""

from __future__ import annotations

from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from hostile import (
    MEMBERS,
    NUMBERS,
    PATHS,
    PRIVATE,
    REFUSAL,
    as_quick,
    saved,
    says_too_much,
    scene,
    wrong_numbers,
)
from http_replies import envelope, told
from http_server import (
    CHAT,
    EDITS,
    GENERATIONS,
    PROCESS_KEY,
    Command,
    Running,
)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "\0"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 32001}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": "1"}, "n", "invalid_value"),
        ({"n": 2**63}, "n", "invalid_value"),
        ({"size": "63x64"}, "size", "invalid_value"),
        ({"size": "99999x99999"}, "size", "invalid_value"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"size": "0x64"}, "size", "invalid_value"),
        ({"steps": 201}, "steps", "invalid_value"),
        ({"guidance_scale": -1}, "guidance_scale", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"svg": True}, "svg", "unsupported_parameter"),
        ({"sede": 1}, "sede", "unknown_parameter"),
        ({"cache": {"treshold": 1}}, "treshold", "unknown_parameter"),
        ({"cache": "fastest"}, "cache", "invalid_value"),
        ({"cache": {"backend": 5}}, "backend", "invalid_value"),
        ({"cache": {"enabled": "false"}}, "cache.enabled", "invalid_value"),
        ({"cache": {"enable_taylorseer": []}}, "enable_taylorseer", "invalid_value"),
        ({"cache": {"steps_mask": {"compute": 5}}}, "steps_mask", "invalid_value"),
        ({"cache": {"profile": "/etc/passwd"}}, "cache.profile", "invalid_value"),
        ({"cache": {"profile": "../x"}}, "cache.profile", "invalid_value"),
        ({"lora": "../../x"}, "lora", "invalid_value"),
        ({"timeout_s": 1e9}, "timeout_s", "invalid_value"),
    ],
)
def test_an_error_names_the_wrong_field(http: httpx.Client, change: dict, param: str, code: str) -> None:
    envelope(http.post(GENERATIONS, json={"prompt": "x", "steps": 2} | change), 400, code, param)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"prompt": NaN}', b'{"prompt": "a", "prompt": "b"}', b"[" * 100_000, b"\xff\xfe",
     b'{"prompt": "\\ud800"}', b'{"prompt": "x", "guidance_scale": 1e400}', b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_body_that_is_not_a_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    reply = http.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"] and not PRIVATE.search(reply.text)


def test_every_status_has_the_same_error_format(http: httpx.Client, server: Running) -> None:
    envelope(http.get("/nope"), 404, "not_found")
    envelope(http.get(GENERATIONS), 405, "method_not_allowed")
    envelope(http.post("/v1/images/variations"), 410, "gone")
    envelope(http.get("/v1/models/other"), 404, "model_not_found", "model")
    envelope(http.delete("/v1/images/jobs/other"), 404, "not_found", "job_id")
    envelope(http.post(GENERATIONS, content=b"x" * (3 << 20)), 413, "request_too_large")
    chunks = (b"x" * 65536 for _ in range(64))
    envelope(http.post(GENERATIONS, content=chunks), 413, "request_too_large")
    envelope(httpx.post(server.url + GENERATIONS, json={}), 401, "invalid_api_key")


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_outside_a_fields_limits_are_refused(server: Running, http: httpx.Client, name: str) -> None:
    """What is no value of the field is refused at once and named, in JSON and in chat; its limits are not."""
    low, high, _ = NUMBERS[name]
    json_type = {"Content-Type": "application/json"}
    bodies = {
        GENERATIONS: '{"prompt": "x", "%s": %s}',
        CHAT: '{"messages": [{"role": "user", "content": "x"}], "%s": %s}',
    }
    for path, body in bodies.items():
        for value in wrong_numbers(name):

            def ask(text: str = body % (name, value), path: str = path) -> httpx.Response:
                return http.post(path, content=text, headers=json_type)

            reply = ask()
            assert reply.status_code == 400 and len(reply.content) < 4096, (value, reply.text)
            assert reply.json()["error"]["param"] == name, (value, reply.text)
        assert as_quick(ask, lambda: http.get("/v1/models"), REFUSAL)
    if name == "strength":
        return  # not of this model
    few = {"prompt": "x", "output_format": "jpeg", "width": 16, "height": 16, "steps": 1}
    if name == "num_inference_steps":
        del few["steps"]
    ends = {("n", 10): 503, ("timeout_s", low): 504}  # more than there are places for; a moment
    for value in (low, high, None):
        reply = http.post(GENERATIONS, json=few | {name: 16 if value is None and name in few else value})
        assert reply.status_code == ends.get((name, value), 200), (value, reply.text)
        server.idle()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_form_outside_a_fields_limits_are_refused(process_http: httpx.Client, name: str) -> None:
    picture = saved(scene())
    values = [text.strip('"') for text in wrong_numbers(name) if text != '"1"']  # a form has nothing but strings
    for value in [*values, "", "null", "x", "0x10", "١٢x", "1 2"]:

        def ask(value: str = value) -> httpx.Response:
            return process_http.post(EDITS, files={"image": picture, "prompt": (None, "x"), name: (None, value)})

        assert told(ask())["param"] == name, value
    assert as_quick(ask, lambda: process_http.get("/v1/models"), REFUSAL)
    for key in (f"{name}[]", f"{name}[a]"):
        assert told(process_http.post(EDITS, files={"image": picture, "prompt": (None, "x"), key: (None, "1")}))[
            "param"
        ]


@pytest.mark.parametrize("text", MEMBERS, ids=range(len(MEMBERS)))
def test_malformed_members_are_refused(http: httpx.Client, text: str) -> None:
    """Deep, doubled, endless, not finite, not Unicode: 400 from both routes."""
    for path, start in ((GENERATIONS, '"prompt": "x", '), (CHAT, '"messages": [{"role": "user", "content": "x"}], ')):
        start = "" if path == GENERATIONS and '"prompt"' in text else start
        body = f'{{{start}{text}, "steps": 1}}'.encode()
        reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and len(reply.content) < 4096, reply.text


PROMPTS = [
    "",
    " ",
    "x" * 32_000,
    "x" * 32_001,
    "a\0b",
    "\u202eabc",
    "مرحبا",
    "👩‍👩‍👧",
    "\uffff",
    "{{7*7}}",
    "<|endoftext|>",
    "\r\n" * 50,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_unusual_prompts_are_served_or_refused(http: httpx.Client, prompt: str) -> None:
    reply = http.post(GENERATIONS, json={"prompt": prompt, "steps": 1})
    assert reply.status_code == (200 if prompt.strip() and "\0" not in prompt and len(prompt) <= 32_000 else 400), (
        reply.text
    )


@pytest.mark.parametrize("bad", [name for name in PATHS if name.strip(".")])  # a client takes those out of a path
def test_a_name_is_never_a_path(http: httpx.Client, bad: str) -> None:
    for body in ({"lora": bad}, {"lora": {"name": bad}}, {"model": bad}, {"cache": {"profile": bad}}, {"cache": bad}):
        reply = http.post(GENERATIONS, json={"prompt": "x", "steps": 1} | body)
        assert reply.status_code in (400, 404), (body, reply.text)
    for path in (f"/v1/models/{bad}", f"/v1/images/jobs/{bad}"):
        assert http.request("GET" if "models" in path else "DELETE", path).status_code in (400, 404, 405)


def tree(folder: Path) -> set[tuple[str, int]]:
    """All files but the log, with their sizes."""
    files = [path for path in folder.rglob("*") if path.name != "log"]
    return {(str(path), path.lstat().st_size if path.is_file() else 0) for path in files}


def test_a_name_in_a_form_or_a_path_never_touches_a_file(
    process: Command, process_http: httpx.Client, folder: Path
) -> None:
    """File names, adapters, models, jobs, profiles, videos: 400 or 404, and no file anywhere in reach."""
    (folder / "link").symlink_to("/etc")
    before, outside = tree(folder), tree(folder.parent)
    picture = saved(scene())
    connection = HTTPConnection("127.0.0.1", int(process.url.rpartition(":")[2]), timeout=20)
    for name in [*PATHS, "x\0y", str(folder / "canary"), "../canary", "a" * 5000]:
        for field in ("lora", "lora[name]", "model", "cache[profile]", "cache", "lora_request[][path]"):
            reply = process_http.post(EDITS, data={"prompt": "x", "steps": "1", field: name}, files={"image": picture})
            assert reply.status_code in (400, 404), (field, name, reply.text)
        sent = process_http.post(
            EDITS, data={"prompt": "x", "steps": "1"}, files={"image": (name, picture, "image/png")}
        )
        assert sent.status_code == (400 if len(name) > 4096 else 200), sent.text
        odd = process_http.post(EDITS, data={"prompt": "x", "steps": "1"}, files={name: ("a", picture, "image/png")})
        assert odd.status_code == 400, odd.text
        for method, path in (("GET", "/v1/models/"), ("DELETE", "/v1/images/jobs/"), ("GET", "/v1/videos/"),
                             ("GET", "/ui/"), ("GET", "/")):  # fmt: skip
            target = path + "".join(letter if " " < letter < "\x7f" else f"%{ord(letter):02x}" for letter in name)
            connection.putrequest(method, target, skip_host=False, skip_accept_encoding=True)
            connection.putheader("Authorization", f"Bearer {PROCESS_KEY}")
            connection.endheaders()
            answer = connection.getresponse()
            body = answer.read().decode()
            assert answer.status in (400, 404, 405) and not says_too_much(body), (method, target, body)
    assert tree(folder) == before and tree(folder.parent) - outside == set()


def test_no_error_reveals_internals(http: httpx.Client) -> None:
    """No error of any wrong number or member; `http` checks those of all other tests too."""
    texts = [f'"prompt": "x", "{name}": {value}' for name in NUMBERS for value in wrong_numbers(name)]
    texts += ['"prompt": "x", "cache": {"profile": "/etc/passwd"}', *MEMBERS]
    told = [
        http.post(GENERATIONS, content=f"{{{text}}}", headers={"Content-Type": "application/json"}) for text in texts
    ]
    assert len(told) > 200 and all(reply.status_code == 400 and reply.json()["error"]["code"] for reply in told)
    assert not list(filter(says_too_much, (reply.text for reply in told)))


def test_no_error_of_the_command_reveals_internals_or_the_key(process: Command, process_http: httpx.Client) -> None:
    picture = saved(scene())
    told = []
    for name in NUMBERS:
        for value in {text.strip('"') for text in wrong_numbers(name) if text != '"1"'}:
            fields = {"image": picture, "prompt": (None, "x"), name: (None, value)}
            told.append(process_http.post(EDITS, files=fields))
    assert len(told) > 200 and all(reply.status_code == 400 and reply.json()["error"]["code"] for reply in told)
    everything = [reply.text for reply in told] + [process.log.read_text()]
    assert not any(map(says_too_much, everything[:-1])) and not any(PROCESS_KEY in text for text in everything)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/images/generation", "did you mean /v1/images/generations?"),
        ("/images/generations", "did you mean /v1/images/generations?"),
        ("/v1/v1/images/edits", "did you mean /v1/images/edits?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/", "/docs lists them all"),
        ("/" + "x" * 5000, "/docs lists them all"),
    ],
)
def test_a_wrong_address_is_answered_with_the_right_one(http: httpx.Client, path: str, text: str) -> None:
    reply = http.post(path, json={"prompt": "x"})
    envelope(reply, 404, "not_found")
    assert text in reply.json()["error"]["message"]


def test_a_head_is_a_get_without_a_body(http: httpx.Client) -> None:
    routes = "/health /health/ready /v1/models /v1/models/demo /metrics /docs /openapi.json /ui"
    for path in routes.split():
        head, got = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"") and got.status_code == 200, path
        assert head.headers["content-type"] == got.headers["content-type"] if "content-type" in got.headers else True
    for path, status in ((GENERATIONS, 405), ("/v1/model", 404)):
        assert (reply := http.head(path)).status_code == status and not reply.content


def test_a_wrong_method_is_answered_with_the_right_ones(http: httpx.Client) -> None:
    for path, method, allowed in ((GENERATIONS, "GET", "POST"), ("/v1/videos", "PUT", "GET, POST")):
        reply = http.request(method, path)
        envelope(reply, 405, "method_not_allowed")
        assert reply.json()["error"]["message"] == f"this address takes {allowed}, not {method}"
        assert reply.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"{'prompt': 'x'}", "application/json", "line 1 column 2"),
        (b'{"prompt": "x",\n "steps": 4,}', "application/json", "line 2 column"),
        (b'{"prompt": "x"}', "application/x-www-form-urlencoded", "send the body with Content-Type: application/json"),
        (b"prompt=x", "text/plain", "got 'text/plain'"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_where_or_how(http: httpx.Client, body: bytes, kind: str, text: str) -> None:
    reply = http.post(GENERATIONS, content=body, headers={"Content-Type": kind})
    assert text in told(reply)["message"]


@pytest.mark.parametrize(
    ("change", "shown"),
    [({"seed": -1}, "-1"), ({"steps": "4x"}, "'4x'"), ({"n": 99}, "99"), ({"stream": "yes"}, "'yes'"), ({"n": 0}, "0"),
     ({"output_format": "gif"}, "'gif'"), ({"priority": 9}, "9"), ({"prompt": ["cat"]}, None)],
)  # fmt: skip
def test_an_error_shows_the_wrong_value_but_never_a_prompt(http: httpx.Client, change: dict, shown: str | None) -> None:
    message = told(http.post(GENERATIONS, json={"prompt": "x"} | change))["message"]
    assert message.endswith(f", got {shown}") if shown else "cat" not in message
