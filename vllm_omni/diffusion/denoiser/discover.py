"""Looking at a denoiser: what one call of it shows of its block lists, and of its arguments. Nothing here is believed.

Every member of every outermost list of modules is watched for one forward. What a block returns is named after the
argument of the next block that gets it; which list, or which run of lists, is *the* stack, and which of its streams the
head reads, stays open: `candidates` yields the possible stacks, the most likely first, for `prove.py` to judge.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.block_stack import StandIn, Streams, cropped, exchange, like
from vllm_omni.diffusion.denoiser.rows import latents_of
from vllm_omni.diffusion.denoiser.specs import BlockList, DenoiserSpec, unwrapped
from vllm_omni.nested import tensors_in

MOST_OF_THE_WORK = 1 / 2  # of the parameters in lists: a stack has more, or a skip saves little
MUCH = 2.0  # times as far from one argument as from another
PREPARES = "refiner"  # in the name of a list that comes before the stack and is left out of it if the rest suffices
_PLAIN = (bool, int, str)


# ---------------------------------------------------------------------------------------------------------- arguments


def names_of(module: torch.nn.Module) -> tuple[str, ...]:
    """What the arguments of a module are called that come by position."""
    parameters = list(inspect.signature(type(unwrapped(module)).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def signature_of(arguments: Mapping[str, Any]) -> str:
    """What a proof holds for: names, kinds and dimensions of the arguments, and plain values as they are."""
    return " ".join(f"{n}={_kind(v, top=True)}" for n, v in sorted(arguments.items()) if v is not None)


def _kind(value: Any, top: bool = False) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.ndim}{'f' if value.dtype.is_floating_point else 'b' if value.dtype == torch.bool else 'i'}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_kind(entry, top)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        kinds = [_kind(entry, top and isinstance(entry, _PLAIN)) for entry in value]
        return (
            "[" + ",".join(kinds if top and all(isinstance(v, _PLAIN) for v in value) else dict.fromkeys(kinds)) + "]"
        )
    return repr(value) if value is None or (top and isinstance(value, _PLAIN)) else type(value).__name__


def unknown_in(arguments: Mapping[str, Any]) -> str | None:
    """An argument of which it cannot be seen what is in it, such as a store of keys and values."""

    def plain(value: Any) -> bool:
        if isinstance(value, Mapping | list | tuple):
            return all(map(plain, value.values() if isinstance(value, Mapping) else value))
        return value is None or isinstance(value, (*_PLAIN, float, torch.Tensor, torch.dtype, torch.device))

    return next((name for name, value in arguments.items() if not plain(value)), None)


def rows_in(arguments: Mapping[str, Any]) -> int | None:
    """The number of samples in a call; None if its latents do not have one row for each."""
    latents = latents_of(arguments) if arguments else None
    if isinstance(latents, torch.Tensor) and latents.ndim == 0:
        return None
    return len(latents) or None if isinstance(latents, torch.Tensor | list) else None


@dataclass(frozen=True)
class Roles:
    """The arguments with one entry per sample, and those that two calls must share; one may have both roles."""

    rows: tuple[str, ...]
    shared: tuple[str, ...]
    rows_in_dim_1: tuple[str, ...]

    def sharing(self, names: tuple[str, ...]) -> Roles:
        """The same, but `names` are shared, too."""
        return Roles(self.rows, (*self.shared, *names), self.rows_in_dim_1)

    def one_for_all(self) -> Roles:
        """The same, but what is shared has no rows: one call's own serves all."""
        left = tuple(name for name in self.rows if name not in self.shared)
        return Roles(left, self.shared, tuple(name for name in self.rows_in_dim_1 if name in left))


def roles_of(arguments: Mapping[str, Any], rows: int) -> list[Roles]:
    """Whatever may have a row per sample is taken to have one; `prove.py` tries. Of two dimensions either may be it."""
    dims = {name: _row_dims(value, rows) for name, value in arguments.items()}
    shared = tuple(name for name, value in arguments.items() if not dims[name] and tensors_in(value))
    rows_in = tuple(name for name in arguments if dims[name])
    ways = [tuple(name for name in rows_in if dims[name][pick] == 1) for pick in (0, -1)]
    return [Roles(rows_in, shared, way) for way in dict.fromkeys(ways)]


def _row_dims(value: Any, rows: int) -> tuple[int, ...]:
    if isinstance(value, torch.Tensor):
        last = 1 if rows > 1 and value.ndim > 2 else 0
        dims = tuple(dim for dim in (0, 1) if value.ndim > dim and value.shape[dim] == rows)
        return dims[: last + 1]
    if isinstance(value, dict):
        ways = {_row_dims(entry, rows) for entry in value.values() if entry is not None}
        return ways.pop() if len(ways) == 1 and tensors_in(value) else ()
    return (0,) if isinstance(value, list) and len(value) == rows and not isinstance(value[0], _PLAIN) else ()


# -------------------------------------------------------------------------------------------------------------- blocks


