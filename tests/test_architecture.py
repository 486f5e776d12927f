"""The gates of structure: sizes, layers, circles and the public surface. Reads the source; runs almost none of it.

A gate that good sense must overrule is moved here, with a line in CHANGELOG.md that says why. `test_code_rules.py` has
the gates of habit.
"""

from __future__ import annotations

import ast
import json
import re
import sys

import pytest
from paths import ROOT
from source_tree import MODULES, NAMES, PACKAGE, Module, check, functions, inside, python

CORE = "vllm_omni.diffusion"  # what must stay readable in an afternoon; serving and reports are beside it

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CORE_LINES = 8505  # 6000 until 2026-11-28; CHANGELOG.md says what came in

# Top to bottom; a module may import its own layer and every layer below. A name covers all that is under it and the
# longest name wins. A layer is one tuple per sibling; siblings never import each other.
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        (
            "vllm_omni",
            "vllm_omni.__main__",
            "vllm_omni.entrypoints",
            "vllm_omni.bench",
            "vllm_omni.quality",
            "vllm_omni.assets",
            "vllm_omni.plugin",
            "vllm_omni.collect_env",
            "vllm_omni.packages",
        ),
    ),
    (("vllm_omni.replicas",),),
    (("vllm_omni.engine", "vllm_omni.distributed"),),
    (("vllm_omni.trials", "vllm_omni.tuning"), ("vllm_omni.diffusion", "vllm_omni.diffusion.diffusion_engine")),
    (("vllm_omni.diffusion.worker",),),
    (
        ("vllm_omni.diffusion.scheduler",),
        ("vllm_omni.diffusion.cache", "vllm_omni.learning"),
        ("vllm_omni.diffusion.loader",),
    ),
    (("vllm_omni.diffusion.denoiser",), ("vllm_omni.guidance",), ("vllm_omni.distributed.peers",)),
    (("vllm_omni.diffusion.hooks",), ("vllm_omni.kernels",), ("vllm_omni.diffusion.cache.plan.schedule",)),
    (
        (
            "vllm_omni.diffusion.request",
            "vllm_omni.diffusion.data",
            "vllm_omni.diffusion.denoiser.specs",
            "vllm_omni.inputs",
            "vllm_omni.outputs",
            "vllm_omni._vllm_compat",
        ),
    ),
    (("vllm_omni.diffusion.cache.settings",), ("vllm_omni.distributed.config",)),
    (
        ("vllm_omni.settings",),
        ("vllm_omni.model_folder",),
        ("vllm_omni.cache_names",),
        ("vllm_omni.modular",),
        ("vllm_omni.nested",),
    ),
    (
        ("vllm_omni.errors", "vllm_omni.logger", "vllm_omni.envs", "vllm_omni.version", "vllm_omni.driver"),
        ("vllm_omni.files",),
    ),
)
BOTTOM = len(LAYERS) - 1
# These two stand for a file, not for everything under it: a new module must be given a layer.
EXACT = {"vllm_omni", "vllm_omni.diffusion"}


def _layer(name: str) -> tuple[int, int] | None:
    """(row in LAYERS, sibling group in that row) of a module, or None if it has none."""
    best, place = "", None
    for row, groups in enumerate(LAYERS):
        for column, names in enumerate(groups):
            for owner in names:
                covers = name == owner or (owner not in EXACT and name.startswith(owner + "."))
                if covers and len(owner) > len(best):
                    best, place = owner, (row, column)
    return place


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_files_are_short() -> None:
    long = [f"{module.at(1)} has {module.lines} lines" for module in MODULES if module.lines > MAX_FILE_LINES]
    check(long, f"a file has at most {MAX_FILE_LINES} lines")


def test_test_files_are_short() -> None:
    tests = [*(ROOT / "tests").rglob("*.py")]
    assert len(tests) > 50
    long = [(file.relative_to(ROOT), len(file.read_text(encoding="utf-8").splitlines())) for file in tests]
    check([f"{file} has {n} lines" for file, n in long if n > MAX_FILE_LINES], f"at most {MAX_FILE_LINES} lines")


def test_functions_are_short() -> None:
    long = []
    for module in MODULES:
        for function in functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{module.at(function.lineno)} {function.name} has {length} lines")
    check(long, f"a function has at most {MAX_FUNCTION_LINES} lines")


def test_core_is_small() -> None:
    core = [module for module in MODULES if module.name.startswith(CORE)]
    total = sum(module.lines for module in core)
    largest = sorted(core, key=lambda module: -module.lines)[:5]
    detail = ", ".join(f"{module.at(1)} {module.lines}" for module in largest)
    assert total <= MAX_CORE_LINES, f"{CORE} has {total} lines, at most {MAX_CORE_LINES}; largest: {detail}"


# -------------------------------------------------------------------------------------------------------------- imports


def test_every_module_has_a_layer() -> None:
    homeless = [f"{module.at(1)} ({module.name})" for module in MODULES if _layer(module.name) is None]
    check(homeless, "every module belongs to a layer: add it to LAYERS in tests/test_architecture.py")


def test_imports_only_point_down() -> None:
    wrong = []
    for module in MODULES:
        here = _layer(module.name)
        for entry in module.imports:
            there = _layer(entry.target) if inside(entry.target) else None
            if entry.typing_only or here is None or there is None:
                continue
            if there[0] < here[0]:
                wrong.append(f"{module.at(entry.line)} imports {entry.target}, {here[0] - there[0]} layer(s) up")
            elif there[0] == here[0] and there[1] != here[1]:
                wrong.append(f"{module.at(entry.line)} imports its sibling {entry.target}")
    check(wrong, "imports point down, also those inside functions")


