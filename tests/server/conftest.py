"""Servers shared by the HTTP tests of this folder; every error that their clients receive is checked for secrets."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from hostile import saved, says_too_much, scene
from http_server import AUTH, EDITS, KEY, OTHER_KEY, PROCESS_KEY, Command, Running, command, repaint_folder, serve
from openai import OpenAI


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """The demo model behind a key, four places to run and four to wait."""
    with serve(api_key=(KEY,), ui=True, max_body_mb=1, max_queued_requests=4) as running:
        yield running


@pytest.fixture(scope="session")
def proxied() -> Iterator[Running]:
    """A second engine process of the same model, behind a proxy's path and another key."""
    with serve(api_key=("k",), root_path="/api/", warmup=False) as running:
        yield running


@pytest.fixture(scope="session")
def repainter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo's weights as an image-to-image pipeline."""
    folder = repaint_folder(tmp_path_factory.mktemp("models"))
    with serve({"model": str(folder), "max_num_seqs": 4}) as running:
        yield running


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's working directory, home and place for temporary files."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The real command in processes of its own: image to image, with a key and small limits."""
    if find_spec("vllm") is None:
        pytest.skip("no vLLM here; tools/setup.sh installs it")
    model = repaint_folder(tmp_path_factory.mktemp("models"))
    limits = ("--max-body-mb", "4", "--max-steps", "8", "--max-n", "2", "--max-pixels", "65536", "--ui")
    with command(folder, model, "--api-key", PROCESS_KEY, *limits, "--cache-backend", "magcache") as started:
        yield started


@pytest.fixture(scope="session")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command without any limit of the operator's: image to image, with two keys."""
    model, keys = repaint_folder(tmp_path_factory.mktemp("models")), (PROCESS_KEY, OTHER_KEY)
    with command(tmp_path_factory.mktemp("editor"), model, "--api-key", *keys) as started:
        headers, files = {"Authorization": f"Bearer {PROCESS_KEY}"}, {"image": saved(scene())}
        httpx.post(started.url + EDITS, data={"prompt": "x", "steps": "2"}, files=files, headers=headers, timeout=60)
        started.resting = started.status("VmRSS")
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real command takes ten seconds to start: its tests are slow."""
    for item in items:
        if isinstance(item, pytest.Function) and {"process", "editor"} & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)


def check_error(reply: httpx.Response) -> None:
    """Every error body that a shared client receives."""
    if reply.status_code >= 400:
        reply.read()
        assert not says_too_much(reply.text) and PROCESS_KEY not in reply.text, reply.text


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx.Client]:
    limits, hooks = httpx.Limits(max_connections=64), {"response": [check_error]}
    with httpx.Client(base_url=server.url, headers=AUTH, timeout=60, limits=limits, event_hooks=hooks) as client:
        yield client


@pytest.fixture(scope="session")
def process_http(process: Command) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {PROCESS_KEY}"}
    with httpx.Client(
        base_url=process.url, headers=headers, timeout=60, event_hooks={"response": [check_error]}
    ) as client:
        client.post(EDITS, data={"prompt": "x", "steps": "2"}, files={"image": saved(scene())})  # warm
        yield client


@pytest.fixture
def openai(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
