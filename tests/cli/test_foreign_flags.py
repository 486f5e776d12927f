"""Flags that people bring along from vLLM and from other servers are accepted, or refused with a sentence.

The table in docs/serving.md is what the parser says: `PYTHONPATH=tests/helpers python tests/cli/test_foreign_flags.py`
writes it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import refused
from paths import ROOT

from vllm_omni._vllm_compat import FRONTEND_FLAGS
from vllm_omni.entrypoints.cli.flags import flag_of
from vllm_omni.entrypoints.cli.foreign_flags import ONE_DEVICE, PARALLEL, REFUSED
from vllm_omni.entrypoints.cli.serve_flags import build_parser, refuse_early, serve_config
from vllm_omni.errors import InvalidValueError, OmniError

DOC = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- flags of others -->\n", "<!-- end -->\n"
ACCEPTED = (  # by the names that vLLM and the reference have for them, with a value each
    "--served-model-name x", "--max-num-seqs 4", "--max-num-queued-reqs 9", "--dtype bfloat16", "--revision main",
    "--enforce-eager", "--no-enforce-eager", "--cache-backend mag_cache", "--cache-config {}", "--enable-cpu-offload",
    "--vae-use-slicing", "--vae-use-tiling", "--lora-modules ink=someone/ink", "--shutdown-timeout 5",
    "--quantization fp8", "--enable-layerwise-offload", "--attention-backend native", "--max-loras 2", "--log-stats",
    "--default-sampling-params {}", "--sse-keep-alive-interval 5", "--allowed-media-domains example.org",
    "--otlp-traces-endpoint http://127.0.0.1:1", "--gpu-memory-utilization 0.8", "--tensor-parallel-size 1",
    "--cfg-parallel-size 1", "--ulysses-degree 1", "--ring-degree 1", "--data-parallel-size 2", "-dp 2",
)  # fmt: skip


def answer(flag: str, value: str) -> str:
    """What is said of the flag before anything heavy is imported; "accepted" if nothing is."""
    try:
        refuse_early(["demo", "--port", "0", "--cache-backend", "magcache", flag, *value.split()])
    except InvalidValueError as error:
        return error.fix
    except OmniError as error:
        return str(error).removeprefix(flag).strip()
    return "accepted"


def table() -> str:
    rows = [(line.partition(" ")[0], line.partition(" ")[2]) for line in ACCEPTED]
    rows += [(flag_of(name), "2") for name in PARALLEL] + [(flag, "x") for flag in REFUSED]
    by_answer: dict[str, list[str]] = {}
    for flag, value in sorted(rows):
        by_answer.setdefault(answer(flag, value), []).append(f"`{flag}`")
    lines = [f"| {', '.join(flags)} | {said.replace('|', chr(92) + '|')} |" for said, flags in by_answer.items()]
    server = ", ".join(f"`{flag_of(name)}`" for name in FRONTEND_FLAGS)
    return "\n".join(["| flag | here |", "|---|---|", f"| {server} | accepted, as in `vllm serve` |", *lines]) + "\n"


def test_the_docs_show_what_the_parser_says() -> None:
    assert table() == DOC.read_text().partition(BEGIN)[2].partition(END)[0]


@pytest.mark.parametrize("line", ACCEPTED)
def test_flags_of_the_same_meaning_are_accepted(line: str) -> None:
    flag, _, value = line.partition(" ")
    assert answer(flag, value) == "accepted"


@pytest.mark.parametrize("name", PARALLEL)
def test_a_size_of_one_is_accepted_and_more_is_refused(name: str) -> None:
    for flag in (flag_of(name), *PARALLEL[name]):
        assert answer(flag, "1") == "accepted"
        assert answer(flag, "2") == ONE_DEVICE


def test_a_refusal_is_one_line_before_torch_and_vllm_are_imported() -> None:
    told = refused([f"serve demo {flag} x" for flag in REFUSED])
    assert told == [f"vllm-omni serve: {flag} {sentence}" for flag, sentence in REFUSED.items()]


@pytest.mark.slow
def test_no_refused_flag_is_one_of_ours() -> None:
    vllm = pytest.importorskip("vllm", reason="tools/setup.sh installs it")
    assert vllm
    parser = build_parser()
    together = [line for line in ACCEPTED if line not in ("--no-enforce-eager", "--enable-cpu-offload")]
    serve_config(parser.parse_args(["demo", *" ".join(together).split()]))
    for flag in REFUSED:
        with pytest.raises(SystemExit):
            parser.parse_args(["demo", flag])


if __name__ == "__main__":
    before, _, rest = DOC.read_text().partition(BEGIN)
    Path(DOC).write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    sys.exit(0)
