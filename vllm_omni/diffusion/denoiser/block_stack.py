"""The seam in a denoiser: for one forward, its block stack is tapped or replaced. Tensors in, tensors out.

Nothing is patched: the `ModuleList`s of the stack are exchanged for the duration of one forward. *Tapped*, they hold
the same blocks, the first and the last with a tap, so that out - in can be taken. *Replaced*, they hold one block that
adds the forecast; the other lists are empty, and modules that work for the blocks alone (rotary tables, the text
embedding if nothing else reads it) are idle. A model that counts its blocks gets as many that pass on what they get,
the last of which adds the forecast to what the first got. Embedding and head always run. Outside a scope the denoiser
is exactly what diffusers made, and the blocks are whatever the module holds at the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.specs import BlockList, DenoiserSpec
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.splits import splits_of

Correction = Callable[[torch.Tensor], torch.Tensor]
Streams = list[torch.Tensor]
ATTENTIONS = ("attn", "attn1", "self_attention")  # what diffusers' blocks call their (first) attention


class StandIn(torch.nn.Module):
    """Stands in a block's place, and has the block's attributes: some models read them between two blocks."""

    def __init__(self, block: torch.nn.Module, of: BlockList) -> None:
        super().__init__()
        self.block, self.of = block, of

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The block's arguments by name."""
        return dict(kwargs) | dict(zip(self.of.takes, args, strict=False))

    def given(self, values: Mapping[str, Any]) -> Streams:
        """The streams on their way in: of a block that splits them among ranks, this rank's part."""
        splits = splits_of(self.block)
        return [splits[name](values[name]) if name in splits else values[name] for name in self.of.streams]

    def made(self, output: Any) -> Streams:
        """The streams on their way out."""
        if len(self.of.returns) == 1 and not self.of.in_tuple:
            return [output]
        return [output[self.of.returns.index(name)] for name in self.of.streams]

    def passed(self, values: Mapping[str, Any], streams: Streams) -> Any:
        """What the block would return if it left everything as it was, but with these streams."""
        now = {**values, "": None} | dict(zip(self.of.streams, streams, strict=True))
        output = tuple(now[name] for name in self.of.returns)
        return output if len(output) > 1 or self.of.in_tuple else output[0]


class _ForecastBlock(StandIn):
    """Takes a block's arguments, changes the streams, and returns what a block of its list returns."""

    def __init__(self, block: torch.nn.Module, of: BlockList, act: Callable[[Streams], Streams]) -> None:
        super().__init__(block, of)
        self.act = act

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = self.bound(args, kwargs)
        return self.passed(values, self.act(self.given(values)))


class _TappedBlock(StandIn):
    """A block in its own place whose streams are noted on the way in and on the way out."""

    def __init__(
        self,
        block: torch.nn.Module,
        of: BlockList,
        on_input: Callable[[Streams], None] | None,
        on_output: Callable[[Streams], None],
    ) -> None:
        super().__init__(block, of)
        self.on_input, self.on_output = on_input, on_output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.on_input is not None:
            self.on_input(self.given(self.bound(args, kwargs)))
        output = self.block(*args, **kwargs)
        self.on_output(self.made(output))
        return output


class _AttentionReached(Exception):
    """Ends a block at the beginning of its attention."""


