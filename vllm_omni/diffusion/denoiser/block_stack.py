"""The seam in a denoiser: for one forward, its block stack is tapped or replaced. Tensors in, tensors out.

Nothing is patched: the `ModuleList`s of the stack are exchanged for the duration of one forward. *Tapped*, they hold
the same blocks, the first and the last with a tap, so that out - in can be taken. *Replaced*, they hold one block that
adds the forecast; the other lists are empty, and modules that work for the blocks alone (rotary tables, the text
embedding if nothing else reads it) are idle. Embedding and head always run. Outside a scope the denoiser is exactly
what diffusers made, and the blocks are whatever the module holds at the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_omni.diffusion.denoiser.specs import DenoiserSpec
from vllm_omni.errors import InvalidValueError

Correction = Callable[[torch.Tensor], torch.Tensor]
ATTENTIONS = ("attn", "attn1", "self_attention")  # what diffusers' blocks call their (first) attention


class _ForecastBlock(torch.nn.Module):
    """Takes a block's arguments, changes the hidden states, and returns what a block of its list returns."""

    def __init__(self, returns: tuple[str, ...], act: Correction) -> None:
        super().__init__()
        self.returns = returns
        self.act = act

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = _block_arguments(args, kwargs)
        values["hidden_states"] = self.act(values["hidden_states"])
        return _block_result(values, self.returns)


class _TappedBlock(torch.nn.Module):
    """A block in its own place whose hidden states are noted on the way in and on the way out."""

    def __init__(
        self,
        block: torch.nn.Module,
        returns: tuple[str, ...],
        on_input: Callable[[torch.Tensor], None] | None,
        on_output: Callable[[torch.Tensor], None],
    ) -> None:
        super().__init__()
        self.block = block
        self.returns = returns
        self.on_input, self.on_output = on_input, on_output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.on_input is not None:
            self.on_input(args[0] if args else kwargs["hidden_states"])
        output = self.block(*args, **kwargs)
        self.on_output(_hidden_of(output, self.returns))
        return output


class _AttentionReached(Exception):
    """Ends a block at the beginning of its attention."""


class _ProbeBlock(torch.nn.Module):
    """The first block under observation: what it adds, or what its attention gets. Hidden states pass unchanged."""

    def __init__(
        self,
        block: torch.nn.Module,
        returns: tuple[str, ...],
        attention: bool,
        on_seen: Callable[[torch.Tensor], None],
    ) -> None:
        super().__init__()
        self.block, self.returns, self.attention, self.on_seen = block, returns, attention, on_seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = _block_arguments(args, kwargs)
        if self.attention:
            self.on_seen(self._attention_input(*args, **kwargs))
        else:
            self.on_seen(_hidden_of(self.block(*args, **kwargs), self.returns) - values["hidden_states"])
        return _block_result(values, self.returns)

    def _attention_input(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention = first_attention(self.block)
        assert attention is not None
        reached: list[torch.Tensor] = []

        def reach(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(given[0] if given else named["hidden_states"])
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


def _block_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False))


def _block_result(values: dict[str, Any], returns: tuple[str, ...]) -> Any:
    return values[returns[0]] if len(returns) == 1 else tuple(values[name] for name in returns)


def _hidden_of(output: Any, returns: tuple[str, ...]) -> torch.Tensor:
    return output if len(returns) == 1 else output[returns.index("hidden_states")]


def first_attention(block: torch.nn.Module) -> torch.nn.Module | None:
    """The attention that a block's input reaches first; None if no child has such a name."""
    return next((m for name, m in block.named_modules() if name.rpartition(".")[2] in ATTENTIONS), None)


