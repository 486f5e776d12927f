"""Promised tensors: views of them are promised, everything else asks first, and nothing is read before its time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from vllm_omni.kernels.promise import Promise, PromisedTensor, form_of, holds_promised, kept

RESULT = torch.arange(24.0).reshape(2, 3, 4)


def promise_of(result: Any) -> tuple[Any, list[int], Promise]:
    """What stands for `result`, how often it was asked for, and the promise."""
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        promise.keep(result)

    promise = Promise(form_of(result), ask)
    return promise.value, asked, promise


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "slice": lambda x: x[:, 1:],
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "permute": lambda x: x.permute(2, 0, 1),
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.reshape(6, 4),
    "unsqueeze": lambda x: x.unsqueeze(0)[..., 0],
    "attribute": lambda x: x.mT,
    "same dtype": lambda x: x.float().detach(),
}
NEEDED: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda x: x.sum(),
    "in place": lambda x: x.mul_(2),
    "operator": lambda x: 1.0 - x,
    "in a list": lambda x: torch.cat([torch.zeros(2, 3, 4), x]),
    "by keyword": lambda x: torch.add(torch.ones(2, 3, 4), other=x),
    "mask": lambda x: x[x.new_ones(2, 3, 4).bool()],
    "index": lambda x: x[torch.tensor([1, 0])],
    "copying reshape": lambda x: x.permute(2, 1, 0).reshape(4, 6),
    "other dtype": lambda x: x.to(torch.float64),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "number": lambda x: float(x[0, 0, 1]),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_promised_and_filled_with_it(name: str) -> None:
    value, asked, promise = promise_of(RESULT)
    view = VIEWS[name](value)
    assert isinstance(view, PromisedTensor) and not asked
    assert view.shape == VIEWS[name](RESULT).shape and view.dim() == view.ndim
    promise.keep(RESULT)
    assert type(view + 0) is torch.Tensor and torch.equal(view + 0, VIEWS[name](RESULT)) and not asked


@pytest.mark.parametrize("name", NEEDED)
def test_whatever_needs_the_numbers_asks_once(name: str) -> None:
    value, asked, _ = promise_of(RESULT)
    got, wanted = NEEDED[name](value), NEEDED[name](RESULT.clone())
    assert asked == [1]
    assert type(got) is type(wanted)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))
    assert float(value.sum()) and asked == [1]


@pytest.mark.parametrize("result", [(RESULT,), Transformer2DModelOutput(sample=RESULT), [RESULT, RESULT + 1], RESULT])
def test_a_result_keeps_its_form(result: Any) -> None:
    value, asked, promise = promise_of(result)
    assert type(value) is type(result) or isinstance(value, PromisedTensor)
    assert holds_promised(value) and not asked
    promise.keep(result)
    first = kept(value if isinstance(value, torch.Tensor) else value[0])
    assert type(first) is torch.Tensor and torch.equal(first, RESULT) and not asked


def test_what_cannot_be_promised_is_said() -> None:
    with pytest.raises(TypeError):
        form_of((RESULT, object()))
    _, _, promise = promise_of(RESULT)
    with pytest.raises(RuntimeError, match="promised was"):
        promise.keep(RESULT[:1])
    nothing = Promise(form_of(RESULT), lambda: None)
    with pytest.raises(RuntimeError, match="used before its call was made"):
        nothing.value.sum()