def test_imports_of_the_package_resolve() -> None:
    unknown = [
        f"{module.at(entry.line)} imports {entry.target}"
        for module in MODULES
        for entry in module.imports
        if inside(entry.target) and entry.target not in NAMES
    ]
    check(unknown, "every import of our own names a file that exists")


def test_no_import_cycles() -> None:
    """Imports inside functions and for type checkers count: who knows whom is what a reader must follow."""
    graph = {
        module.name: sorted({e.target for e in module.imports if e.target in NAMES and e.target != module.name})
        for module in MODULES
    }
    check([" -> ".join(cycle) for cycle in _cycles(graph)], "modules import each other in no circle")


def test_the_cycle_gate_sees_nested_and_typing_imports() -> None:
    source = """
from typing import TYPE_CHECKING
from importlib import import_module
if TYPE_CHECKING:
    from vllm_omni.errors import OmniError
def late() -> None:
    from vllm_omni import logger
    import_module("vllm_omni.envs")
"""
    file = ROOT / PACKAGE / "nowhere.py"
    module = Module(file)
    vars(module)["text"] = source
    seen = {(entry.target, entry.nested, entry.typing_only) for entry in module.imports if inside(entry.target)}
    assert seen == {
        ("vllm_omni.errors", False, True), ("vllm_omni.logger", True, False), ("vllm_omni.envs", True, False)
    }  # fmt: skip
    assert _cycles({"a": ["b"], "b": ["c"], "c": ["a"]}) == [["a", "b", "c", "a"]]


def _cycles(graph: dict[str, list[str]]) -> list[list[str]]:
    """One circle per back edge of a depth-first walk: empty exactly when the graph has none."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        for target in graph[name]:
            if target in path:
                found.append([*path[path.index(target) :], target])
            elif target not in done:
                walk(target, [*path, target])
        done.add(name)

    for name in graph:
        if name not in done:
            walk(name, [name])
    return found


def test_bottom_layer_is_standard_library_only() -> None:
    wrong = []
    for module in MODULES:
        place = _layer(module.name)
        if place is None or place[0] != BOTTOM:
            continue
        for entry in module.imports:
            root = entry.target.split(".")[0]
            if root != PACKAGE and root not in sys.stdlib_module_names:
                wrong.append(f"{module.at(entry.line)} imports {entry.target}")
    check(wrong, "errors, logger, envs and version use the standard library only")


def test_the_scheduler_imports_no_torch() -> None:
    wrong = [
        f"{module.at(entry.line)} imports {entry.target}"
        for module in MODULES
        if module.name.startswith("vllm_omni.diffusion.sched")
        for entry in module.imports
        if entry.target.split(".")[0] == "torch"
    ]
    check(wrong, "diffusion/sched imports no torch, not even for typing")


# -------------------------------------------------------------------------------------------------------------- surface


def test_import_loads_nothing_but_the_standard_library() -> None:
    """What makes it quick anywhere; `benchmarks/startup.py` has the seconds."""
    code = "import sys; before = set(sys.modules); import vllm_omni; print(*sorted(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in python(code).split()}
    foreign = loaded - {PACKAGE} - set(sys.stdlib_module_names)
    assert PACKAGE in loaded and not foreign, f"import {PACKAGE} loads {', '.join(sorted(foreign))}"


def test_public_names_are_lazy() -> None:
    package = NAMES[PACKAGE]
    names = {node.name for node in package.tree.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" in names, f"{package.at(1)} defines no module-level __getattr__"
    public = json.loads(python("import json, vllm_omni; print(json.dumps(list(vllm_omni.__all__)))"))
    assert public == sorted(public), f"{package.at(1)} __all__ is not sorted: {public}"
    missing = {"AsyncOmni", "DiffusionCacheConfig", "Omni", "OmniDiffusionSamplingParams"} - set(public)
    assert not missing, f"{package.at(1)} __all__ lacks {', '.join(sorted(missing))}"


@pytest.mark.slow
def test_public_names_exist() -> None:
    code = "import vllm_omni\nfor name in vllm_omni.__all__:\n    getattr(vllm_omni, name)"
    python(code)


@pytest.mark.slow
def test_core_runs_without_vllm() -> None:
    core = [name for name in NAMES if name.startswith("vllm_omni.diffusion")]
    code = f"""
import importlib, sys, traceback
sys.modules["vllm"] = None
failed = []
for name in {core!r}:
    try:
        importlib.import_module(name)
    except Exception:
        failed.append(name + ": " + traceback.format_exc().strip().splitlines()[-1])
print("\\n".join(failed))
"""
    check([line for line in python(code).splitlines() if line], "the core imports where vLLM is absent")


@pytest.mark.parametrize("source", ["CHANGELOG.md", "pyproject.toml"])
def test_the_version_is_the_same_everywhere(source: str) -> None:
    pattern = r"^## \[(\d[^\]]*)\]" if source.endswith(".md") else r'^version = "([^"]+)"'
    found = re.search(pattern, (ROOT / source).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{source} names no version"
    version = python("import vllm_omni.version; print(vllm_omni.version.__version__)").strip()
    assert found[1] == version, f"{source} says {found[1]}, vllm_omni/version.py says {version}"
