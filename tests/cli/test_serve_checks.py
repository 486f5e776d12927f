"""What a server needs besides its settings: certificates, a middleware, a file of flags, a store, a socket's file."""

from __future__ import annotations

import argparse
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from certificates import make_certificate

from vllm_omni.entrypoints.cli import serve
from vllm_omni.entrypoints.cli.serve_checks import check_config_files, check_needs, unix_socket
from vllm_omni.entrypoints.openai.store import VideoStore
from vllm_omni.entrypoints.serve_config import HttpOptions, ServeConfig
from vllm_omni.errors import InvalidValueError, OmniError

TLS = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers", "ssl_cert_reqs")


def check(store: Path | None = None, middleware: tuple[str, ...] = (), **tls: Any) -> None:
    config = ServeConfig(engine_args={"model": "demo"}, http=HttpOptions(middleware=middleware), store_dir=store)
    check_needs(config, argparse.Namespace(**dict.fromkeys(TLS) | tls))


def test_certificates_that_make_no_tls_are_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "localhost")
    (tmp_path / "other").mkdir()
    _, other = make_certificate(tmp_path / "other", "localhost")
    check(ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=certificate, ssl_cert_reqs=2, ssl_ciphers="TLSv1")
    (tmp_path / "locked.pem").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    check(ssl_certfile=certificate, ssl_keyfile=str(tmp_path / "locked.pem"))  # asked for its password later
    for given, flag in (
        ({"ssl_certfile": "no.pem"}, "--ssl-certfile"),
        ({"ssl_certfile": certificate}, "--ssl-certfile"),  # without its key
        ({"ssl_certfile": certificate, "ssl_keyfile": other}, "--ssl-certfile"),
        ({"ssl_certfile": certificate, "ssl_keyfile": "no.pem"}, "--ssl-keyfile"),
        ({"ssl_keyfile": key}, "--ssl-keyfile"),
        ({"ssl_ca_certs": key}, "--ssl-ca-certs"),
        ({"ssl_ciphers": "CAESAR"}, "--ssl-ciphers"),
        ({"ssl_cert_reqs": 3}, "--ssl-cert-reqs"),
    ):
        with pytest.raises(InvalidValueError) as caught:
            check(**given)
        assert str(caught.value).startswith(f"{flag} ") and "\n" not in str(caught.value), given


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no.such.thing", "No module named 'no'"),
        ("collections.Conter", "collections has no Conter"),
        ("thing", "not MODULE.NAME"),
        (".x", "not MODULE.NAME"),
        ("a/b.c", "not MODULE.NAME"),
    ],
)
def test_a_middleware_that_is_not_there_is_refused(name: str, why: str) -> None:
    check(middleware=("collections.Counter",))
    with pytest.raises(InvalidValueError, match=f"--middleware cannot be imported .*{why}"):
        check(middleware=(name,))


def test_a_store_that_cannot_be_used_is_refused_by_its_flag(tmp_path: Path) -> None:
    check(store=tmp_path / "new")
    (tmp_path / "file").write_text("")
    with closing(VideoStore(tmp_path / "taken")):
        for folder in ("file", "taken"):
            with pytest.raises(InvalidValueError, match=r"^--store-dir must be a folder"):
                check(store=tmp_path / folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.yaml", None, "No such file"),
        ("x.txt", "port: 1", "must be a file.yaml"),
        ("empty.yaml", "", "must hold flags"),
        ("list.yaml", "- port", "must hold flags"),
        ("numbers.yaml", "1: 2", "must hold flags"),
        ("broken.yaml", "port: [", "cannot be read"),
    ],
)
def test_a_file_of_flags_that_holds_none_is_refused(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidValueError, match=f"^--config .*{said}") as caught:
        check_config_files([str(tmp_path / name)])
    assert "\n" not in str(caught.value)
    (tmp_path / "good.yml").write_text("port: 8001\nui: true\n")
    check_config_files([str(tmp_path / "good.yml")])
    with pytest.raises(InvalidValueError, match=r"^--config may be given once"):
        check_config_files([str(tmp_path / "good.yml")] * 2)


def test_a_file_of_flags_may_be_named_in_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def parsed(words: list[str]) -> None:
        seen.extend(words)
        raise OmniError("enough")

    monkeypatch.setattr(serve, "refuse_early", parsed)
    monkeypatch.setattr(serve._vllm_compat, "require", lambda: None)
    with pytest.raises(OmniError, match="enough"):
        serve.run(argparse.Namespace(words=["demo", "--config=a=b.yaml", "--port=1"]))
    assert seen == ["demo", "--config", "a=b.yaml", "--port=1"]


def test_the_file_of_a_socket_comes_and_goes_with_its_server(tmp_path: Path) -> None:
    file = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:  # leaves its file behind
        killed.bind(str(file))
    for _ in range(2):
        with unix_socket(str(file)) as sock:
            sock.listen()
            assert file.stat().st_mode & 0o777 == 0o666
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(file))
            with pytest.raises(OSError, match="in use"), unix_socket(str(file)):
                pass
            assert file.is_socket(), "a server that answers keeps its file"
        assert not file.exists()
    file.write_text("no socket")
    for path in (file, tmp_path / "missing" / "s", tmp_path / ("x" * 200)):
        with pytest.raises(InvalidValueError, match=r"^--uds cannot be used"):
            serve.listening(HttpOptions(uds=str(path))).__enter__()
    assert file.read_text() == "no socket"


def test_another_servers_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as later:
        with unix_socket(str(file)):
            file.rename(tmp_path / "kept")  # else the new file may get its number
            later.bind(str(file))
        assert file.is_socket()
