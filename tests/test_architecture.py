"""The gates of taste, measured: sizes, imports, annotations, dangerous calls. Reads the source; runs almost none of it.

A gate that good sense must overrule is moved here, with a line in CHANGELOG.md that says why.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = "vllm_omni"
CORE = "vllm_omni.diffusion"  # what must stay readable in an afternoon; serving and reports are beside it

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CORE_LINES = 6000
MAX_ATTRIBUTE_QUESTIONS_PER_KLOC = 3.0  # getattr + hasattr
MAX_BROAD_EXCEPTS_PER_KLOC = 0.5
BROAD_EXCEPTS_ALWAYS_ALLOWED = 4  # a package this small has its few real boundaries too
MAX_IMPORT_SECONDS = 0.3

# Top to bottom; a module may import its own layer and every layer below. A name covers all that is under it and the
# longest name wins. A layer is one tuple per sibling; siblings never import each other.
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        (
            "vllm_omni",
            "vllm_omni.__main__",
            "vllm_omni.entrypoints",
            "vllm_omni.quality",
            "vllm_omni.assets",
            "vllm_omni.plugin",
            "vllm_omni.collect_env",
            "vllm_omni.packages",
        ),
    ),
    (("vllm_omni.engine",),),
    (("vllm_omni.diffusion", "vllm_omni.diffusion.diffusion_engine"),),
    (("vllm_omni.diffusion.worker",),),
    (("vllm_omni.diffusion.sched",), ("vllm_omni.diffusion.cache",), ("vllm_omni.diffusion.loader",)),
    (("vllm_omni.diffusion.hooks", "vllm_omni.kernels", "vllm_omni.diffusion.kernels"),),
    (
        (
            "vllm_omni.diffusion.request",
            "vllm_omni.diffusion.data",
            "vllm_omni.diffusion.settings",
            "vllm_omni.diffusion.denoisers",
            "vllm_omni.inputs",
            "vllm_omni.outputs",
            "vllm_omni._vllm_compat",
        ),
    ),
    (("vllm_omni.errors", "vllm_omni.logger", "vllm_omni.envs", "vllm_omni.version"),),
)
BOTTOM = len(LAYERS) - 1
# These two stand for a file, not for everything under it: a new module must be given a layer.
EXACT = {"vllm_omni", "vllm_omni.diffusion"}


@dataclass(frozen=True)
class Import:
    """One imported name: the dotted target, where, and when it happens."""

    target: str
    line: int
    nested: bool  # inside a function: runs later, so it makes no cycle
    typing_only: bool  # under `if TYPE_CHECKING`: never runs


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if self.is_package else parts)

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self, self.tree, nested=False, typing_only=False))


def _imports(module: Module, node: ast.AST, *, nested: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, nested, typing_only)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(module, child)
            for alias in child.names:
                yield Import(_resolve(base, alias.name), child.lineno, nested, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _imports(module, ast.Module([statement], []), nested=nested, typing_only=True)
            for statement in child.orelse:
                yield from _imports(module, ast.Module([statement], []), nested=nested, typing_only=typing_only)
        else:
            inside = nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(module, child, nested=inside, typing_only=typing_only)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    up = node.level - 1 if module.is_package else node.level
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _resolve(base: str, name: str) -> str:
    """`from base import name` means the submodule if there is one, else the module `base` itself."""
    return f"{base}.{name}" if f"{base}.{name}" in NAMES else base


MODULES = tuple(Module(path) for path in sorted((ROOT / PACKAGE).rglob("*.py")))
NAMES = {module.name: module for module in MODULES}
KLOC = sum(module.lines for module in MODULES) / 1000


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


def _inside(target: str) -> bool:
    return target == PACKAGE or target.startswith(PACKAGE + ".")


def _functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _check(problems: list[str], rule: str) -> None:
    assert not problems, f"{rule}; {len(problems)} found:\n  " + "\n  ".join(problems)


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_files_are_short() -> None:
    long = [f"{module.at(1)} has {module.lines} lines" for module in MODULES if module.lines > MAX_FILE_LINES]
    _check(long, f"a file has at most {MAX_FILE_LINES} lines")


def test_functions_are_short() -> None:
    long = []
    for module in MODULES:
        for function in _functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{module.at(function.lineno)} {function.name} has {length} lines")
    _check(long, f"a function has at most {MAX_FUNCTION_LINES} lines")


def test_core_is_small() -> None:
    core = [module for module in MODULES if module.name.startswith(CORE)]
    total = sum(module.lines for module in core)
    largest = sorted(core, key=lambda module: -module.lines)[:5]
    detail = ", ".join(f"{module.at(1)} {module.lines}" for module in largest)
    assert total <= MAX_CORE_LINES, f"{CORE} has {total} lines, at most {MAX_CORE_LINES}; largest: {detail}"


# -------------------------------------------------------------------------------------------------------------- imports


def test_every_module_has_a_layer() -> None:
    homeless = [f"{module.at(1)} ({module.name})" for module in MODULES if _layer(module.name) is None]
    _check(homeless, "every module belongs to a layer: add it to LAYERS in tests/test_architecture.py")


def test_imports_only_point_down() -> None:
    wrong = []
    for module in MODULES:
        here = _layer(module.name)
        for entry in module.imports:
            there = _layer(entry.target) if _inside(entry.target) else None
            if entry.typing_only or here is None or there is None:
                continue
            if there[0] < here[0]:
                wrong.append(f"{module.at(entry.line)} imports {entry.target}, {here[0] - there[0]} layer(s) up")
            elif there[0] == here[0] and there[1] != here[1]:
                wrong.append(f"{module.at(entry.line)} imports its sibling {entry.target}")
    _check(wrong, "imports point down, also those inside functions")


def test_imports_of_the_package_resolve() -> None:
    unknown = [
        f"{module.at(entry.line)} imports {entry.target}"
        for module in MODULES
        for entry in module.imports
        if _inside(entry.target) and entry.target not in NAMES
    ]
    _check(unknown, "every import of our own names a file that exists")


def test_no_import_cycles() -> None:
    graph = {
        module.name: sorted(
            {
                entry.target
                for entry in module.imports
                if entry.target in NAMES and entry.target != module.name and not (entry.nested or entry.typing_only)
            }
        )
        for module in MODULES
    }
    _check([" -> ".join(cycle) for cycle in _cycles(graph)], "modules import each other in no circle")


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
    _check(wrong, "errors, logger, envs and version use the standard library only")


def test_scheduler_knows_no_torch() -> None:
    wrong = [
        f"{module.at(entry.line)} imports {entry.target}"
        for module in MODULES
        if module.name.startswith("vllm_omni.diffusion.sched")
        for entry in module.imports
        if entry.target.split(".")[0] == "torch"
    ]
    _check(wrong, "diffusion/sched imports no torch, not even for typing")


# --------------------------------------------------------------------------------------------------------------- habits


def test_every_return_is_annotated() -> None:
    bare = [
        f"{module.at(function.lineno)} {function.name}"
        for module in MODULES
        for function in _functions(module)
        if function.returns is None
    ]
    _check(bare, "every function says what it returns")


def test_types_are_asked_not_attributes() -> None:
    asked = [
        f"{module.at(node.lineno)} {node.func.id}"
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "hasattr"}
    ]
    limit = MAX_ATTRIBUTE_QUESTIONS_PER_KLOC * max(KLOC, 1.0)
    detail = "\n  ".join(asked)
    assert len(asked) <= limit, f"{len(asked)} getattr/hasattr, at most {limit:.1f} in {KLOC:.1f} kloc:\n  {detail}"


def test_broad_excepts_are_rare() -> None:
    broad = [
        f"{module.at(node.lineno)} except {ast.unparse(node.type) if node.type else ''}"
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type)
    ]
    limit = max(BROAD_EXCEPTS_ALWAYS_ALLOWED, MAX_BROAD_EXCEPTS_PER_KLOC * KLOC)
    detail = "\n  ".join(broad)
    assert len(broad) <= limit, f"{len(broad)} broad excepts, at most {limit:.1f} in {KLOC:.1f} kloc:\n  {detail}"


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(element) for element in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})


def test_nothing_can_run_foreign_code() -> None:
    wrong = []
    for module in MODULES:
        for entry in module.imports:
            if entry.target.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}:
                wrong.append(f"{module.at(entry.line)} imports {entry.target}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                wrong.append(f"{module.at(node.lineno)} torch.load")
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                wrong += [f"{module.at(node.lineno)} torch.load" for alias in node.names if alias.name == "load"]
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and _is_true(node.value):
                wrong.append(f"{module.at(node.value.lineno)} trust_remote_code=True")
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and _is_true(value):
                        wrong.append(f"{module.at(node.lineno)} trust_remote_code: True")
    _check(wrong, "weights are safetensors and code is ours: no pickle, no torch.load, no trust_remote_code=True")


def test_nothing_evaluates_text_or_listens_everywhere() -> None:
    wrong = []
    for module in MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "os.system", "yaml.load"}:
                wrong.append(f"{module.at(node.lineno)} {ast.unparse(node.func)}")
            elif isinstance(node, ast.keyword) and node.arg == "shell" and _is_true(node.value):
                wrong.append(f"{module.at(node.value.lineno)} shell=True")
            elif isinstance(node, ast.Constant) and node.value in {"0.0.0.0", "::"}:
                wrong.append(f"{module.at(node.lineno)} {node.value!r}")
    _check(wrong, "text is never code, and a server listens on loopback unless told")


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


# -------------------------------------------------------------------------------------------------------------- surface


def test_import_is_fast_and_light() -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "pydantic", "numpy", "matplotlib", "fastapi", "vllm"}
    code = (
        "import json, sys, time; start = time.perf_counter(); import vllm_omni; "
        "seconds = time.perf_counter() - start; "
        f"print(json.dumps([seconds, sorted({heavy!r} & set(sys.modules))]))"
    )
    runs = [json.loads(_python(code)) for _ in range(3)]
    assert runs[0][1] == [], f"import {PACKAGE} loads {', '.join(runs[0][1])}"
    best = min(seconds for seconds, _ in runs)
    assert best < MAX_IMPORT_SECONDS, f"import {PACKAGE} takes {best:.2f} s, at most {MAX_IMPORT_SECONDS} s"


def test_public_names_are_lazy() -> None:
    package = NAMES[PACKAGE]
    names = {node.name for node in package.tree.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" in names, f"{package.at(1)} defines no module-level __getattr__"
    public = json.loads(_python("import json, vllm_omni; print(json.dumps(list(vllm_omni.__all__)))"))
    assert public == sorted(public), f"{package.at(1)} __all__ is not sorted: {public}"
    missing = {"AsyncOmni", "DiffusionCacheConfig", "Omni", "OmniDiffusionSamplingParams"} - set(public)
    assert not missing, f"{package.at(1)} __all__ lacks {', '.join(sorted(missing))}"


def test_public_names_exist() -> None:
    code = "import vllm_omni\nfor name in vllm_omni.__all__:\n    getattr(vllm_omni, name)"
    _python(code)


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
    _check([line for line in _python(code).splitlines() if line], "the core imports where vLLM is absent")


@pytest.mark.parametrize("source", ["CHANGELOG.md", "pyproject.toml"])
def test_version_is_told_once(source: str) -> None:
    pattern = r"^## \[(\d[^\]]*)\]" if source.endswith(".md") else r'^version = "([^"]+)"'
    found = re.search(pattern, (ROOT / source).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{source} names no version"
    version = _python("import vllm_omni.version; print(vllm_omni.version.__version__)").strip()
    assert found[1] == version, f"{source} says {found[1]}, vllm_omni/version.py says {version}"
