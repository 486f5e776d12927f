"""Small denoisers that are easy to misunderstand, and what they are called with."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

WIDTH, BLOCKS = 16, 4


class Block(nn.Module):
    """A residual block of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, img: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return img + torch.tanh(self.inner(self.norm(img + img.mean(1, keepdim=True)) + emb))


class Plain(nn.Module):
    """What all others differ from in one thing: embedding, blocks, head; no argument is called as in diffusers."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.trunk = nn.ModuleList(Block() for _ in range(blocks))

    def begin(self, noisy: torch.Tensor, when: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embed(noisy), self.time(when[:, None, None])

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        for block in self.trunk:
            x = block(x, emb)
        return self.head(x)


class Sequential(Plain):
    """Its blocks are no `ModuleList`, and run as one module."""

    def __init__(self) -> None:
        super().__init__(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0, batch_first=True)
        self.trunk = nn.Sequential(*(type(layer)(WIDTH, 2, WIDTH, 0, batch_first=True) for _ in range(BLOCKS)))

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        return self.head(self.trunk(x + emb))


class EarlyRead(Plain):
    """The head reads what the second block has made, too."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        early = x
        for i, block in enumerate(self.trunk):
            x = block(x, emb)
            early = x if i == 1 else early
        return self.head(x * early)


class LongSkip(Plain):
    """The embedding goes around the stack."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        around = x
        for block in self.trunk:
            x = block(x, emb)
        return self.head(x * around)


class ByPosition(Plain):
    """Its blocks are named one by one."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        x = self.trunk[1](self.trunk[0](x, emb), emb)
        return self.head(self.trunk[3](self.trunk[2](x, emb), emb))


class AddsBetween(Plain):
    """Something is added after every second block."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        for i, block in enumerate(self.trunk):
            x = block(x, emb)
            if i % 2 == 0:
                x = x + emb.sin()
        return self.head(x)


class Skips(Plain):
    """A block is left out if the call says so."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, skip: int | None = None) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        for i, block in enumerate(self.trunk):
            x = x if i == skip else block(x, emb)
        return self.head(x)


class Remembers(Plain):
    """A part of the last call's latents is in this call's output."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[torch.Tensor] = []

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        out = super().forward(noisy, when)
        out = out + 0.1 * self.last[-1] if self.last else out
        self.last.append(noisy)
        return out


class Compares(Plain):
    """What has changed since the last call is in this call's output: the same call twice hides it."""

    last: torch.Tensor | None = None

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        moved, self.last = 0.0 if self.last is None else noisy - self.last, noisy
        return super().forward(noisy, when) + moved


class Counts(Plain):
    """Every call is another."""

    calls = 0

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(noisy, when) * (1 + 1 / self.calls)


class Noisy(Plain):
    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        return super().forward(noisy + 0.01 * torch.randn_like(noisy), when)


class Boxed(Plain):
    """Returns an object of its own kind."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> Any:
        return SimpleNamespace(sample=super().forward(noisy, when))


class KeepsMean(Plain):
    """Notes in place what it has seen, in a plain tensor, in a list and by a generator of its own; reads none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.kept = torch.zeros(6, 4), [torch.zeros(1)]
        self.draws = torch.Generator().manual_seed(0)

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(noisy.mean(0))
        self.kept[0] += 1
        torch.rand(1, generator=self.draws)
        np.random.rand()
        random.random()
        return super().forward(noisy, when)


