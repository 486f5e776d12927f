"""`vllm serve --omni`, the plugin without the flag, what goes back to vLLM, and command lines that are refused."""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from commands import refused, run
from paths import ROOT

from vllm_omni import plugin
from vllm_omni.entrypoints.cli import bench, serve, serve_flags
from vllm_omni.entrypoints.cli.flags import flags_of
from vllm_omni.entrypoints.cli.values import cache_settings
from vllm_omni.entrypoints.serve_config import HttpOptions
from vllm_omni.errors import InvalidValueError

VLLM = Path(sys.executable).with_name("vllm")

needs_vllm = pytest.mark.skipif(not VLLM.exists(), reason="no vLLM beside this Python; tools/setup.sh installs it")
PLUGIN = [entry for entry in entry_points(group="vllm.general_plugins") if entry.value == "vllm_omni.plugin:register"]
needs_plugin = pytest.mark.skipif(not PLUGIN, reason="this package is not installed here; tools/setup.sh installs it")


@pytest.mark.slow
@needs_vllm
def test_vllm_serve_with_omni_starts_this_server() -> None:
    ran = run([VLLM, "serve", "demo", "--omni", "--cache-backend", "magcahce"])
    assert ran.returncode == 2
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-omni serve: --cache-backend must be one of 'none', 'magcache'"), last
    assert last.endswith("got 'magcahce'; did you mean 'magcache'?")


BAD = [
    ("demo --cache-backend magcahce", "got 'magcahce'; did you mean 'magcache'"),
    ("demo --cache-backend cache_dit", "--cache-backend keeps one state per model"),
    ("demo --cache_config {", "--cache-config must be JSON"),
    ("demo --cache-backend magcache --cache-config=fastest", "got 'fastest'; did you mean 'fast'?"),
    ("demo --dtype bfloat61", "--dtype must be one of"),
    ("demo --host 0.0.0.0 --max-steps 0", "--max-steps should be greater than or equal to 1, got 0"),
    ("demo --max-steps many", "argument --max-steps: invalid int value: 'many'"),
    ("demo --port 1 --max-body-mb nan", "--max-body-mb should be a finite number"),
    ("demo --pipeline-parallel-size 2", "--pipeline-parallel-size must be 1"),
    ("demo --lora-modules ink", "--lora-modules must be NAME=PATH"),
    ("demo --cache-backnd magcache", "--cache-backnd is not a flag of this command; did you mean '--cache-backend'?"),
    ("no/such/model --ui", "'no/such/model' does not exist"),
    ("demo --lora-modules ink=a/a demo=b/b", "--lora-modules must not name an adapter as the model is named"),
    ("demo --served-model-name ink --lora-modules ink=a/a", "--lora-modules must not name an adapter"),
    ("demo --port 0 --ssl-certfile no.pem", "--ssl-certfile cannot be used (No such file or directory), got 'no.pem'"),
    ("demo --port 0 --ssl_keyfile README.md", "--ssl-keyfile needs the certificate beside it"),
    ("demo --port 0 --middleware no.such.thing", "--middleware cannot be imported (No module named 'no')"),
    ("demo --port 0 --store-dir README.md", "--store-dir must be a folder to write to"),
    ("demo --config missing.yaml", "--config cannot be read (No such file or directory), got 'missing.yaml'"),
    ("demo --config=README.md", "--config must be a file.yaml, got 'README.md'"),
    ("--max-n 65 demo", "--max-n should be less than or equal to 64, got 65"),
]


@needs_vllm
def test_own_flags_are_refused_before_vllm_is_imported() -> None:
    for (line, wanted), told in zip(BAD, refused([f"serve {line}" for line, _ in BAD]), strict=True):
        assert wanted in told, (line, told)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("demo --api-key A B --ui", "demo --api-key *** *** --ui"),
        ("demo --api_key=A", "demo --api-key=***"),
        ("--api A --max-n 2 demo", "--api *** --max-n 2 demo"),
    ],
)
def test_keys_are_hidden_in_the_process_list(words: str, shown: str) -> None:
    """Nor is anything else changed; a process without a key keeps its command line."""
    pytest.importorskip("setproctitle")
    code = (
        "import sys; from vllm_omni.entrypoints.cli.serve import hide_keys; hide_keys(sys.argv[2:]);"
        "print(open('/proc/self/cmdline').read().replace(chr(0), ' ').strip())"
    )
    ran = run([sys.executable, "-c", code, "serve", *words.split()])
    assert ran.stdout.strip().endswith(f" serve {shown}"), ran.stdout + ran.stderr
    ran = run([sys.executable, "-c", code, "serve", "demo", "--ui"])
    assert ran.stdout.strip().endswith(" serve demo --ui"), ran.stdout + ran.stderr


