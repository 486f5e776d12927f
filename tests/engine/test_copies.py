"""Errors and outputs survive a copy and a pickle, and nothing large stays with an error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidValueError,
    ModelLoadError,
    NumericalError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    UnknownKeyError,
)
from vllm_omni.outputs import OmniRequestOutput


def copies(value: Any) -> list[Any]:
    return [copy.copy(value), copy.deepcopy(value), *(pickle.loads(pickle.dumps(value, n)) for n in (2, 4, 5))]


@pytest.mark.parametrize(
    "error",
    [
        InvalidValueError("height", 63, "must be a multiple of 8"),
        InvalidValueError("generator", lambda: None, "cannot be sent"),
        InvalidValueError("sigmas", [1.0] * 10**6, "must be fewer"),
        InvalidValueError("seed", 10**5000, "must be smaller"),
        UnknownKeyError("cache", "treshold", ["threshold", "preset"]),
        QueueFullError(3, 7.5),
        EngineDeadError("gone", retry_after_s=2.0),
        EngineClosedError("closed"),
        ModelLoadError("no such folder"),
        NumericalError(),
        RequestAbortedError("by its owner"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_copy_and_pickle_with_all_they_say(error: OmniError) -> None:
    for other in copies(error):
        assert type(other) is type(error) and str(other) == str(error) and vars(other) == vars(error)
    assert len(pickle.dumps(error)) < 1000  # nothing large stays with an error


class Strange(Exception):
    """Of somebody else: it can neither be copied nor be pickled."""

    def __init__(self, code: int, where: Any) -> None:
        self.where = where
        super().__init__(f"code {code}")


@pytest.mark.parametrize("error", [None, ValueError("plain"), NumericalError(), Strange(5, lambda: None)])
def test_outputs_copy_and_pickle(error: Exception | None) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    output = OmniRequestOutput("a", "red apple", [picture], latents=torch.ones(2), error=error, plan=(True, False))
    for other in copies(output):
        assert other.images[0].tobytes() == picture.tobytes() and torch.equal(other.latents, output.latents)
        assert (other.request_id, other.prompt, other.plan) == ("a", "red apple", (True, False))
        if isinstance(error, Strange):
            assert type(other.error) is OmniError and str(other.error) == "Strange: code 5"
        else:
            assert type(other.error) is type(error) and str(other.error) == str(error)


def test_an_error_shows_at_most_a_line_of_what_was_wrong() -> None:
    for value in ("x" * 10**7, list(range(10**6)), {i: "x" * 1000 for i in range(1000)}, 10**5000, [10**5000]):
        error = InvalidValueError("field", value, "must be short")
        assert len(str(error)) < 200 and len(str(error.value)) <= 120
    assert InvalidValueError("field", "short", "must be long").value == "short"
