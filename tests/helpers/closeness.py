"""How near two results must be: relative to the largest magnitude of the reference, in roundings of its dtype.

Results of the same operations on the same shapes are compared bit by bit. In another batch, with another number of
threads or in a compiled graph sums run in another order, and their difference grows with the size of what is summed: an
absolute tolerance that holds on one processor fails on the next. Decoded pictures may differ by one of 255 levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

ROUNDINGS = 64  # of a whole run in another order; the largest usually seen is 4, see CONTRIBUTING.md


def _array(value: Any) -> tuple[np.ndarray, float]:
    """The value in double precision, and the distance from 1 to the next number of its own dtype."""
    if isinstance(value, torch.Tensor):
        eps = torch.finfo(value.dtype).eps if value.dtype.is_floating_point else 0.0
        return value.detach().double().numpy(), eps
    array = np.asarray(value)
    return array.astype(np.float64), float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else 0.0


def roundings_apart(got: Any, wanted: Any, scale: Any = None) -> float:
    """Largest difference, in units of eps times the largest magnitude of `wanted` (or of `scale`).

    `scale` is for a small difference of large numbers: then what was subtracted sets the size of an error.
    """
    (left, eps_left), (right, eps_right) = _array(got), _array(wanted)
    assert left.shape == right.shape, (left.shape, right.shape)
    assert np.isfinite(left).all() and np.isfinite(right).all()
    size = np.abs(right if scale is None else _array(scale)[0]).max()
    return float(np.abs(left - right).max() / max(size * max(eps_left, eps_right), np.finfo(np.float64).tiny))


def assert_close(got: Any, wanted: Any, what: Any = "", *, roundings: float = ROUNDINGS, scale: Any = None) -> None:
    """The same result but for the order of its sums."""
    apart = roundings_apart(got, wanted, scale)
    assert apart <= roundings, f"{apart:.0f} roundings apart, at most {roundings:g}; {what}"


def assert_differs(got: Any, wanted: Any, what: Any = "") -> None:
    """Another result, by far more than another order of sums could make."""
    apart = roundings_apart(got, wanted)
    assert apart > 4 * ROUNDINGS, f"{apart:.0f} roundings apart, fewer than {4 * ROUNDINGS}; {what}"


def levels_apart(got: Any, wanted: Any) -> int:
    """Largest difference per channel of two pictures of 8 bits, in levels of 255."""
    left, right = np.asarray(got, dtype=int), np.asarray(wanted, dtype=int)
    assert left.shape == right.shape, (left.shape, right.shape)
    return int(np.abs(left - right).max())