class BatchMean(Plain):
    """Samples see each other."""

    def begin(self, noisy: torch.Tensor, when: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, emb = super().begin(noisy, when)
        return x - x.mean(0, keepdim=True) * 0.5, emb


class BatchNorm(Plain):
    """In training mode: samples see each other, and the statistics change with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def begin(self, noisy: torch.Tensor, when: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().begin(self.norm.train()(noisy.transpose(1, 2)).transpose(1, 2), when)


class Nested(nn.Module):
    """The blocks are two modules further down."""

    def __init__(self) -> None:
        super().__init__()
        self.shell = nn.ModuleDict({"core": Plain()})

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        return self.shell["core"](noisy, when)


class Parallel(Plain):
    """Two stacks begin with the same embedding, and the head reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        y = x
        for block in self.trunk:
            x = block(x, emb)
        for block in self.other:
            y = block(y, emb)
        return self.head(x * y)


class Twice(Plain):
    """The stack runs two times in a call."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        for block in [*self.trunk, *self.trunk]:
            x = block(x, emb)
        return self.head(x)


class InPlaceBlock(Block):
    def forward(self, img: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return img.add_(super().forward(img, emb))


class InPlace(Plain):
    """Blocks write into the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(InPlaceBlock() for _ in range(BLOCKS))


class Unused(Plain):
    """What a block returns is thrown away: it has written into the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(InPlaceBlock() for _ in range(BLOCKS))

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        for block in self.trunk:
            block(x, emb)
        return self.head(x)


class TwoStreams(Block):
    def forward(self, img: torch.Tensor, txt: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen, read = img.mean(1, keepdim=True), txt.mean(1, keepdim=True)
        return super().forward(img, emb + read), super().forward(txt, emb + seen)


class Swapped(TwoStreams):
    def forward(self, img: torch.Tensor, txt: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        img, txt = super().forward(img, txt, emb)
        return txt, img


class Joint(Plain):
    """Two lists of blocks with two streams, the second of which returns them the other way round."""

    def __init__(self) -> None:
        super().__init__(0)
        self.words = nn.Linear(4, WIDTH)
        self.pairs = nn.ModuleList(TwoStreams() for _ in range(2))
        self.tail = nn.ModuleList(Swapped() for _ in range(2))

    def streams(self, noisy: torch.Tensor, when: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x, emb), txt = self.begin(noisy, when), self.words(text)
        for block in self.pairs:
            x, txt = block(x, txt, emb)
        for block in self.tail:
            txt, x = block(x, txt, emb)
        return x, txt

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.head(self.streams(noisy, when, text)[0])


class ReadsText(Joint):
    """The head reads both streams."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x, txt = self.streams(noisy, when, text)
        return self.head(x * txt.mean(1, keepdim=True))


class EncoderDecoder(Joint):
    """One list, whose second half is given as text what the first has made, and begins with the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.tail = nn.ModuleList(TwoStreams() for _ in range(2)), nn.ModuleList()

    def streams(self, noisy: torch.Tensor, when: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x, emb), txt = self.begin(noisy, when), self.words(text)
        encode, decode = self.pairs
        made, _ = encode(x, txt, emb)
        return decode(x, made, emb)


class NewBlock(Block):
    def forward(self, img: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        out = super().forward(img, emb)
        return out, out.mean((1, 2))


class ReturnsMore(Plain):
    """Blocks return something that no block takes, and the head reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(NewBlock() for _ in range(BLOCKS))

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        total = 0
        for block in self.trunk:
            x, more = block(x, emb)
            total = total + more
        return self.head(x) * total[:, None, None]


class Without(nn.Module):
    """No list of blocks at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, noisy: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(noisy) + when[:, None, None]))


class Positions(Plain):
    """Takes positions with a leading dimension of one, and reads the first sample's alone."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return super().forward(noisy + places[:1, :, None] * 0.1, when)


class TakesWidth(Plain):
    """Is told a width, which it has no use for."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, width: int = 64) -> torch.Tensor:
        return super().forward(noisy, when)


class FirstHint(Plain):
    """Takes the first sample's hint for all, and makes so little of a small one that rounding would hide it."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        return super().forward(noisy + 1e-7 * hint[:1, None, :1].expm1(), when)


class FirstMask(Plain):
    """Leaves out the tokens that the first sample's mask leaves out."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
        return super().forward(noisy.masked_fill(left_out[:1, :, None], 0.0), when)


def made(kind: Callable[[], nn.Module]) -> Any:
    """A model of that kind, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def call_of(seed: int = 0, rows: int = 1, **more: Any) -> dict[str, Any]:
    """Arguments of a call."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(rows, 6, 4, generator=generator)
    return {"noisy": noisy, "when": torch.rand(rows, generator=generator), **more}


def text_of(seed: int = 0, rows: int = 1, tokens: int = 6) -> torch.Tensor:
    return torch.randn(rows, tokens, 4, generator=torch.Generator().manual_seed(100 + seed))
