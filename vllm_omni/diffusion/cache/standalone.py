"""The cache on a plain diffusers pipeline, or on a bare denoiser, without the engine: one anonymous request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import CacheMixin

from vllm_omni.diffusion.cache.clock import Clock, Moment, Schedule
from vllm_omni.diffusion.cache.forward import Member, Record, correction, note_computed, note_skipped, probe
from vllm_omni.diffusion.cache.gate import GateCache, Look, decide
from vllm_omni.diffusion.denoisers import DenoiserSpec
from vllm_omni.diffusion.hooks.base import HookRegistry, ModelHook
from vllm_omni.diffusion.hooks.block_stack import BlockStack
from vllm_omni.diffusion.hooks.conditioning import Memory

HOOK_NAME = "mag_cache"
MakeRecord = Callable[[Schedule], Record]


class Session:
    """Whoever calls the denoisers is one request; a new schedule is a new request, planned for its own steps."""

    def __init__(self, clock: Clock, make_record: MakeRecord) -> None:
        self.clock = clock
        self.record: Record | None = None
        self.memory: dict[str, Memory] = {}  # by denoiser
        self._make_record = make_record
        self._run: int | None = None

    def begin(self, denoiser: str, branch: str | None) -> tuple[Record, Moment]:
        moment = self.clock.locate(denoiser, branch)
        if self.record is None or moment.run != self._run:
            self.restart()
            self._run = moment.run
            self.record = self._make_record(self.clock.schedule())
        return self.record, moment

    def restart(self) -> None:
        """Forget the request that was."""
        if self.record is not None:
            self.record.drop()
        self.record = self._run = None
        self.memory = {}


class StandaloneHook(ModelHook):
    """Opens the block stack's scope around each forward of one denoiser, as the anonymous request's plan says."""

    def __init__(self, name: str, stack: BlockStack, spec: DenoiserSpec, session: Session) -> None:
        self.name, self.stack, self.spec, self.session = name, stack, spec, session
        self.branch: str | None = None
        self._member: Member | None = None
        self._skips = False
        self._latents: torch.Tensor | None = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        if isinstance(module, CacheMixin):
            vars(module)["cache_context"] = partial(self._cache_context, module.cache_context)
        return module

    @contextmanager
    def _cache_context(self, own: Callable[..., Any], name: str, **kwargs: Any) -> Iterator[None]:
        with own(name, **kwargs):
            self.branch = name
            try:
                yield
            finally:
                self.branch = None

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.stack.leave()
        record, moment = self.session.begin(self.name, self.branch)
        self._latents = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), ()))
        rows = len(self._latents)
        self._member = Member(record, (self.name, moment.branch), moment.step, slice(0, rows))
        foreign = self.spec.adds_between_blocks(kwargs)
        if isinstance(record, GateCache) and not foreign and record.wants_look(self._member.key, moment.step):
            self._look(module, record, self._member, args, kwargs)
        terms = None if foreign else record.forecast(self._member.key, moment.step, rows)
        self._skips = terms is not None
        if terms is not None:
            memory = self.session.memory.setdefault(self.name, {})
            self.stack.enter(partial(correction, [(slice(0, rows), terms)]), memory)
        elif self._member.wants and not foreign:
            self.stack.enter()
        return args, kwargs

    def _look(
        self, module: torch.nn.Module, cache: GateCache, member: Member, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert self._latents is not None
        if cache.gate.look is Look.LATENTS:
            now = cache.gate.describe(self._latents, kwargs, cache.sigma(member.step))
        else:
            now = probe(cache.gate, self.stack, partial(module.forward, *args, **kwargs))
        decide([(cache, member.key, member.step, now)])

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if output is None:  # the forward raised: the request is over
            self.session.restart()
        elif self._member is not None:
            if self._skips:
                note_skipped([self._member])
            else:
                note_computed(self.stack, [self._member], self._latents, output)
        self._member = self._latents = None
        self.stack.leave()
        return output

    def reset_state(self, module: torch.nn.Module) -> None:
        self.session.restart()


def attach(module: torch.nn.Module, hook: StandaloneHook) -> None:
    HookRegistry.get_or_create(module).register_hook(HOOK_NAME, hook)


def detach(module: torch.nn.Module) -> None:
    """Leave the module as it was before `attach`."""
    HookRegistry.get_or_create(module).remove_hook(HOOK_NAME)
    vars(module).pop("cache_context", None)
