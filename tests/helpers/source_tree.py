"""The package's source as data: modules, what they import, and how a gate reports what it finds."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from paths import ROOT

PACKAGE = "vllm_omni"


@dataclass(frozen=True)
class Import:
    """One imported name: the dotted target, where, and when it happens."""

    target: str
    line: int
    nested: bool  # inside a function: runs later
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
        return tuple(imports_of(self, self.tree, nested=False, typing_only=False))


def imports_of(module: Module, node: ast.AST, *, nested: bool, typing_only: bool) -> Iterator[Import]:
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
                yield from imports_of(module, ast.Module([statement], []), nested=nested, typing_only=True)
            for statement in child.orelse:
                yield from imports_of(module, ast.Module([statement], []), nested=nested, typing_only=typing_only)
        else:
            if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module") and child.args:
                first = child.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield Import(first.value, child.lineno, nested, typing_only)
            inside = nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(module, child, nested=inside, typing_only=typing_only)


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


def inside(target: str) -> bool:
    return target == PACKAGE or target.startswith(PACKAGE + ".")


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def check(problems: list[str], rule: str) -> None:
    assert not problems, f"{rule}; {len(problems)} found:\n  " + "\n  ".join(problems)


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout
