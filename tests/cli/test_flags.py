"""Flags are made from the fields of settings: nothing about a limit is written anywhere but in its field."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.entrypoints.cli.flags import add_flags, flag_of, given, named_by_flag
from vllm_omni.entrypoints.cli.serve_flags import add_own_flags, serve_config
from vllm_omni.entrypoints.serve_config import Limits, ServeConfig
from vllm_omni.errors import InvalidValueError


def parsed(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_own_flags(parser)
    return parser.parse_args(["demo", *line.split()])


def test_a_server_has_few_settings() -> None:
    assert len(ServeConfig.model_fields) <= 25


@pytest.mark.parametrize("name", Limits.model_fields)
def test_each_limit_is_a_flag_with_its_help_and_default(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Limits)
    field, told = Limits.model_fields[name], " ".join(parser.format_help().split())
    default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    assert f"{field.description} (default: {default})" in told
    assert getattr(serve_config(parsed(f"{flag_of(name)} 9")).limits, name) == 9
    assert getattr(serve_config(parsed("")).limits, name) == field.default


def test_a_flag_that_is_not_given_leaves_no_trace() -> None:
    assert given(parsed(""), Limits) == {} == given(parsed(""), ServeConfig)
    assert given(parsed(""), OmniDiffusionConfig) == {"model": "demo"}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--no-warmup", "warmup", False),
        ("--no-png-metadata", "png_metadata", False),
        ("--ui", "ui", True),
        ("--shutdown-timeout 2.5", "shutdown_timeout_s", 2.5),
        ("--sse-keep-alive-interval 3", "sse_keep_alive_interval_s", 3.0),
        ("--served-model-name a b", "served_model_name", ("a", "b")),
        ("--allowed-media-domains x.org y.org", "allowed_media_domains", ("x.org", "y.org")),
        ("--otlp-traces-endpoint http://x", "otlp_traces_endpoint", "http://x"),
    ],
)
def test_what_a_flag_says_arrives(line: str, name: str, value: Any) -> None:
    assert getattr(serve_config(parsed(line)), name) == value


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--cache-backend Mag-Cache", "cache_backend", "magcache"),
        ('--cache-backend tea_cache --cache-config {"rel_l1_thresh":0.2}', "cache_config", {"rel_l1_thresh": 0.2}),
        ("--no-enforce-eager", "enforce_eager", False),
        ("--vae-use-tiling", "vae_use_tiling", True),
        ("--dtype bf16", "dtype", "bf16"),
        ("--lora-modules ink=a/ink clay=b/clay", "lora_modules", {"ink": "a/ink", "clay": "b/clay"}),
        ("--max-steps 40", "max_inference_steps", 40),
        ("--max-pixels 4096", "max_image_pixels", 4096),
    ],
)
def test_what_a_flag_says_reaches_the_engine(line: str, name: str, value: Any) -> None:
    assert serve_config(parsed(line)).engine_args[name] == value


def test_vllms_name_for_the_queue_is_known() -> None:
    assert serve_config(parsed("--max-num-queued-reqs 7")).limits.max_queued_requests == 7


def test_an_error_names_the_flag() -> None:
    with pytest.raises(InvalidValueError, match=r"^--request-timeout should be greater than 0, got 0"):
        serve_config(parsed("--request-timeout 0"))
    with pytest.raises(InvalidValueError, match=r"^--steps should be"), named_by_flag(Limits, max_n="--steps"):
        Limits(max_n=0)
    with pytest.raises(InvalidValueError, match=r"^port should be"), named_by_flag(Limits):
        ServeConfig(engine_args={"model": "demo"}, http={"port": -1})  # not a field of those: as it is


@pytest.mark.parametrize(
    ("line", "config"),
    [
        ("--cache-backend magcache", {"calibrate": "auto"}),
        ("--cache-backend magcache --cache-config fast", {"calibrate": "auto", "preset": "fast"}),
        ('--cache-backend magcache --cache-config {"calibrate":"off"}', {"calibrate": "off"}),
        ("--cache-backend fbcache", None),
        ("", None),
    ],
)
def test_a_server_learns_profiles_unless_told_otherwise(line: str, config: dict[str, Any] | None) -> None:
    assert serve_config(parsed(line)).engine_args.get("cache_config") == config