class _ProbeBlock(StandIn):
    """The first block under observation: what it adds, or what its attention gets. The streams pass unchanged."""

    def __init__(
        self, block: torch.nn.Module, of: BlockList, attention: bool, on_seen: Callable[[Streams, Streams | None], None]
    ) -> None:
        super().__init__(block, of)
        self.attention, self.on_seen = attention, on_seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = self.bound(args, kwargs)
        if self.attention:
            self.on_seen([self._attention_input(*args, **kwargs)], None)
        else:
            self.on_seen(self.made(self.block(*args, **kwargs)), self.given(values))
        return self.passed(values, self.given(values))

    def _attention_input(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention = first_attention(self.block)
        assert attention is not None
        reached: list[torch.Tensor] = []

        def reach(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(next(v for v in (*given, *named.values()) if isinstance(v, torch.Tensor)))
            raise _AttentionReached

        handle = attention.register_forward_pre_hook(reach, with_kwargs=True)
        try:
            self.block.forward(*args, **kwargs)  # not a compiled call: the graph would run past the attention
        except _AttentionReached:
            pass
        finally:
            handle.remove()
        return reached[0]


class _Idle(torch.nn.Module):
    """Stands in for a module that works for the blocks alone, while there are none."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


def first_attention(block: torch.nn.Module) -> torch.nn.Module | None:
    """The attention that a block's input reaches first; None if no child has such a name."""
    return next((m for name, m in block.named_modules() if name.rpartition(".")[2] in ATTENTIONS), None)


def like(container: torch.nn.Module, members: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """A container of the same kind, also of a class of the model's own."""
    twin = copy.copy(container)
    vars(twin)["_modules"] = {str(i): member for i, member in enumerate(members)}
    return twin


def pack(streams: Streams, rows: int) -> torch.Tensor:
    """The streams as one tensor (rows, tokens, channels); of streams of different widths, one token has everything."""
    if len(streams) == 1 and streams[0].ndim == 3 and len(streams[0]) == rows:
        return streams[0]
    width = streams[0].shape[-1] if len({stream.shape[-1] for stream in streams}) == 1 else -1
    flat = [stream.reshape(rows, -1, width) if width > 0 else stream.reshape(rows, 1, -1) for stream in streams]
    return torch.cat(flat, dim=1 if width > 0 else 2)


def unpack(packed: torch.Tensor, streams: Streams) -> Streams:
    """What `pack` has made of `streams`, in their shapes."""
    if len(streams) == 1:
        return [packed.reshape(streams[0].shape)]
    rows, dim = len(packed), 1 if packed.shape[1] > 1 else 2
    sizes = [stream.numel() // rows // (packed.shape[2] if dim == 1 else 1) for stream in streams]
    return [part.reshape(s.shape) for part, s in zip(packed.split(sizes, dim), streams, strict=True)]


class BlockStack:
    """The block stack of one denoiser. One scope at a time, from `enter` to `leave`."""

    def __init__(self, module: torch.nn.Module, spec: DenoiserSpec) -> None:
        """InvalidValueError if `module` lacks the block lists of its spec, or has no block at all."""
        self.module = module
        self.lists = spec.stack
        self.spec = spec
        known = dict(module.named_modules())
        if missing := [b.name for b in self.lists if b.name not in known]:
            raise InvalidValueError(type(module).__name__, missing, "lacks the block lists its description names")
        self._correction: Correction | None = None
        self._rows: int | None = None
        self._input: Streams | None = None
        self._output: Streams | None = None
        self._first_output: Streams | None = None
        self._own: dict[str, torch.nn.Module | None] | None = None  # what was exchanged while a scope is open
        self._build()

    def _current_blocks(self) -> list[list[torch.nn.Module]]:
        return [list(self.module.get_submodule(b.name).children()) for b in self.lists]

    def _build(self) -> None:
        """Make the stand-ins of the blocks that the module has now."""
        members = self._current_blocks()
        self._blocks = [block for blocks in members for block in blocks]
        used = [i for i, blocks in enumerate(members) if blocks]
        if not used:
            name = type(self.module).__name__
            raise InvalidValueError(name, 0, "must have at least one transformer block to be cached")
        first, last = used[0], used[-1]
        self.first_block, self._first_list = members[first][0], self.lists[first]
        places = [[_ForecastBlock(m, b, list) for m in own] for own, b in zip(members, self.lists, strict=True)]
        members[first][0] = _TappedBlock(members[first][0], self.lists[first], self._tap_input, self._tap_first)
        members[last][-1] = _TappedBlock(members[last][-1], self.lists[last], None, self._tap_output)
        # As many blocks as before, in their places: some models count them.
        self._tapped = self._filled(members)
        if self.spec.every_place:
            places[first][0].act, places[last][-1].act = self._note_first, self._correct_last
            self._replaced = self._filled(places)
        else:
            self._replaced = self._only(_ForecastBlock(self.first_block, self._first_list, self._correct))
        children = self.module._modules
        self._replaced |= {name: _Idle() for name in self.spec.only_for_blocks if name in children}

    def _filled(self, members: Sequence[Sequence[torch.nn.Module]]) -> dict[str, torch.nn.Module]:
        lists = zip(self.lists, members, strict=True)
        return {b.name: like(self.module.get_submodule(b.name), own) for b, own in lists}

    def _only(self, block: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The lists with `block` alone, at the beginning of the stack."""
        return self._filled([[block] if b is self._first_list else [] for b in self.lists])

    def _tap_input(self, streams: Streams) -> None:
        self._input = [stream.clone() for stream in streams] if self.spec.in_place else streams

    def _tap_first(self, streams: Streams) -> None:
        self._first_output = streams

    def _tap_output(self, streams: Streams) -> None:
        self._output = streams

    def _correct(self, streams: Streams) -> Streams:
        assert self._correction is not None
        return unpack(self._correction(self._packed(streams)), streams)

    def _note_first(self, streams: Streams) -> Streams:
        self._input = streams
        return streams

    def _correct_last(self, streams: Streams) -> Streams:
        """The streams after the stack, among what else has come into them: a fused tail's text."""
        first = self._input if self._input is not None else streams
        corrected = self._correct(first)
        if corrected[0].shape == streams[0].shape:
            return corrected
        tokens = first[0].shape[1]
        parts = (
            [corrected[0], streams[0][:, tokens:]] if self.spec.image_first else [streams[0][:, :-tokens], *corrected]
        )
        return [torch.cat(parts, dim=1)]

    def _packed(self, streams: Streams) -> torch.Tensor:
        return pack(streams, len(streams[0]) if self._rows is None else self._rows)

    def enter(self, correction: Correction | None = None, rows: int | None = None) -> None:
        """Begin a scope, in which forwards run no block if a correction is given, and every one, tapped, if not.

        `correction` maps the hidden states before the stack to those after it, (rows, tokens, channels). `rows` is the
        number of samples in the forward, if a sample may have several rows of the streams.
        """
        self._follow()
        self._exchange(self._tapped if correction is None else self._replaced)
        self._correction, self._rows = correction, rows

    def _follow(self) -> None:
        """Blocks that were replaced since the last scope are the stack's blocks from now on."""
        now = [block for blocks in self._current_blocks() for block in blocks]
        if len(now) != len(self._blocks) or any(a is not b for a, b in zip(now, self._blocks, strict=True)):
            self._build()

    def _exchange(self, stand_ins: dict[str, torch.nn.Module]) -> None:
        if self._own is not None:
            raise RuntimeError("a block stack has one scope at a time")
        self._own = exchange(self.module, stand_ins)

    def leave(self) -> None:
        """End the scope, if one is open: the denoiser's own lists are back, and no tensor is held."""
        if self._own is None:
            return
        exchange(self.module, self._own)
        self._correction = self._rows = self._input = self._output = self._first_output = self._own = None

    def probe(self, run: Callable[[], Any], attention: bool = False, rows: int | None = None) -> torch.Tensor:
        """What `run`, a forward of the denoiser, shows at its first block: what it adds, or what its attention gets.

        Embedding and head run, the other blocks do not. Shape (rows, tokens, channels).
        """
        seen: list[torch.Tensor] = []

        def note(after: Streams, before: Streams | None) -> None:
            seen.append(after[0] if before is None else self._packed(after) - self._packed(before))

        self._follow()
        self._exchange(self._only(_ProbeBlock(self.first_block, self._first_list, attention, note)))
        self._rows = rows
        try:
            run()
        finally:
            self.leave()
        return seen[0]

    def first_residual(self, rows: slice = slice(None)) -> torch.Tensor | None:
        """out - in of the first block alone; None unless a tapped forward has run."""
        if self._input is None or self._first_output is None:
            return None
        return self._packed(self._first_output)[rows] - self._packed(self._input)[rows]

    def ends(self, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(after, before) the blocks: what is cached of `rows` of the last tapped forward, (rows, tokens, channels).

        None unless a tapped forward has run. Of a tail that returns the fused text+image sequence the image tokens
        alone are taken.
        """
        if self._input is None or self._output is None:
            return None
        return self._packed(cropped(self._output, self._input, self.spec.image_first))[rows], self._packed(self._input)[
            rows
        ]


def cropped(after: Streams, before: Streams, image_first: bool) -> Streams:
    """Of a fused sequence, (rows, tokens, channels), the tokens that were there before."""
    if len(after) > 1 or after[0].shape == before[0].shape:
        return after
    tokens = before[0].shape[1]
    return [after[0][:, :tokens] if image_first else after[0][:, -tokens:]]


def exchange(
    module: torch.nn.Module, stand_ins: Mapping[str, torch.nn.Module | None]
) -> dict[str, torch.nn.Module | None]:
    """Put `stand_ins` in the places of the submodules of these names, and return those."""
    own: dict[str, torch.nn.Module | None] = {}
    for name, stand_in in stand_ins.items():
        parent, _, key = name.rpartition(".")
        children = module.get_submodule(parent)._modules
        own[name], children[key] = children[key], stand_in
    return own
