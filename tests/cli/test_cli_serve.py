"""The doors to the server: `vllm serve --omni`, the plugin without it, what goes back to vLLM, and what is refused."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from paths import ROOT

from vllm_omni import check, plugin
from vllm_omni.entrypoints.cli import serve
from vllm_omni.errors import InvalidValueError

VLLM = Path(sys.executable).with_name("vllm")

needs_vllm = pytest.mark.skipif(not VLLM.exists(), reason="no vLLM beside this Python; tools/setup.sh installs it")
PLUGIN = [entry for entry in entry_points(group="vllm.general_plugins") if entry.value == "vllm_omni.plugin:register"]
needs_plugin = pytest.mark.skipif(not PLUGIN, reason="this package is not installed here; tools/setup.sh installs it")


def run(words: Sequence[str | Path], path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=240, env=environment)


@needs_vllm
def test_vllm_hands_over_with_omni() -> None:
    ran = run([VLLM, "serve", "demo", "--omni", "--cache-backend", "magcahce"])
    assert ran.returncode == 2
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-omni serve: cache_backend must be one of 'none', 'magcache'"), last
    assert last.endswith("got 'magcahce'")


BAD = [
    ("demo --cache-backend magcahce", "cache_backend must be one of 'none', 'magcache'"),
    ("demo --cache_config {", "--cache-config must be JSON"),
    ("demo --cache-config=fastest", "--cache-config must be JSON"),
    ("demo --host 0.0.0.0 --max-steps 0", "max_steps"),
    ("demo --max-steps many", "argument --max-steps: invalid int value: 'many'"),
    ("demo --port 1 --max-body-mb nan", "max_body_mb"),
    ("demo --tensor-parallel-size 2", "--tensor-parallel-size must be 1"),
    ("demo --lora-modules ink", "--lora-modules must be NAME=PATH"),
    ("no/such/model --ui", "'no/such/model' does not exist"),
    ("--max-n 65 demo", "max_n"),
]


@needs_vllm
def test_own_flags_are_refused_before_vllm_is_imported() -> None:
    code = (
        "import sys; from vllm_omni.entrypoints.cli.main import main\n"
        "for line in sys.argv[1:]:\n"
        "    try: code = main(['serve', *line.split()])\n"
        "    except SystemExit as error: code = error.code\n"
        "    assert code == 2, line\n"
        "    assert not {'vllm', 'torch'} & set(sys.modules), line\n"
    )
    ran = run([sys.executable, "-c", code, *(line for line, _ in BAD)])
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if ": " in line and not line.startswith("usage")]
    assert len(told) == len(BAD), ran.stderr
    for (_, wanted), line in zip(BAD, told, strict=True):
        assert wanted in line, (wanted, line)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("demo --api-key A B --ui", "demo --api-key *** *** --ui"),
        ("demo --api_key=A", "demo --api-key=***"),
        ("--api A --max-n 2 demo", "--api *** --max-n 2 demo"),
    ],
)
def test_keys_are_not_in_ps(words: str, shown: str) -> None:
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


@needs_vllm
@needs_plugin
def test_vllm_hands_over_without_omni() -> None:
    ran = run([VLLM, "serve", "demo", "--cache-backend", "magcahce"])
    assert ran.returncode == 2
    assert "vllm-omni serve: cache_backend must be one of" in ran.stderr


@needs_vllm
def test_vllm_keeps_what_is_its_own() -> None:
    ran = run([VLLM, "--version"])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().startswith("0.32")


@needs_vllm
def test_flags_in_the_docs_exist() -> None:
    told = argparse.ArgumentParser.format_help(serve.build_parser())  # all of it: vLLM's own is cut short
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", told)) | {
        "--help",
        "--config",
    }  # vLLM's parser takes that one before
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", (ROOT / "docs" / "serving.md").read_text()))
    assert len(named) > 5 and named <= flags, named - flags


@needs_vllm
def test_where_the_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, else a file, else the environment, as vLLM has it; a blank variable is no key."""
    from vllm_omni.entrypoints.cli import serve

    file = tmp_path / "serve.yaml"
    file.write_text("api-key: [from-file]\nmax-n: 3\n")

    def keys(*words: str) -> tuple[str, ...]:
        return serve.serve_config(serve.build_parser().parse_args(["demo", *words])).api_keys

    assert keys() == ()
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    assert keys() == ("from-environment",)
    assert keys("--config", str(file)) == ("from-file",)
    assert keys("--config", str(file), "--api-key", "a", "b") == ("a", "b")
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert keys() == ()


def test_omni_with_another_command_is_explained() -> None:
    code = "import sys; from vllm_omni.entrypoints.cli.main import main; sys.exit(main())"
    ran = run([sys.executable, "-c", code, "bench", "serve", "--omni"])
    assert ran.returncode == 2
    assert "leave --omni out" in ran.stderr


def test_a_misspelt_profile_is_said_before_a_model_loads() -> None:
    assert serve._cache_config('{"profile": "demo"}') == {"profile": "demo"}
    with pytest.raises(InvalidValueError, match="must be a profile file, or a name such as 'demo', got 'dmo'"):
        serve._cache_config('{"profile": "dmo"}')


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
def test_plugin_takes_only_what_is_ours(line: str, ours: bool) -> None:
    assert plugin.is_ours(line.split()) is ours


def test_plugin_knows_a_diffusers_folder(tmp_path: Path) -> None:
    assert not plugin.is_ours(["serve", str(tmp_path)])
    (tmp_path / "model_index.json").write_text("{}")
    assert plugin.is_ours(["serve", str(tmp_path)])


def _fake(folder: Path, name: str, cuda: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (folder / name / "version.py").write_text(f"__version__ = '0.28.0'\ncuda = {cuda}\n")


def test_broken_torchvision_is_hidden(tmp_path: Path) -> None:
    for name in check.BROKEN_WITH_CPU_TORCH:
        _fake(tmp_path, name, "'13.0'")
    _fake(tmp_path, "torch", "None")
    code = (
        "from importlib.util import find_spec; from vllm_omni import check; print(check.hide_broken_packages());"
        f"assert all(find_spec(name) is None for name in {check.BROKEN_WITH_CPU_TORCH!r})"
    )
    ran = run([sys.executable, "-c", code], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(list(check.BROKEN_WITH_CPU_TORCH))


def test_matching_builds_are_left_alone(tmp_path: Path) -> None:
    _fake(tmp_path, "torch", "'13.0'")
    _fake(tmp_path, "torchvision", "'13.0'")
    ran = run([sys.executable, "-c", "from vllm_omni import check; print(check.hide_broken_packages())"], tmp_path)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_check_tells_of_a_rival_and_of_broken_builds(tmp_path: Path) -> None:
    _fake(tmp_path, "torchvision", "'13.0'")
    _fake(tmp_path, "torch", "None")
    rival = tmp_path / "vllm_omni-0.30.0.dist-info"
    rival.mkdir()
    (rival / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-omni\nVersion: 0.30.0\n")
    ran = run([sys.executable, "-m", "vllm_omni.check"], tmp_path)
    assert ran.returncode == 1, ran.stderr
    assert "problem: vllm-omni 0.30.0 is installed beside" in ran.stdout
    assert "pip uninstall -y torchvision" in ran.stdout