@pytest.mark.slow
@needs_vllm
@needs_plugin
def test_the_plugin_starts_this_server_without_omni() -> None:
    ran = run([VLLM, "serve", "demo", "--cache-backend", "magcahce"])
    assert ran.returncode == 2
    assert "vllm-omni serve: --cache-backend must be one of" in ran.stderr


@pytest.mark.slow
@needs_vllm
def test_vllm_serves_its_own_models() -> None:
    ran = run([VLLM, "--version"])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().startswith("0.32")


@needs_vllm
def test_flags_in_the_docs_exist() -> None:
    def named(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))

    serving, _, load = (ROOT / "docs" / "serving.md").read_text().partition("## Load")
    told = argparse.ArgumentParser.format_help(serve_flags.build_parser())  # all of it: vLLM's own is cut short
    asked, known = named(serving), named(told) | {"--help", "--config"}  # vLLM's parser takes that one before
    assert len(asked) > 5 and asked <= known, asked - known
    commands = argparse.ArgumentParser().add_subparsers()
    asked = named(load.partition("## Flags of other servers")[0])
    known = flags_of(bench.add_parser(commands, ""))
    assert len(asked) > 5 and asked <= known, asked - known


@needs_vllm
def test_keys_come_from_flags_environment_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, else a file, else the environment, as vLLM has it; a blank variable is no key."""
    file = tmp_path / "serve.yaml"
    file.write_text("api-key: [from-file]\nmax-n: 3\n")

    def http(*words: str) -> HttpOptions:
        return serve_flags.serve_config(serve_flags.build_parser().parse_args(["demo", *words])).http

    def keys(*words: str) -> tuple[str, ...]:
        return http(*words).api_key

    assert keys() == ()
    monkeypatch.setenv("VLLM_API_KEY", "from-environment\n")
    assert keys() == ("from-environment",)
    assert keys("--config", str(file)) == ("from-file",)
    assert keys("--config", str(file), "--api-key", "a", "b") == ("a", "b")
    for blank in ("", " \n"):
        monkeypatch.setenv("VLLM_API_KEY", blank)
        assert keys() == ()
    assert http("--disable-access-log-for-endpoints", "/metrics,/ping").quiet_paths == {"/metrics", "/ping"}


@needs_vllm
def test_connections_are_kept_as_long_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept_s() -> int:
        parsed = serve_flags.build_parser().parse_args(["demo"])
        return serve.uvicorn_options(parsed, serve_flags.serve_config(parsed))["timeout_keep_alive"]

    monkeypatch.delenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", raising=False)
    assert kept_s() == 5
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    assert kept_s() == 75
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "1 min")
    with pytest.raises(InvalidValueError, match="VLLM_HTTP_TIMEOUT_KEEP_ALIVE must be a whole number of seconds"):
        kept_s()


def test_a_misspelt_profile_is_refused_before_a_model_loads() -> None:
    assert cache_settings('{"profile": "demo"}') == {"profile": "demo"}
    with pytest.raises(InvalidValueError, match="must be a profile file, or a name such as 'demo', got 'dmo'"):
        cache_settings('{"profile": "dmo"}')


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("serve demo --cache-backend magcache", True),
        ("serve demo --cache_config=fast", True),
        ("serve some-llm --max-num-seqs 4", False),
        ("bench serve --cache-backend magcache", False),
        ("--version", False),
        ("", False),
    ],
)
def test_the_plugin_takes_only_diffusion_commands(line: str, ours: bool) -> None:
    assert plugin.is_ours(line.split()) is ours


def test_the_plugin_recognises_a_diffusers_folder(tmp_path: Path) -> None:
    assert not plugin.is_ours(["serve", str(tmp_path)])
    (tmp_path / "model_index.json").write_text("{}")
    assert plugin.is_ours(["serve", str(tmp_path)])