@dataclass
class ListSeen:
    """What one forward shows of a list of blocks."""

    name: str
    size: int  # parameters
    takes: tuple[str, ...] = ()
    calls: list[int] = field(default_factory=list)  # the member of each call
    began: int = 0
    ended: int = 0
    given: dict[str, torch.Tensor] = field(default_factory=dict)  # to the first call
    last_given: dict[str, torch.Tensor] = field(default_factory=dict)
    returned: tuple[Any, ...] = ()  # by the last call
    in_tuple: bool = False
    in_place: bool = False  # the first block writes into what it is given
    continues: dict[int, Counter[str]] = field(default_factory=dict)  # what is returned -> the arguments it becomes

    @cached_property
    def returns(self) -> tuple[str, ...] | None:
        """By argument; None if a block returns something that is none of them."""
        names: list[str] = []
        for i, value in enumerate(self.returned):
            name = self._continued(i, value, names)
            if name is None:
                return None
            names.append(name)
        return tuple(names)

    def _continued(self, i: int, value: Any, taken: list[str]) -> str | None:
        """The argument that it becomes, by most of the calls that could be seen; "" for None.

        Unless it is much more like another argument of its own call: a decoder is given what the encoder has made.
        """
        votes = self.continues.get(i)
        handed = votes.most_common(1)[0][0] if votes else None
        if not isinstance(value, torch.Tensor):
            return handed or ("" if value is None else None)
        fitting = {n: given for n, given in self.last_given.items() if n not in taken and given.shape == value.shape}
        apart = {name: _distance(value, given) for name, given in fitting.items()}
        if handed is not None and apart.get(handed, 0.0) <= MUCH * min(apart.values(), default=0.0) + 1e-6:
            return handed
        return min(apart, key=lambda name: apart[name], default=None)

    def as_list(self, streams: tuple[str, ...]) -> BlockList:
        """Its description, if these are the streams."""
        return BlockList(self.name, self.returns or (), self.takes, streams, self.in_tuple and len(self.returned) == 1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of what a block returns and what it was given; 1 if they have nothing in common."""
    return 1 - float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


@dataclass
class Seen:
    """What one forward has shown; it holds tensors and goes when the proof ends."""

    output: Any
    lists: list[ListSeen]


@dataclass(frozen=True)
class Candidate:
    """A possible stack, and the streams before and after it in the call that was watched."""

    spec: DenoiserSpec
    before: Streams
    after: Streams


def watch(module: torch.nn.Module, run: Callable[[], Any]) -> Seen:
    """Run one forward with every block watched."""
    eyes = _Eyes()
    stand_ins: dict[str, torch.nn.Module] = {}
    for name, container in _outermost(module):
        seen = ListSeen(name, sum(p.numel() for p in container.parameters()))
        members = [_Watched(block, seen, i, eyes) for i, block in enumerate(container.children())]
        stand_ins[name] = like(container, members)
    own = exchange(module, stand_ins)
    try:
        output = run()
    finally:
        exchange(module, own)
    return Seen(output, sorted(eyes.lists, key=lambda seen: seen.began))


class _Eyes:
    """Sees the calls of all blocks, one after the other."""

    def __init__(self) -> None:
        self.lists: list[ListSeen] = []
        self.count = 0
        self._before: ListSeen | None = None  # whose block ran last

    def enters(self, seen: ListSeen, member: int, given: dict[str, torch.Tensor]) -> None:
        self.count += 1
        before, self._before = seen if seen.calls else self._before, seen
        if before is not None:  # what it returned may be what is given now
            for i, value in enumerate(before.returned):
                name = next((n for n, tensor in given.items() if tensor is value), None)
                if name is not None and name in before.given:
                    before.continues.setdefault(i, Counter())[name] += 1
        if not seen.calls:
            self.lists.append(seen)
            seen.began = self.count
            seen.given = {name: tensor.clone() for name, tensor in given.items()}
        seen.last_given = given
        seen.calls.append(member)
        seen.ended = self.count


class _Watched(StandIn):
    """A block in its own place, with what it gets and returns noted."""

    def __init__(self, block: torch.nn.Module, seen: ListSeen, member: int, eyes: _Eyes) -> None:
        super().__init__(block, BlockList(seen.name, ()))
        self.seen, self.member, self.eyes = seen, member, eyes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seen, names = self.seen, names_of(self.block)
        names = (*names, *(f"argument {i}" for i in range(len(names), len(args))))
        seen.takes = max(seen.takes, names, key=len)
        given = dict(zip(names, args, strict=False)) | kwargs
        self.eyes.enters(seen, self.member, {n: v for n, v in given.items() if isinstance(v, torch.Tensor)})
        output = self.block(*args, **kwargs)
        if len(seen.calls) == 1:
            seen.in_place = any(not torch.equal(given[name], was) for name, was in seen.given.items())
        seen.in_tuple = isinstance(output, tuple | list)
        seen.returned = tuple(output) if isinstance(output, tuple | list) else (output,)
        return output


def _outermost(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """The lists that are in no other list's member; of lists of lists, the inner ones."""
    for name, child in module.named_children():
        members = list(child.children())
        if isinstance(child, torch.nn.ModuleList):
            blocks = any(not isinstance(member, torch.nn.ModuleList | torch.nn.ModuleDict) for member in members)
        else:
            blocks = isinstance(child, torch.nn.Sequential) and len(members) > 1 and len({*map(type, members)}) == 1
        if blocks:
            yield prefix + name, child
        else:
            yield from _outermost(child, f"{prefix}{name}.")


# --------------------------------------------------------------------------------------------------------------- stacks


@dataclass(frozen=True)
class _Chain:
    """Lists that hand one stream on, and its name in each."""

    lists: tuple[ListSeen, ...]
    streams: tuple[str, ...]
    image_first: bool = False  # of a sequence that it is fused into on the way

    @property
    def size(self) -> int:
        return sum(one.size for one in self.lists)

    @property
    def rank(self) -> tuple[bool, int, bool, int]:
        """The lowest first."""
        prepares = any(PREPARES in one.name for one in self.lists)
        begin = self.lists[0].given[self.streams[0]]
        return prepares, -self.size, self.streams[0] != "hidden_states", -begin.numel()


def has_blocks(module: torch.nn.Module) -> bool:
    """Whether there is any list of blocks that could be looked at."""
    return any(True for _ in _outermost(unwrapped(module)))


def candidates(seen: Seen) -> Iterator[Candidate]:
    """The stacks that the call allows: chains of lists that do most of the work, without those that prepare first."""
    most = MOST_OF_THE_WORK * sum(one.size for one in seen.lists)
    usable = [one for one in seen.lists if one.returns is not None and len(one.calls) == len(set(one.calls))]
    chains = [chain for chain in _chains(usable) if chain.size > most]
    for chain in sorted(chains, key=lambda chain: chain.rank):
        yield from _stacks(chain.lists, [chain])
    for lists in dict.fromkeys(tuple(map(id, chain.lists)) for chain in chains):
        together = [chain for chain in chains if tuple(map(id, chain.lists)) == lists]
        if len(together) > 1:
            yield from _stacks(together[0].lists, together)


def why_none(seen: Seen) -> str:
    """Why `candidates` has nothing to offer."""
    total = sum(one.size for one in seen.lists) or 1
    large = [one for one in seen.lists if one.size >= 0.1 * total]
    if not large:
        return "no list of blocks runs in it"
    if again := [one.name for one in large if len(one.calls) > len(set(one.calls))]:
        return f"blocks of {', '.join(again)} run more than once in a call"
    if new := [one.name for one in large if one.returns is None]:
        return f"blocks of {', '.join(new)} return something that the next ones do not get"
    shares = ", ".join(f"{one.name} {one.size / total:.0%}" for one in large)
    return f"no chain of its block lists does most of the work ({shares})"


def _chains(lists: list[ListSeen]) -> Iterator[_Chain]:
    """Every stream of every list, and as far as it goes on into later ones."""
    for one in lists:
        for name in one.returns or ():
            if name in one.given:
                yield from _longer(_Chain((one,), (name,)), lists)


def _longer(chain: _Chain, lists: list[ListSeen]) -> Iterator[_Chain]:
    yield chain
    end = chain.lists[-1]
    out = end.returned[(end.returns or ()).index(chain.streams[-1])]
    for later in lists:
        if later.began > end.ended:
            for name in later.returns or ():
                place = _place(out, later.given.get(name))
                if place is not None:
                    grown = _Chain((*chain.lists, later), (*chain.streams, name), chain.image_first or place == "first")
                    yield from _longer(grown, lists)


def _place(stream: Any, given: torch.Tensor | None) -> str | None:
    """Where in `given` the stream is: the whole of it, or the first or last tokens of a fused sequence."""
    if not isinstance(stream, torch.Tensor) or given is None or stream.ndim != given.ndim:
        return None
    if stream.shape == given.shape:
        return "whole" if torch.equal(stream, given) else None
    if stream.ndim != 3 or stream.shape[1] >= given.shape[1] or stream.shape[::2] != given.shape[::2]:
        return None
    if torch.equal(stream, given[:, -stream.shape[1] :]):
        return "last"
    return "first" if torch.equal(stream, given[:, : stream.shape[1]]) else None


def _stacks(lists: tuple[ListSeen, ...], chains: list[_Chain]) -> Iterator[Candidate]:
    """One description for models that do not count their blocks, one for those that do."""
    first, last = lists[0], lists[-1]
    before = [first.given[chain.streams[0]] for chain in chains]
    after = [last.returned[(last.returns or ()).index(chain.streams[-1])] for chain in chains]
    if not all(isinstance(value, torch.Tensor) for value in after):
        return
    if len(chains) > 1 and any(a.shape != b.shape for a, b in zip(after, before, strict=True)):
        return
    stack = tuple(one.as_list(tuple(chain.streams[i] for chain in chains)) for i, one in enumerate(lists))
    written = any(one.in_place for one in lists)
    for every_place in (False, True):
        spec = DenoiserSpec(stack, (), image_first=chains[0].image_first, every_place=every_place, in_place=written)
        yield Candidate(spec, before, cropped(after, before, spec.image_first))
