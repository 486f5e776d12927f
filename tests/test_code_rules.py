"""The gates of habit: annotations, attribute questions, excepts, dangerous calls, configs, defaults written twice."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from source_tree import KLOC, MODULES, Module, check, functions

MAX_ATTRIBUTE_QUESTIONS_PER_KLOC = 3.0
MAX_BROAD_EXCEPTS_PER_KLOC = 0.5
BROAD_EXCEPTS_ALWAYS_ALLOWED = 4  # a package this small has its few real boundaries too
MAX_CONFIG_FIELDS = 25
REQUESTS = {"OmniDiffusionSamplingParams"}  # what a request may ask for is the contract's, not a config


# --------------------------------------------------------------------------------------------------------------- habits


def test_every_return_is_annotated() -> None:
    bare = [
        f"{module.at(function.lineno)} {function.name}"
        for module in MODULES
        for function in functions(module)
        if function.returns is None
    ]
    check(bare, "every function says what it returns")


def _attribute_questions(tree: ast.AST) -> list[tuple[int, str]]:
    """`getattr`, `hasattr`, `vars(x)` in any use, `x.__dict__`, `attrgetter`: asking by a name in a string."""
    found = []
    for node in sorted(ast.walk(tree), key=_place):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in {"getattr", "hasattr", "attrgetter", "getattr_static"} or (name == "vars" and node.args):
                found.append((node.lineno, name))
        elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
            found.append((node.lineno, "__dict__"))
    return found


def _place(node: ast.AST) -> tuple[int, int]:
    return (node.lineno, node.col_offset) if isinstance(node, ast.expr) else (0, 0)


def test_attribute_questions_are_rare() -> None:
    asked = [
        f"{module.at(node.lineno)} {node.func.id}"
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "hasattr"}
    ]
    limit = MAX_ATTRIBUTE_QUESTIONS_PER_KLOC * max(KLOC, 1.0)
    detail = "\n  ".join(asked)
    assert len(asked) <= limit, f"{len(asked)} getattr/hasattr, at most {limit:.1f} in {KLOC:.1f} kloc:\n  {detail}"


def test_the_attribute_gate_sees_every_way_to_ask() -> None:
    source = "getattr(a, 'b'); hasattr(a, 'b'); vars(a)['b']; vars(a).get('b'); 'b' in vars(a); a.__dict__; vars()"
    assert [what for _, what in _attribute_questions(ast.parse(source))] == (
        ["getattr", "hasattr", "vars", "vars", "vars", "__dict__"]
    )


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
    check(wrong, "weights are safetensors and code is ours: no pickle, no torch.load, no trust_remote_code=True")


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
    check(wrong, "text is never code, and a server listens on loopback unless told")


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


# ------------------------------------------------------------------------------------------------------------ settings


def _settings_classes() -> dict[str, tuple[Module, ast.ClassDef]]:
    """Every class of the package that derives from `Settings`, directly or not, by name."""
    classes = {
        node.name: (module, node)
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"Settings"}
    while True:
        more = {
            name
            for name, (_, node) in classes.items()
            if name not in found and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & found
        }
        if not more:
            return {name: classes[name] for name in sorted(found) if name in classes}
        found |= more


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [
        entry
        for entry in node.body
        if isinstance(entry, ast.AnnAssign)
        and isinstance(entry.target, ast.Name)
        and not entry.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(entry.annotation)
    ]


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow
}  # fmt: skip


def _value(node: ast.expr | None) -> float | None:
    """The number that a literal such as `32_000` or `64 * 2**20` stands for; None for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _value(node.left), _value(node.right)
        return None if left is None or right is None else _ARITHMETIC[type(node.op)](left, right)
    return None


def _default(node: ast.expr | None) -> ast.expr | None:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field":
        return next((k.value for k in node.keywords if k.arg == "default"), node.args[0] if node.args else None)
    return node


def _flags(node: ast.Call) -> list[str]:
    words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return [word for word in words if word.startswith("--")]


def _same(name: str) -> str:
    """`--request-timeout`, `REQUEST_TIMEOUT` and `request_timeout_s` are one name."""
    return re.sub(r"_(s|seconds)$", "", name.strip("-_").replace("-", "_").lower())


def _named_numbers(tree: ast.AST) -> Iterator[tuple[str, float, int]]:
    """(name, number, line) of each field, constant, parameter and flag whose default is a literal."""
    for node in ast.walk(tree):
        given: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            given = [(node.target.id, _default(node.value))]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            given = [(node.targets[0].id, node.value)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            first = len(positional) - len(node.args.defaults)
            given = [(a.arg, d) for a, d in zip(positional[first:], node.args.defaults, strict=True)]
            given += [(a.arg, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
        elif isinstance(node, ast.Call):
            given = [(flag, k.value) for flag in _flags(node) for k in node.keywords if k.arg == "default"]
        for name, value in given:
            if (number := _value(value)) is not None and number not in (0, 1):  # which are no limits
                yield _same(name), number, node.lineno


def test_the_default_gate_sees_fields_flags_and_parameters() -> None:
    source = """
LARGEST_N = 10
class Limits(Settings):
    max_n: int = Field(default=10, ge=1)
    request_timeout_s: float = 600.0
def serve(*, max_n: int = 10, port=0): ...
add("--max-n", type=int, default=10)
add("--request-timeout", default=60 * 10)
"""
    assert sorted((name, number) for name, number, _ in _named_numbers(ast.parse(source))) == [
        ("largest_n", 10), *[("max_n", 10)] * 3, *[("request_timeout", 600)] * 2
    ]  # fmt: skip
