"""Proving on this very model what `discover.py` suspects, with the arguments of one real call. Nothing is kept.

Six forwards' work, and a few forwards without blocks: the call itself, watched; another call, every tensor of which is
perturbed; the first again, tapped; the other, tapped; both joined, tapped. What must hold: (0) the same call gives the
same output, whatever was called in between; (a) also if it is tapped; (b) with the blocks replaced by what they have
added the output is the same up to rounding, and with nothing in their place it is not; (c) two different calls joined
equal each alone, in their output and in what is cached of them. An argument that made no difference to that must be
equal in calls that are joined, since a row could have got another row's: one more forward for each argument.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from vllm_omni.diffusion.denoiser.block_stack import BlockStack, pack
from vllm_omni.diffusion.denoiser.discover import (
    Roles,
    Seen,
    candidates,
    roles_of,
    rows_in,
    unknown_in,
    watch,
    why_none,
)
from vllm_omni.diffusion.denoiser.rows import joined, latents_of, take_rows
from vllm_omni.diffusion.denoiser.specs import DenoiserSpec
from vllm_omni.kernels.device import Guard, is_out_of_memory, plainly, refuse_lost, tried
from vllm_omni.nested import copied, identical, largest_difference, mapped, rms_difference, tensors_in

Call = Callable[[Mapping[str, Any]], Any]  # the denoiser, with its arguments by name
STATE = "the same call gives another output: it keeps state, or is random"
MOST_STACKS = 32  # that are tried, without blocks
MOST_SHARED = 4  # arguments that are tried as shared
MOST_ROLES = 12  # ways to join two calls that are tried, three forwards' work each
ROUNDINGS, FEW_ROUNDINGS = 64, 8  # of a forward in float32, and in a dtype of few digits, by its largest value
TELLING = 4  # times as far as what is right must be what is wrong, or nothing is proven
NOTHING = DenoiserSpec((), ())


NO_ROOM = "could not be examined: the device has no room for it"
NO_ROOM_FOR_TWO = "the device has no room to try two calls together"
_TORCHS_OWN = frozenset(vars(torch.nn.Module()))


@dataclass(frozen=True)
class Finding:
    """What was proven of calls of one signature: a stack, if they may be cached, and the roles of the arguments.

    `reason` says why not, "" if they are both cached and joined with others.
    """

    spec: DenoiserSpec
    joined: bool
    reason: str = ""

    @property
    def cached(self) -> bool:
        return bool(self.spec.stack)

    @property
    def passing(self) -> bool:
        """Whether the reason may be gone at another time, or on another machine."""
        return self.reason.endswith((NO_ROOM, NO_ROOM_FOR_TWO))


def examine(
    module: torch.nn.Module,
    call: Call,
    arguments: Mapping[str, Any],
    known: DenoiserSpec | None,
    guarded: Guard = plainly,
) -> Finding:
    """What holds for calls like this one; `known` is the stack that was proven for calls of another signature.

    Module, arguments and random generators are afterwards as before. Raises what the call raises.
    """
    if (name := unknown_in(arguments)) is not None:
        return Finding(NOTHING, False, f"it cannot be seen what is in its argument {name}")
    if (rows := rows_in(arguments)) is None:
        return Finding(NOTHING, False, "its latents have no row for each sample")
    with untouched(module, arguments), torch.no_grad():
        return _Examination(module, call, arguments, rows, guarded).finding(known)


class _Examination:
    """One call under examination."""

    def __init__(
        self, module: torch.nn.Module, call: Call, arguments: Mapping[str, Any], rows: int, guarded: Guard
    ) -> None:
        self.module, self._call, self.arguments, self.rows, self._guarded = module, call, arguments, rows, guarded
        self._ways = roles_of(arguments, rows)

    def finding(self, known: DenoiserSpec | None) -> Finding:
        seen = watch(self.module, lambda: self._run(self.arguments))
        self.wanted = copied(seen.output)
        if not tensors_in(self.wanted) or unknown_in({"output": seen.output}) is not None:
            return Finding(NOTHING, False, "it cannot be seen what is in its output")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(self.wanted)):
            return Finding(NOTHING, False, "its output is not finite")
        stack, wanted, why = self._stack(seen, known)
        del seen
        self._between()
        output, ends = self._tapped(stack, self.arguments, self.rows)
        if not identical([output, ends], [self.wanted, wanted]):
            self._between()
            if not identical(self._run(self.arguments), self.wanted):
                return Finding(NOTHING, False, STATE)
            stack, ends, why = None, None, "its output, or what its blocks add, is another if they are tapped"
        try:
            roles, alone = self._guarded(partial(self._roles, stack, ends))
        except (RuntimeError, MemoryError) as error:
            refuse_lost(error)
            if not is_out_of_memory(error):
                raise
            roles, alone = self._ways[0], NO_ROOM_FOR_TWO
        spec = NOTHING if stack is None else stack.spec
        spec = replace(spec, rows=roles.rows, shared=roles.shared, rows_in_dim_1=roles.rows_in_dim_1)
        return Finding(spec, not alone, "; ".join(filter(None, (why, alone))))

    def _eps(self, streams: Any) -> float:
        """Of the dtype of fewest digits."""
        tensors = tensors_in([streams, self.wanted, list(self.arguments.values())])
        return max((torch.finfo(t.dtype).eps for t in tensors if t.dtype.is_floating_point), default=0.0)

    def _tolerance(self, streams: Any, other: Any = None) -> float:
        """Relative to the largest value of what is compared; less than what tells it from an `other` output."""
        eps = self._eps(streams)
        bound = eps * (ROUNDINGS if eps < 1e-6 else FEW_ROUNDINGS)
        return bound if other is None else max(2 * eps, min(bound, largest_difference(other, self.wanted) / TELLING))

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        return self._call(copied(arguments))

    def _between(self) -> None:
        """Make another call, which a model may remember."""
        _tried(lambda: self._run(perturbed(self.arguments, self._ways[0])))

    def _tapped(self, stack: BlockStack | None, arguments: Mapping[str, Any], rows: int) -> tuple[Any, Any]:
        """The output, and the ends of the stack, if there is one."""
        if stack is None:
            return copied(self._run(arguments)), None
        stack.enter(None, rows)
        try:
            return copied(self._run(arguments)), stack.ends()
        finally:
            stack.leave()

    # --------------------------------------------------------------------------------------------- (b): may be cached

    def _stack(self, seen: Seen, known: DenoiserSpec | None) -> tuple[BlockStack | None, Any, str]:
        """The first stack whose residual stands in for it, with its ends, or why there is none."""
        why = ""
        for candidate in islice(candidates(seen), MOST_STACKS):
            if known is not None and candidate.spec != replace(known, rows=(), shared=(), rows_in_dim_1=()):
                continue
            try:
                before, after = pack(candidate.before, self.rows), pack(candidate.after, self.rows)
            except RuntimeError:
                why = why or "its samples have parts of different sizes"
                continue
            stack = BlockStack(self.module, candidate.spec)
            if (flaw := self._replaced(stack, after - before)) is None:
                return stack, (after, before), ""
            why = why or f"its output is not made of what {_names(candidate.spec)} return: {flaw}"
        if known is not None:
            why = f"its blocks are not used as in other calls ({_names(known)})"
        return None, None, why or why_none(seen)

    def _replaced(self, stack: BlockStack, residual: torch.Tensor) -> str | None:
        """What is wrong with the output if the blocks are replaced by what they have added; None: nothing."""

        def output_with(added: torch.Tensor) -> Any:
            stack.enter(lambda streams: streams + added, self.rows)
            try:
                return self._run(self.arguments)
            finally:
                stack.leave()

        output, error = _tried(lambda: output_with(residual))
        if error or not (apart := largest_difference(output, self.wanted)) <= self._tolerance(residual):
            return error or f"with that in their place it is {apart:.2g} of its size away"
        output, error = _tried(lambda: output_with(torch.zeros_like(residual)))
        if not error and largest_difference(output, self.wanted) <= TELLING * max(apart, self._eps(residual)):
            return "it is as near without them"
        return None

    # --------------------------------------------------------------------------------------------- (c): may be joined

    def _roles(self, stack: BlockStack | None, ends: Any) -> tuple[Roles, str]:
        """The roles under which calls may be joined, and "", or why they may not."""
        latents, why = latents_of(self.arguments), ""
        names = [name for name in self._ways[0].rows if self.arguments[name] is not latents]
        tries = [way.sharing(shared) for shared in _shared(self.arguments, names) for way in self._ways]
        picks = dict.fromkeys(pick for roles in tries for pick in (roles, roles.one_for_all()))
        for roles in islice(picks, MOST_ROLES):
            other = perturbed(self.arguments, roles)
            alone, error = _tried(partial(self._tapped, stack, other, self.rows))
            if error:
                why = why or f"it refuses other values: {error}"
                continue
            flaw, rounding = self._apart_if_joined(stack, ends, roles, other, alone)
            if flaw is None:
                return roles.sharing(self._unproven(roles, other, rounding)), ""
            why = why or flaw
        return tries[0], why

    def _apart_if_joined(
        self, stack: BlockStack | None, ends: Any, roles: Roles, other: Mapping[str, Any], alone: tuple[Any, Any]
    ) -> tuple[str | None, float]:
        """What is wrong if the call is joined with another by these roles, None: nothing; and its distance from alone.

        It comes second: what a model reads in the first row alone is the other's.
        """
        one = {name: self.arguments[name] for name in roles.rows}
        both = {n: joined([other[n], value], int(n in roles.rows_in_dim_1)) for n, value in one.items()}
        together, error = _tried(lambda: self._tapped(stack, {**self.arguments, **both}, 2 * self.rows))
        if error:
            return f"two calls cannot be joined: {error}", 0.0
        calls = [(alone, slice(0, self.rows)), ((self.wanted, ends), slice(self.rows, 2 * self.rows))]
        for (wanted, own), rows in calls:
            taken, error = _tried(partial(take_rows, together, rows))
            if error or (apart := largest_difference(taken[0], wanted)) > self._tolerance(ends, alone[0]):
                why = error or f"it is {apart:.2g} of its size away"
                return f"joined with another call, its output is not its own, its rows interact: {why}", 0.0
            if largest_difference(taken[1], own) > self._tolerance(ends):
                return "joined with another call, the rows of its blocks are not its own", 0.0
        return None, rms_difference(taken[0], self.wanted)

    def _unproven(self, roles: Roles, other: Mapping[str, Any], rounding: float) -> tuple[str, ...]:
        """Arguments of which the joined call may have taken the first row's, the other call's, for all.

        The call is made once more for each, with the other's value of it. As far as that moves the output, the joined
        call would have been off. It was off by `rounding`: what moves the output by little more shows nothing. What
        does not move it at all, whatever it is, is not used.
        """

        def moves(name: str, value: Any) -> float:
            output, error = _tried(lambda: self._run({**self.arguments, name: value}))
            return 0.0 if error else rms_difference(output, self.wanted)

        def proven(name: str, value: Any) -> bool:
            if identical(value, self.arguments[name]):
                return False
            moved = moves(name, value)
            return moved > TELLING * rounding if moved else not moves(name, mapped(value, _far_off))

        latents = latents_of(self.arguments)
        of_rows = [n for n in roles.rows if n not in roles.shared and tensors_in(self.arguments[n])]
        own = [name for name in of_rows if self.arguments[name] is not latents]  # plain values must be equal anyway
        return tuple(n for n in own if not all(proven(n, one) for one in _one_by_one(other[n], self.arguments[n])))


def _one_by_one(value: Any, rest: Any) -> list[Any]:
    """`value`; of a mapping, `rest` with one entry of it at a time."""
    if not isinstance(value, Mapping):
        return [value]
    return [{**rest, name: entry} for name, entry in value.items() if tensors_in(entry)]


def _shared(arguments: Mapping[str, Any], names: list[str]) -> list[tuple[str, ...]]:
    """What may have to be equal in calls that are joined: nothing, masks, positions, both, or any one argument."""
    masks = tuple(name for name in names if any(map(_is_mask, tensors_in(arguments[name]))))
    whole = [n for n in names if n not in masks and any(t.ndim > 1 for t in tensors_in(arguments[n]))]
    places = tuple(n for n in whole if not any(t.dtype.is_floating_point for t in tensors_in(arguments[n])))
    alone = [(name,) for name in (*places, *names) if name not in masks][:MOST_SHARED]
    return list(dict.fromkeys([(), masks, places, (*masks, *places), *alone]))


def _names(spec: DenoiserSpec) -> str:
    return ", ".join(block_list.name for block_list in spec.stack)


def _tried(run: Callable[[], Any]) -> tuple[Any, str]:
    """What `run` returns and "", or None and what it raised."""
    output, error = tried(run)  # a model that is called as it was never meant to be may raise anything
    if error is None:
        return output, ""
    if is_out_of_memory(error):
        raise error
    return None, f"{type(error).__name__}: {str(error)[:120]}".rstrip(": ")


# -------------------------------------------------------------------------------------------------------------- values


def perturbed(arguments: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    """Another call of the same kind: other numbers in every argument that has its own for each sample."""
    own = [name for name in roles.rows if name not in roles.shared]
    return {**arguments, **{name: mapped(arguments[name], _other) for name in own}}


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers moved and made smaller, positions and tokens turned round, masks with another end."""
    if _is_mask(tensor) and tensor.shape[-1] > 1:
        seen = tensor.flatten(0, -2).any(dim=0).nonzero()  # a short prompt's last places are empty already
        end = int(seen[-1]) + 1 if len(seen) > 1 else tensor.shape[-1]
        other = tensor.clone()
        other[..., end - max(1, end // 4) :] = 0
        return other
    if tensor.dtype.is_floating_point or tensor.is_complex():
        other = tensor.roll(1, -1) * 0.75 if tensor.ndim > 1 else tensor * 0.75
        return other if tensor.any() else other + 0.5
    if tensor.dtype == torch.bool:
        return tensor.flip(-1)
    turned = tensor.flip(-1)
    return tensor * 3 // 4 if tensor.ndim == 1 or torch.equal(turned, tensor) else turned


def _far_off(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of another sign and size; no positions or tokens that there may not be."""
    if tensor.dtype.is_floating_point or tensor.is_complex():
        return 1 - 8 * tensor
    return ~tensor if tensor.dtype == torch.bool else torch.zeros_like(tensor)


def _is_mask(tensor: torch.Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return tensor.ndim > 1
    return tensor.ndim > 1 and bool(tensor.any()) and bool(((tensor == 0) | (tensor == 1)).all())


def makes(call: Call, arguments: Mapping[str, Any]) -> bool:
    """Whether the call can be made at all."""
    return not _tried(lambda: call(copied(arguments)))[1]


@contextmanager
def untouched(module: torch.nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within, the module may be called; its attributes, its buffers and the random generators come out as they were."""
    devices = {t.device.index for t in tensors_in(arguments) if t.device.type == "cuda"}
    owners = [attributes for part in module.modules() for attributes in (vars(part), *_containers(vars(part)))]
    kept = [(owner, owner.copy()) for owner in owners]
    mine: list[list[Any]] = [
        [value for name, value in vars(part).items() if name not in _TORCHS_OWN] for part in module.modules()
    ]
    kept_tensors = [tensor for tensor in tensors_in(mine) if not isinstance(tensor, torch.nn.Parameter)]
    values = [(tensor, tensor.clone()) for tensor in (*module.buffers(), *kept_tensors)]
    draws = [(one, one.get_state()) for each in mine for one in each if isinstance(one, torch.Generator)]
    others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            for owner, content in kept:
                if [*map(id, _flat(owner))] != [*map(id, _flat(content))]:
                    owner.clear()
                    (owner.extend if isinstance(owner, list) else owner.update)(content)
            random.setstate(others[0])
            np.random.set_state(others[1])
            for generator, state in draws:
                generator.set_state(state)
            for buffer, value in values:
                same = buffer.is_meta or buffer.device != value.device or torch.equal(buffer, value)
                with suppress(RuntimeError):  # one that cannot be written, was not
                    _ = same or buffer.copy_(value)


def _containers(attributes: Mapping[str, Any]) -> list[Any]:
    """What can be changed without the attribute becoming another. Not torch's own: offloading moves what they hold."""
    own = [value for name, value in attributes.items() if name not in _TORCHS_OWN]
    return [value for value in own if isinstance(value, list | dict | set)]


def _flat(owner: Any) -> list[Any]:
    return [entry for pair in owner.items() for entry in pair] if isinstance(owner, dict) else list(owner)
