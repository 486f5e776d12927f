"""What a server needs besides its settings: files, modules and places. Refused before the model loads, by the flag."""

from __future__ import annotations

import argparse
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_omni.entrypoints.cli.flags import named_by_flag
from vllm_omni.entrypoints.serve_config import HttpOptions, ServeConfig, imported
from vllm_omni.errors import InvalidValueError


def check_needs(config: ServeConfig, args: argparse.Namespace) -> None:
    """InvalidValueError for certificates, a middleware or a store that cannot be used; `args` has the flags of TLS."""
    _check_tls(args)
    with named_by_flag(HttpOptions, ServeConfig):
        for name in config.http.middleware:
            imported(name)
        if config.store_dir is not None:
            from vllm_omni.entrypoints.openai.store import VideoStore

            VideoStore(config.store_dir).close()


def _check_tls(args: argparse.Namespace) -> None:
    context, certificate, key = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), args.ssl_certfile, args.ssl_keyfile
    if key and not certificate:
        raise InvalidValueError("--ssl-keyfile", key, "needs the certificate beside it: --ssl-certfile FILE")
    if args.ssl_cert_reqs not in (None, *ssl.VerifyMode):
        raise InvalidValueError("--ssl-cert-reqs", args.ssl_cert_reqs, "must be 0 (none), 1 (optional) or 2 (required)")
    with _usable("--ssl-keyfile", key):
        locked = key and b"ENCRYPTED" in Path(key).read_bytes()  # the server asks for its password, once
    with _usable("--ssl-certfile", certificate):
        if certificate and not locked:
            context.load_cert_chain(certificate, key)
    with _usable("--ssl-ca-certs", args.ssl_ca_certs):
        if args.ssl_ca_certs:
            context.load_verify_locations(args.ssl_ca_certs)
    with _usable("--ssl-ciphers", args.ssl_ciphers):
        if args.ssl_ciphers:
            context.set_ciphers(args.ssl_ciphers)


@contextmanager
def _usable(flag: str, value: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # also what OpenSSL says
        raise InvalidValueError(flag, value, f"cannot be used ({error.strerror or error})") from None


def check_config_files(files: Sequence[str]) -> None:
    """InvalidValueError for a `--config` over which vLLM's parser would end with a traceback."""
    for file in files:
        _check_config_file(file)
    if len(files) > 1:
        raise InvalidValueError("--config", files[-1], "may be given once")


def _check_config_file(file: str) -> None:
    import yaml  # vLLM's parser has it

    if Path(file).suffix not in (".yaml", ".yml"):
        raise InvalidValueError("--config", file, "must be a file.yaml")
    try:
        told = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InvalidValueError("--config", file, f"cannot be read ({why})") from None
    if not isinstance(told, dict) or not all(isinstance(flag, str) for flag in told):
        raise InvalidValueError("--config", file, "must hold flags and their values, such as `port: 8001`")


def check_port(host: str, port: int) -> None:
    """InvalidValueError for one that is taken."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InvalidValueError("--port", f"{host}:{port}", f"cannot be used ({error.strerror})") from None


@contextmanager
def unix_socket(path: str) -> Iterator[socket.socket]:
    """A socket bound to that file, which anybody may connect to who reaches it; the file goes when the block ends.

    OSError if it cannot be made. One that a server has left, which ended otherwise, is replaced.
    """
    file = Path(path)
    with socket.socket(socket.AF_UNIX) as sock:
        if file.is_socket() and _is_left(path):
            file.unlink()
        sock.bind(path)
        file.chmod(0o666)  # as uvicorn's: a proxy is another user; the folder says who reaches it
        made = file.stat().st_ino
        try:
            yield sock
        finally:
            with suppress(OSError):
                if file.stat().st_ino == made:  # not another server's by now
                    file.unlink()


def _is_left(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