class BlockStack:
    """The block stack of one denoiser. One scope at a time, from `enter` to `leave`."""

    def __init__(self, module: torch.nn.Module, spec: DenoiserSpec) -> None:
        """InvalidValueError if `module` lacks the block lists of its spec, or has no block at all."""
        self.module = module
        self.lists = spec.stack
        self._spec = spec
        missing = [b.name for b in self.lists if b.name not in dict(module.named_children())]
        if missing:
            raise InvalidValueError(type(module).__name__, missing, "lacks the block lists its description names")
        self._correction: Correction | None = None
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._first_output: torch.Tensor | None = None
        self._own: dict[str, torch.nn.Module | None] | None = None  # the module's children while a scope is open
        self._build()

    def _current_blocks(self) -> list[list[torch.nn.Module]]:
        modules = self.module._modules
        return [list(lists.children()) for b in self.lists if (lists := modules[b.name]) is not None]

    def _build(self) -> None:
        """Make the stand-ins of the blocks that the module has now."""
        members = self._current_blocks()
        self._blocks = [block for blocks in members for block in blocks]
        used = [i for i, blocks in enumerate(members) if blocks]
        if not used:
            name = type(self.module).__name__
            raise InvalidValueError(name, 0, "must have at least one transformer block to be cached")
        first, last = used[0], used[-1]
        self._first_block, self._first_list = members[first][0], self.lists[first]
        returns = [block_list.returns for block_list in self.lists]
        members[first][0] = _TappedBlock(members[first][0], returns[first], self._tap_input, self._tap_first)
        members[last][-1] = _TappedBlock(members[last][-1], returns[last], None, self._tap_output)
        # As many blocks as before, in their places: some models count them.
        self._tapped: dict[str, torch.nn.Module] = {
            b.name: torch.nn.ModuleList(m) for b, m in zip(self.lists, members, strict=True)
        }
        idle = {name: _Idle() for name in self._spec.only_for_blocks if name in self.module._modules}
        self._replaced = self._only(_ForecastBlock(self._first_list.returns, self._correct)) | idle

    def _only(self, block: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The lists with `block` alone, at the beginning of the stack."""
        lists: dict[str, torch.nn.Module] = {b.name: torch.nn.ModuleList() for b in self.lists}
        return lists | {self._first_list.name: torch.nn.ModuleList([block])}

    def _tap_input(self, x: torch.Tensor) -> None:
        self._input = x

    def _tap_first(self, x: torch.Tensor) -> None:
        self._first_output = x

    def _tap_output(self, x: torch.Tensor) -> None:
        self._output = x

    def _correct(self, x: torch.Tensor) -> torch.Tensor:
        assert self._correction is not None
        return self._correction(x)

    def enter(self, correction: Correction | None = None) -> None:
        """Begin a scope, in which forwards run no block if a correction is given, and every one, tapped, if not.

        `correction` maps the hidden states before the stack to those after it, (rows, tokens, channels).
        """
        self._follow()
        self._exchange(self._tapped if correction is None else self._replaced)
        self._correction = correction

    def _follow(self) -> None:
        """Blocks that were replaced since the last scope are the stack's blocks from now on."""
        now = [block for blocks in self._current_blocks() for block in blocks]
        if len(now) != len(self._blocks) or any(a is not b for a, b in zip(now, self._blocks, strict=True)):
            self._build()

    def _exchange(self, stand_ins: dict[str, torch.nn.Module]) -> None:
        if self._own is not None:
            raise RuntimeError("a block stack has one scope at a time")
        modules = self.module._modules
        self._own = {name: modules[name] for name in stand_ins}
        modules.update(stand_ins)

    def leave(self) -> None:
        """End the scope, if one is open: the denoiser's own lists are back, and no tensor is held."""
        if self._own is None:
            return
        self.module._modules.update(self._own)
        self._correction = self._input = self._output = self._first_output = self._own = None

    def probe(self, run: Callable[[], Any], attention: bool = False) -> torch.Tensor:
        """What `run`, a forward of the denoiser, shows at its first block: what it adds, or what its attention gets.

        Embedding and head run, the other blocks do not. Shape (rows, tokens, channels).
        """
        seen: list[torch.Tensor] = []
        self._follow()
        self._exchange(self._only(_ProbeBlock(self._first_block, self._first_list.returns, attention, seen.append)))
        try:
            run()
        finally:
            self.leave()
        return seen[0]

    def first_residual(self, rows: slice = slice(None)) -> torch.Tensor | None:
        """out - in of the first block alone; None unless a tapped forward has run."""
        if self._input is None or self._first_output is None:
            return None
        return self._first_output[rows] - self._input[rows]

    def ends(self, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(after, before) the blocks: the image tokens of `rows` of the last tapped forward, (rows, tokens, channels).

        None unless a tapped forward has run. Of a tail that returns the fused text+image sequence the image tokens
        alone are taken.
        """
        if self._input is None or self._output is None:
            return None
        before = self._input[rows]
        tokens = before.shape[1]
        after = self._output[rows]
        return (after[:, :tokens] if self._spec.image_first else after[:, -tokens:]), before
