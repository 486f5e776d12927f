"""The seam in a denoiser: for one forward, its block stack is tapped or replaced. Tensors in, tensors out.

Nothing is patched: the `ModuleList`s of the stack are exchanged for the duration of one forward. *Tapped*, they hold
the same blocks, the first and the last with a tap, so that out - in can be taken; *replaced*, they hold one block that
adds the forecast, the others are empty, and modules that work for the blocks alone (rotary tables, the text embedding
where nothing else reads it) are idle. Embedding and head run as always, but for what `conditioning` remembers. Outside
a scope the denoiser is exactly what diffusers made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_omni.diffusion.denoisers import DenoiserSpec
from vllm_omni.diffusion.hooks.conditioning import Conditioning, Memory
from vllm_omni.errors import InvalidValueError

Correction = Callable[[torch.Tensor], torch.Tensor]
Note = Callable[[torch.Tensor], None]
ATTENTIONS = ("attn", "attn1", "self_attention")  # what diffusers' blocks call their (first) attention


class _Block(torch.nn.Module):
    """Takes a block's arguments, changes the hidden states, and returns what a block of its list returns."""

    def __init__(self, returns: tuple[str, ...], act: Correction) -> None:
        super().__init__()
        self.returns = returns
        self.act = act

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = kwargs | dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False))
        values["hidden_states"] = self.act(values["hidden_states"])
        if len(self.returns) == 1:
            return values[self.returns[0]]
        return tuple(values[name] for name in self.returns)


class _Tapped(torch.nn.Module):
    """A block in its own place, with the hidden states noted as they come in and as they go out."""

    def __init__(
        self, block: torch.nn.Module, returns: tuple[str, ...], come: Correction | None, go: Correction | None
    ) -> None:
        super().__init__()
        self.block = block
        self.index = returns.index("hidden_states") if len(returns) > 1 else None
        self.come, self.go = come, go

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.come is not None:
            self.come(args[0] if args else kwargs["hidden_states"])
        output = self.block(*args, **kwargs)
        if self.go is not None:
            self.go(output if self.index is None else output[self.index])
        return output


class _Reached(Exception):
    """Ends a block where its attention begins."""


def first_attention(block: torch.nn.Module) -> torch.nn.Module | None:
    """The attention that a block's input reaches first; None where no child has such a name."""
    return next((m for name, m in block.named_modules() if name.rpartition(".")[2] in ATTENTIONS), None)


