"""The commands: what their help shows, and what is wrong with a command line."""

from __future__ import annotations

import sys

import pytest
from commands import refused, run

from vllm_omni.entrypoints.cli.main import COMMANDS, main


def test_omni_with_another_command_is_explained() -> None:
    code = "import sys; from vllm_omni.entrypoints.cli.main import main; sys.exit(main())"
    ran = run([sys.executable, "-c", code, "chat", "--omni"])
    assert ran.returncode == 2
    assert "leave --omni out" in ran.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line of the description is there, and at least two examples."""
    try:
        code = main([command, "--help"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = capsys.readouterr().out
    assert code == 0
    assert COMMANDS[command] in shown.splitlines(), shown
    examples = shown.partition("examples:\n")[2].splitlines()
    assert sum(f" {command} " in f" {line}" for line in examples) >= 2, shown


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Generate and serve pictures" in shown
    assert all(f"{command} {summary}" in shown for command, summary in COMMANDS.items())


WRONG = [
    ("generate demo x --cache-backend magcahce", "--cache-backend must be one of", "did you mean 'magcache'?"),
    ("generate demo x --cache-backend seachache", "--cache-backend must be one of", "did you mean 'seacache'?"),
    ("generate demo x --cache-backend nothing-like-it", "'fbcache', got 'nothing-like-it'", ""),
    ("generate demo x --cache-backend magcache --cache-config fsat", "--cache-config", "did you mean 'fast'?"),
    ("generate demo x --cache balancd", "--cache must be one of 'auto'", "did you mean 'balanced'?"),
    ("generate demo x --dtype bfloat61", "--dtype must be one of 'auto'", "did you mean 'bfloat16'?"),
    ("generate demo x --device cdua:1", "--device must be one of 'cpu'", "did you mean 'cuda'?"),
    ("generate demo x --cache-backnd magcache", "--cache-backnd is not a flag", "did you mean '--cache-backend'?"),
    ("quality demo more", "'more' has no meaning here", ""),
    ("generate demo x --size 64", "--size must be WIDTHxHEIGHT", ""),
    ("generate demo x --steps 0", "--steps should be greater than or equal to 1, got 0", ""),
    ("generate demo x --max-num-seqs 0", "--max-num-seqs should be greater than or equal to 1, got 0", ""),
    ("generate demo x --out README.md", "--out cannot be written to", "got 'README.md'"),
    ("generate demo x --out README.md/more", "--out cannot be written to", ""),
    ("quality demo --out README.md", "--out cannot be written to", ""),
    ("calibrate demo --out docs", "--out must end in .json", "got 'docs'"),
    ("bench http://127.0.0.1:9 --out README.md/x.json", "--out cannot be written to", "got 'README.md'"),
    ("bench http://127.0.0.1:9 --out docs", "--out is a folder", ""),
    (["generate", "demo", " "], "prompt must not be empty", ""),
    ("generate demos x", "model 'demos' does not exist", ""),
    ("calibrate demo --prompts /no/such --dtype flot32", "--dtype", "did you mean 'float32'?"),
    ("calibrate demos --prompts README.md", "model 'demos' does not exist", ""),
    ("quality demo --settings fsat", "--settings must be one of", "did you mean 'fast'?"),
    ('quality demo --settings {"backend":"magcahce"}', "backend must be one of", "did you mean 'magcache'?"),
    ("quality demo --steps 1", "--steps must be at least 2", ""),
]


def test_what_is_wrong_is_said_before_torch_is_imported() -> None:
    for (line, *wanted), told in zip(WRONG, refused([line for line, *_ in WRONG]), strict=True):
        assert all(text in told for text in wanted), (line, told)
