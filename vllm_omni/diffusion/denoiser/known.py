"""What is known of one denoiser: what `specs.py` says of its class, or what was found and proven of its calls.

What was found is kept in a small file beside the user's profiles, by class, by what the model is made of, and by the
version of diffusers: the next start examines nothing again. No tensor is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import diffusers
import torch

from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.discover import signature_of
from vllm_omni.diffusion.denoiser.prove import NO_ROOM, NOTHING, STATE, Call, Finding, examine, makes
from vllm_omni.diffusion.denoiser.specs import BlockList, DenoiserSpec, spec_of, unwrapped
from vllm_omni.envs import profile_folder
from vllm_omni.files import write_whole
from vllm_omni.kernels.device import Guard, is_out_of_memory, plainly, tried
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
FORMAT = 3
_PLAIN = (bool, int, float, str)
_SIZE = re.compile(r"(?<=\w)=\d{2,}(?= |$)")
MOST_SIGNATURES = 32  # a model that is called with another number each time must not be examined each time
SIZES_LIKE = 3  # kinds that differ in sizes alone and were found alike: what holds for those holds for any size
BETWEEN_BLOCKS = "controlnet"  # in the name of an argument that is made anew for each step
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "builtins")  # whose code is known


class Denoiser:
    """One module, and how its calls may be made: cached, joined with others, or plainly."""

    def __init__(self, module: torch.nn.Module, written: DenoiserSpec | None = None) -> None:
        """`written`: a description instead of what is known of the class. InvalidValueError if it does not fit."""
        self.module = unwrapped(module)
        self.described = written or spec_of(module)
        stack = None if self.described is None else BlockStack(self.module, self.described)
        trusted = self.described != spec_of(module) or stack is None or _as_described(self.module, stack)
        self.written, self._stack = (self.described, stack) if trusted else (None, None)  # else it must be found
        if not trusted:
            logger.info("%s runs code that is not diffusers' own: it is examined, whatever its class", self.name)
        self.findings = {} if self.written is None else {"": Finding(self.written, True)}  # by kind
        self.keeps_state = False  # a call may depend on those before it: no other request's comes in between
        self._file = None if self.written is not None else _file_of(self.module)
        self._reported: set[str] = set()
        self.guarded: Guard = plainly
        if self._file is not None:
            self._read(self._file)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def kind_of(self, arguments: Mapping[str, Any]) -> str:
        """What else must agree in calls that share a forward: their signature, if the roles were found for it."""
        if self.written is not None:
            return ""
        signature = signature_of(arguments)
        return any_size if (any_size := without_sizes(signature)) in self.findings else signature

    def knows(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it is known how a call like this may be made."""
        return self.kind_of(arguments) in self.findings

    def stack_for(self, arguments: Mapping[str, Any]) -> BlockStack | None:
        """The stack that such a call may be cached with; None: it computes."""
        finding = self.findings.get(self.kind_of(arguments))
        if self.described is not None and self.described.adds_between_blocks(arguments):
            return None
        if self.written is None and any(BETWEEN_BLOCKS in n and value is not None for n, value in arguments.items()):
            return None  # a proof has seen the residual of its own call alone
        return self._stack if finding is not None and finding.cached else None

    def roles_for(self, arguments: Mapping[str, Any]) -> DenoiserSpec | None:
        """The roles of the arguments of a call that may share a forward; None: it goes alone."""
        finding = self.findings.get(self.kind_of(arguments))
        if finding is None or not finding.joined:
            return None
        alone = any(arguments.get(name) is not None for name in finding.spec.alone)
        return None if alone or finding.spec.adds_between_blocks(arguments) else finding.spec

    def leave(self) -> None:
        """End the stack's scope, if one is open."""
        if self._stack is not None:
            self._stack.leave()

    def learn(self, arguments: Mapping[str, Any], call: Call) -> None:
        """Examine the first call of its kind; `call` makes it, or one like it. No call fails because of it."""
        signature = self.kind_of(arguments)
        if signature in self.findings:
            return
        if len(self.findings) >= MOST_SIGNATURES:
            self._report(f"calls of more than {MOST_SIGNATURES} kinds: the others are made alone, uncached")
            return
        known = None if self._stack is None else self._stack.spec
        act = partial(examine, self.module, call, arguments, known, self.guarded)
        finding, error = tried(partial(self.guarded, act))
        if finding is not None:
            self._take(signature, finding)
            like = [self.findings[s] for s in self.findings if without_sizes(s) == without_sizes(signature)]
            if len(like) >= SIZES_LIKE and not finding.passing and all(one == finding for one in like):
                self._take(without_sizes(signature), finding)
            self._write()
        elif error is not None and (is_out_of_memory(error) or makes(call, arguments)):
            why = NO_ROOM if is_out_of_memory(error) else f"could not be examined: {str(error)[:200]}"
            self._report(why)
            self.findings[signature] = Finding(NOTHING, False, why)
        # else it fails whoever makes it, and says nothing of others

    def facts(self) -> dict[str, Any]:
        """What is known, in plain values."""
        found = list(self.findings.values())
        known = "found" if found else "not called yet"
        return {
            "class": self.name,
            "known": known if self.written is None else "described",
            "cached": any(finding.cached for finding in found),
            "batched": any(finding.joined for finding in found),
            "reasons": list(dict.fromkeys(finding.reason for finding in found if finding.reason)),
        }

    def _take(self, signature: str, finding: Finding) -> None:
        if finding.cached and self._stack is None:
            self._stack = BlockStack(self.module, finding.spec)
        self.findings[signature] = finding
        self.keeps_state = self.keeps_state or finding.reason.startswith(STATE)
        how = "cached" if finding.cached else "not cached"
        how += ", in batches" if finding.joined else ", one call per forward"
        told = f"was found to be {how}: {finding.reason}" if finding.reason else f"was found to be {how}"
        self._report(told, logging.INFO if finding.cached else logging.WARNING)

    def _report(self, what: str, level: int = logging.WARNING) -> None:
        """Once each."""
        if what not in self._reported:
            self._reported.add(what)
            logger.log(level, "%s %s", self.name, what)

    @property
    def found(self) -> str:
        """What was found and lasts, as it is kept."""
        lasting = {s: finding for s, finding in self.findings.items() if not finding.passing}
        kept = {signature: asdict(finding) for signature, finding in lasting.items()}
        return json.dumps({"format": FORMAT, "class": self.name, "calls": kept}, indent=1) + "\n"

    def believe(self, found: str) -> None:
        """Know what was `found`, here or by another rank, and nothing else."""
        self.findings, self._stack, self.keeps_state = {}, None, False
        for signature, kept in (json.loads(found).get("calls") or {}).items():
            self._take(str(signature), _finding(kept))

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            write_whole(self._file, lambda to: to.write(self.found.encode()))
        except OSError as error:
            logger.warning("what was found of %s is not kept: %s", self.name, error)

    def _read(self, file: Path) -> None:
        try:
            if file.is_file():
                self.believe(file.read_text())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.findings, self._stack, self.keeps_state = {}, None, False
            logger.warning("passed over, and found anew: %s (%s)", file, error)