class _Probe(torch.nn.Module):
    """The first block, looked at: what it adds, or what its attention gets. The hidden states go on unchanged."""

    def __init__(self, block: torch.nn.Module, returns: tuple[str, ...], attention: bool, note: Note) -> None:
        super().__init__()
        self.block, self.returns, self.attention, self.note = block, returns, attention, note

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = kwargs | dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False))
        if self.attention:
            self.note(self._attention_input(*args, **kwargs))
        else:
            output = self.block(*args, **kwargs)
            hidden = output if len(self.returns) == 1 else output[self.returns.index("hidden_states")]
            self.note(hidden - values["hidden_states"])
        results = tuple(values[name] for name in self.returns)
        return results[0] if len(results) == 1 else results

    def _attention_input(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention = first_attention(self.block)
        assert attention is not None
        reached: list[torch.Tensor] = []

        def reach(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(given[0] if given else named["hidden_states"])
            raise _Reached

        handle = attention.register_forward_pre_hook(reach, with_kwargs=True)
        try:
            self.block.forward(*args, **kwargs)  # not a compiled call: the graph would run past the attention
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]


class _Idle(torch.nn.Module):
    """Stands in for a module that works for the blocks alone, while there are none."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


class BlockStack:
    """The block stack of one denoiser. One scope at a time: `tapped()` or `replaced(correction)`."""

    def __init__(self, module: torch.nn.Module, spec: DenoiserSpec) -> None:
        self.module = module
        self.lists = spec.stack
        self._image_first = spec.image_first
        modules = dict(module.named_children())
        missing = [b.name for b in self.lists if b.name not in modules]
        if missing:
            raise InvalidValueError(type(module).__name__, missing, "lacks the block lists its description names")
        self.blocks = [list(modules[b.name].children()) for b in self.lists]
        used = [i for i, blocks in enumerate(self.blocks) if blocks]
        if not used:
            raise InvalidValueError(type(module).__name__, 0, "must have at least one transformer block to be cached")
        self._first, self._last = used[0], used[-1]
        self._correction: Correction | None = None
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._first_output: torch.Tensor | None = None
        self._open = False
        self._own: dict[str, torch.nn.Module | None] = {}
        self._tapped = self._with_taps()
        idle = {name: _Idle() for name in spec.only_for_blocks if name in modules}
        self._replaced = self._without_blocks() | idle
        self._conditioning = Conditioning(module, spec.conditioning)

    @property
    def count(self) -> int:
        """Blocks in the stack."""
        return sum(map(len, self.blocks))

    def _with_taps(self) -> dict[str, torch.nn.Module]:
        """As many blocks as before, in their places: some models count them."""
        members = [list(blocks) for blocks in self.blocks]
        returns = [block_list.returns for block_list in self.lists]
        first, last = self._first, self._last
        members[first][0] = _Tapped(members[first][0], returns[first], self._tap_input, self._tap_first)
        members[last][-1] = _Tapped(members[last][-1], returns[last], None, self._tap_output)
        return {b.name: torch.nn.ModuleList(m) for b, m in zip(self.lists, members, strict=True)}

    def _without_blocks(self) -> dict[str, torch.nn.Module]:
        lists: dict[str, torch.nn.Module] = {b.name: torch.nn.ModuleList() for b in self.lists}
        first = self.lists[self._first]
        lists[first.name] = torch.nn.ModuleList([_Block(first.returns, self._correct)])
        return lists

    def _tap_input(self, x: torch.Tensor) -> torch.Tensor:
        self._input = x
        return x

    def _tap_first(self, x: torch.Tensor) -> torch.Tensor:
        self._first_output = x
        return x

    def _tap_output(self, x: torch.Tensor) -> torch.Tensor:
        self._output = x
        return x

    def _correct(self, x: torch.Tensor) -> torch.Tensor:
        assert self._correction is not None
        return self._correction(x)

    def enter(self, correction: Correction | None = None, memory: Memory | None = None) -> None:
        """Begin a scope by hand (see the context managers): tapped, or replaced where a correction is given."""
        self._correction = correction
        self._exchange(self._tapped if correction is None else self._replaced)
        if memory is not None and self.module._compiled_call_impl is None:  # stand-ins would be one more graph
            self._conditioning.enter(memory)

    def _exchange(self, stand_ins: dict[str, torch.nn.Module]) -> None:
        if self._open:
            raise RuntimeError("a block stack has one scope at a time")
        self._open = True
        modules = self.module._modules
        self._own = {name: modules[name] for name in stand_ins}
        modules.update(stand_ins)

    def leave(self) -> None:
        """End the scope: the denoiser's own lists are back, no tensor is held."""
        if not self._open:
            return
        self.module._modules.update(self._own)
        self._conditioning.leave()
        self._correction = self._input = self._output = self._first_output = None
        self._open = False

    @contextmanager
    def tapped(self) -> Iterator[BlockStack]:
        """Within, a forward runs every block, and afterwards `ends()` tells what they changed."""
        self.enter()
        try:
            yield self
        finally:
            self.leave()

    @contextmanager
    def replaced(self, correction: Correction, memory: Memory | None = None) -> Iterator[BlockStack]:
        """Within, a forward runs no block: `correction` maps the hidden states before the stack to those after it.

        `memory` is that of the one request whose rows these are; None where several share the forward.
        """
        self.enter(correction, memory)
        try:
            yield self
        finally:
            self.leave()

    def probe(self, run: Callable[[], Any], attention: bool) -> torch.Tensor:
        """What `run`, a forward of the denoiser, shows at its first block: what it adds, or what its attention gets.

        Embedding and head run, the other blocks do not. Shape (rows, tokens, channels).
        """
        first = self.lists[self._first]
        noted: list[torch.Tensor] = []
        block = _Probe(self.blocks[self._first][0], first.returns, attention, noted.append)
        lists: dict[str, torch.nn.Module] = {b.name: torch.nn.ModuleList() for b in self.lists}
        self._exchange(lists | {first.name: torch.nn.ModuleList([block])})
        try:
            run()
        finally:
            self.leave()
        return noted[0]

    def first_residual(self, rows: slice = slice(None)) -> torch.Tensor | None:
        """out - in of the first block alone."""
        if self._input is None or self._first_output is None:
            return None
        return self._first_output[rows] - self._input[rows]

    def ends(self, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(after, before) the blocks: the image tokens of `rows` of the last tapped forward, (rows, tokens, channels).

        Of a tail that returns the fused text+image sequence the image tokens alone are taken.
        """
        if self._input is None or self._output is None:
            return None
        before = self._input[rows]
        tokens = before.shape[1]
        after = self._output[rows]
        return (after[:, :tokens] if self._image_first else after[:, -tokens:]), before
