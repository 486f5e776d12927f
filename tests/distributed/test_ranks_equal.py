"""Several ranks make what one process makes: the same latents, decisions and counts, and their share of the bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from math import prod
from typing import Any

import pytest
from lanes import full_set
from paths import ROOT

NEAR = 1e-5  # of the largest number
HELPERS = ROOT / "tests" / "helpers"
ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
CFG, TENSOR = {"cfg_parallel_size": 2}, {"tensor_parallel_size": 2}
OFTEN = [("Wan 2.1", CFG), ("Qwen-Image", ULYSSES)]  # FLUX.1 in every way beside
CASES = [
    pytest.param(family, how, marks=() if family == "FLUX.1" or (family, how) in OFTEN else full_set)
    for family in ("FLUX.1", "Wan 2.1", "Qwen-Image")
    for how in (ULYSSES, RING, CFG, TENSOR)
    if (family, how) != ("Wan 2.1", TENSOR)  # diffusers has no plan for it
]
BRANCHES_TOO = {"caches": ["plan", "inner gate"]}
WHOLE_OUTPUTS = {"caches": ["whole outputs"]}  # every rank has them
ODD, ODD_TEXT = {"size": [20, 20], "lengths": [7, 7]}, {"lengths": [7, 6]}
MORE: list[Any] = [  # of each combination what differs from its parts
    pytest.param("FLUX.1", ULYSSES | RING, BRANCHES_TOO, marks=full_set),  # four processes each
    pytest.param("FLUX.1", CFG | TENSOR, BRANCHES_TOO, marks=full_set),
    pytest.param("Qwen-Image", CFG | ULYSSES, BRANCHES_TOO, marks=full_set),
    pytest.param("Wan 2.1", CFG | RING, {"caches": ["outer gate"]}, marks=full_set),
    pytest.param("Qwen-Image", ULYSSES, ODD_TEXT | {"caches": ["off", "plan"]}, marks=full_set),
    ("Qwen-Image", ULYSSES | {"ulysses_anything": True}, ODD_TEXT | BRANCHES_TOO | {"size": [48, 16]}),
    pytest.param("FLUX.1", RING | {"ring_anything": True}, ODD | BRANCHES_TOO, marks=full_set),
    pytest.param("FLUX.1", CFG, WHOLE_OUTPUTS, marks=full_set),
    pytest.param("Wan 2.1", ULYSSES, WHOLE_OUTPUTS, marks=full_set),
]


@cache
def served(family: str, how: str, more: str) -> dict[str, Any]:
    """What `ranks_matrix.py` says of one way to serve a family, by cache."""
    environment = os.environ | {
        "OMNI_RANK_FAMILY": family,
        "OMNI_RANK_LEADER": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HELPERS / "ranks_on_cpu"), str(HELPERS)]),
    }
    command = [sys.executable, str(HELPERS / "ranks_matrix.py"), family, how, more]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and "seconds" in lines[-1], done.stderr[-3000:]
    return {line["cache"]: line for line in lines[:-1]}


def near(got: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert got.keys() == wanted.keys()
    for name, numbers in wanted.items():
        largest = max(map(abs, numbers))
        assert max(abs(a - b) for a, b in zip(got[name], numbers, strict=True)) <= NEAR * largest


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), CASES, ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_ranks_make_what_one_process_makes(family: str, how: dict[str, int]) -> None:
    """Four mixed requests, one aborted: without a cache, by plan, by gates that look before and inside the split."""
    alone, ranks = served(family, "{}", "{}"), served(family, json.dumps(how), "{}")
    turns = 0
    for name, one in alone.items():
        two = ranks[name]
        near(two["latents"], one["latents"])
        for fact in ("counts", "errors", "forwards", "steps", "left"):
            assert two[fact] == one[fact], (name, fact)
        assert one["errors"] == {"3": "RequestAbortedError"} and one["left"] == 0
        assert two["ranks"] == 2 and one["ranks"] == 1
        turns += two["steps"]
        assert two["turns"] == turns  # each had its digest
        if name != "off":
            assert one["forwards"]["skipped"] > 0, name
    whole = how == TENSOR
    assert ranks["plan"]["peak"] == alone["plan"]["peak"] * (1 if whole else 0.5)
    if how in (ULYSSES, RING):  # all that such a gate keeps is of the split tokens
        assert ranks["inner gate"]["peak"] == alone["inner gate"]["peak"] / 2
    if not whole:  # latents are kept whole, residuals are not
        assert alone["outer gate"]["peak"] / 2 <= ranks["outer gate"]["peak"] < alone["outer gate"]["peak"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how", "more"), MORE, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_combinations_make_what_one_process_makes(family: str, how: dict[str, Any], more: dict[str, Any]) -> None:
    """Tokens split in both ways, branches beside tokens or layers, and numbers of tokens that ranks cannot share."""
    asked = more if more == WHOLE_OUTPUTS else {name: value for name, value in more.items() if name != "caches"}
    alone, ranks = served(family, "{}", json.dumps(asked)), served(family, json.dumps(how), json.dumps(more))
    parts = prod(size for name, size in how.items() if name != "tensor_parallel_size")
    for name, several in ranks.items():
        one = alone[name]
        near(several["latents"], one["latents"])
        for fact in ("counts", "errors", "forwards", "steps", "left"):
            assert several[fact] == one[fact], (name, fact)
        assert several["ranks"] == prod(how.values()) and (name == "off" or one["forwards"]["skipped"] > 0)
        if name == "plan":
            least = one["peak"] / parts
            assert least <= several["peak"] <= (4 / 3 * least if "size" in more else least)