@lru_cache(maxsize=256)
def without_sizes(signature: str) -> str:
    """A signature with any plain number of several digits, such as a width, left open."""
    return _SIZE.sub("=size", signature)


def _finding(kept: Mapping[str, Any]) -> Finding:
    """What `asdict` has made plain."""

    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    stack = tuple(BlockList(**plain(entry)) for entry in kept["spec"]["stack"])
    return Finding(DenoiserSpec(**plain(kept["spec"] | {"stack": stack})), bool(kept["joined"]), str(kept["reason"]))


def _file_of(module: torch.nn.Module) -> Path | None:
    """Where findings are kept; None if it cannot be said of which code the model is made."""
    versions = [version(name) for name in ("diffusers", "torch", "transformers")]
    digest = hashlib.sha256(f"{FORMAT} {versions}".encode())
    for name, weight in module.named_parameters():
        if ".lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')}{tuple(weight.shape)}{weight.dtype}".encode())
    for part in module.modules():  # what it was made with, and whether it trains; adapters come and go
        own = vars(part).items() if not type(part).__module__.startswith("peft.") else ()
        public = sorted((n, v) for n, v in own if isinstance(v, _PLAIN) and not n.startswith("_"))
        digest.update(repr(public).encode())
    config = module.config.items() if isinstance(module, diffusers.ConfigMixin) else ()
    digest.update(repr(sorted((name, value) for name, value in config if not name.startswith("_"))).encode())
    codes = [code for part in module.modules() for code in (_home_of(type(part)), *(c for _, c in _own_code(part)))]
    digest.update(repr(codes).encode())
    for source in sorted({source for source, _ in codes}):
        if source.partition(".")[0] in _PACKAGES:
            continue
        file = vars(sys.modules[source]).get("__file__") if source in sys.modules else None
        if file is None or not Path(file).is_file():
            return None
        digest.update(Path(file).read_bytes())
    return profile_folder() / "denoisers" / f"{type(module).__name__}-{digest.hexdigest()[:16]}.json"


def _own_code(part: torch.nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """The functions and processors that are set on a module itself, by attribute, with where their code is."""
    for name, value in vars(part).items():
        if callable(value) and not name.startswith("_") and not isinstance(value, torch.nn.Module):
            yield name, _home_of(value)


def _home_of(value: Any) -> tuple[str, str]:
    """The module and the name of what a callable runs, whatever it says of itself (`functools.wraps`)."""
    while isinstance(value, partial | MethodType):
        value = value.func if isinstance(value, partial) else value.__func__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__")), value.__code__.co_qualname
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__, kind.__qualname__


def _as_described(module: torch.nn.Module, stack: BlockStack) -> bool:
    """Whether it runs the code that descriptions were written for: its forward, its blocks', and every processor."""
    blocks = [block for entry in stack.spec.stack for block in module.get_submodule(entry.name).children()]
    homes = [_home_of(type(unwrapped(part)).forward) for part in (module, *blocks)]
    for part in module.modules():
        homes += [home for name, home in _own_code(part) if name == "forward" or "processor" in name]
    return all(source.partition(".")[0] in (*_PACKAGES, "vllm_omni") for source, _ in homes)
