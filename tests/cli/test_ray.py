"""`vllm-omni ray`: what its command line becomes, and what is refused, without Ray."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

import pytest
from commands import refused, run

from vllm_omni.entrypoints.cli import ray
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.entrypoints.openai.middleware import LOOPBACK
from vllm_omni.entrypoints.ray_config import RayConfig, RayOptions, app_config
from vllm_omni.entrypoints.serve_config import with_calibration
from vllm_omni.errors import InvalidValueError, UnknownKeyError


def parsed(*words: str) -> RayConfig:
    parser = argparse.ArgumentParser()
    ray.add_parser(parser.add_subparsers(dest="command"), "summary")
    return ray.ray_config(parser.parse_args(["ray", *words]))


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    config = parsed("demo")
    assert config.options == RayOptions() and config.http.host == "127.0.0.1" and not config.http.api_key
    words = "--replicas 2 --max-replicas 4 --target-queued 10 --gpus-per-replica 0.5 --port 81 --max-steps 9"
    config = parsed("demo", *words.split(), "--cache-backend", "magcache", "--max-num-seqs", "4", "--api-key", "k")
    options = config.options
    assert (options.replicas, options.max_replicas, options.target_queued_s) == (2, 4, 10)
    assert options.gpus_per_replica == 0.5
    assert config.http.port == 81 and config.http.api_key == ("k",) and config.limits.max_steps == 9
    args = config.serve_config().engine_args
    assert args["max_num_seqs"] == 4 and args["max_inference_steps"] == 9 and args["model"] == "demo"
    assert args["cache_config"] == {"calibrate": "auto"}
    again = RayConfig(**config.model_dump(mode="json", exclude_unset=True))  # as it goes to the front
    assert again.serve_config() == config.serve_config()


def test_what_makes_no_sense_is_refused_by_name() -> None:
    for words, text in (
        ("--replicas 4 --max-replicas 2", "--max-replicas must be at least replicas, 4, got 2"),
        ("--replicas 0", "--replicas should be greater than or equal to 1"),
        ("--max-num-seqs 0", "--max-num-seqs"),
        ("--cache-backend magcahe", "did you mean 'magcache'"),
        ("--port 70000", "--port"),
    ):
        with pytest.raises(InvalidValueError, match=text):
            parsed("demo", *words.split())
    with pytest.raises(UnknownKeyError, match="did you mean 'replicas'"):
        RayOptions(replica=2)


def test_a_wrong_model_and_flag_are_refused_before_ray_is_imported() -> None:
    told = refused(["ray /nowhere/model", "ray demo --replcas 2"])
    assert "/nowhere/model" in told[0] and "did you mean '--replicas'" in told[1]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_the_command_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ray", "demo"]) == 2
    assert "pip install 'vllm-omni-magcache[ray]'" in capsys.readouterr().err


def test_the_help_names_the_flags() -> None:
    ran = run([sys.executable, "-m", "vllm_omni", "ray", "--help"])
    assert ran.returncode == 0
    for flag in ("--replicas", "--max-replicas", "--address", "--cache-backend", "--max-steps", "--host"):
        assert flag in ran.stdout


def test_args_of_a_config_file_are_served_as_the_same_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from outside")
    engine = {"cache_backend": "magcache", "max_num_seqs": 4}
    file = app_config({"model": "demo", "engine_args": engine, "options": {"max_replicas": 4}, "replicas": "2"})
    words = "--cache-backend magcache --max-num-seqs 4 --replicas 2 --max-replicas 4"
    command = parsed("demo", *words.split())
    anywhere = file.http.model_copy(update={"host": command.http.host})
    served = file.serve_config().model_copy(update={"http": anywhere})
    assert served == command.serve_config() and file.options == command.options
    assert file.http.api_key == ("from outside",)
    assert file.serve_config().engine_args["cache_config"] == {"calibrate": "auto"}
    asked = engine | {"cache_config": {"calibrate": "off"}}
    own = app_config({"model": "demo", "engine_args": asked, "http": {"api_key": ["own"]}})
    assert own.http.api_key == ("own",) and own.serve_config().engine_args["cache_config"] == {"calibrate": "off"}


def test_with_a_key_an_application_of_serve_answers_to_any_name_and_without_one_to_those_allowed() -> None:
    keyed = app_config({"model": "demo", "http": {"api_key": ["k"]}}).serve_config()
    assert keyed.http.host not in LOOPBACK, "no name is refused"
    plain = app_config({"model": "demo", "allowed_hosts": ["pictures.example"]}).serve_config()
    assert plain.http.host in LOOPBACK and plain.allowed_hosts == ("pictures.example",)


def test_where_serve_listens_is_refused_in_args_with_its_place() -> None:
    for field, args in (("port", {"port": 81}), ("http.host", {"http": {"host": "0.0.0.0"}})):
        with pytest.raises(InvalidValueError, match=r"http_options.*serve start --http-host") as refused:
            app_config({"model": "demo"} | args)
        assert refused.value.field == field
    with pytest.raises(InvalidValueError, match="http must hold fields of HttpOptions"):
        app_config({"model": "demo", "http": "0.0.0.0"})


@pytest.mark.parametrize("name", ["magcache", "mag_cache", "MagCache"])
def test_a_server_learns_whatever_the_spelling(name: str) -> None:
    assert with_calibration({"cache_backend": name})["cache_config"] == {"calibrate": "auto"}
