"""No planned step reads a tensor's value: on a GPU each read would wait for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from pipelines import CURVE, run_latents
from probing import CFG, cached
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_omni.diffusion.cache.profile import CacheProfile


class Sync(Exception):
    """A tensor's value was asked for."""


_READS = {"item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
_READS |= {"equal", "allclose", "is_nonzero", "nonzero", "__array__", "eq", "ne", "lt", "le", "gt", "ge"}
_OPS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "item"}


class FunctionTrap(TorchFunctionMode):
    """Python-level reads: on CPU tensors `.cpu()` is a no-op that no dispatcher sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        moves = name == "to" and "cpu" in [str(a) for a in (*args[1:], *kwargs.values()) if not torch.is_tensor(a)]
        diffusers = "diffusers" in Path(sys._getframe(1).f_code.co_filename).parts  # its `.to(ids.device)` stays
        if name in _READS or (moves and not diffusers):
            raise Sync(name)
        return func(*args, **kwargs)


class DispatchTrap(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _OPS:
            raise Sync(str(func))
        return func(*args, **(kwargs or {}))


class Trap:
    """Traps reads from the outermost pre hook of the transformer to its outermost post hook, but for step 0."""

    def __init__(self, transformer: torch.nn.Module, calls_of_first_step: int = 1) -> None:
        self.calls = self.trapped = 0
        self._first = calls_of_first_step
        self._modes: list[Any] = []
        self._handles = [
            transformer.register_forward_pre_hook(self._enter, prepend=True),
            transformer.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, *args: Any) -> None:
        self.calls += 1
        if self.calls > self._first:
            self.trapped += 1
            self._modes = [DispatchTrap(), FunctionTrap()]
            for mode in self._modes:
                mode.__enter__()

    def _leave(self, *args: Any) -> None:
        while self._modes:
            self._modes.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("predictor", ["reuse", "linear", "affine", "auto"])
@pytest.mark.parametrize("branches", [1, 2])
def test_no_host_sync_on_any_planned_step(
    pipe: FluxPipeline, calibrated: tuple[CacheProfile, Path], predictor: str, branches: int
) -> None:
    source: dict[str, Any] = (
        {"profile": str(calibrated[1])} if predictor in ("affine", "auto") else {"mag_ratios": CURVE}
    )
    with cached(pipe, predictor=predictor, mag_threshold=0.5, **source) as backend:
        trap = Trap(pipe.transformer, calls_of_first_step=branches)
        try:
            run_latents(pipe, num_inference_steps=10, **(CFG if branches == 2 else {}))
        finally:
            trap.remove()
        assert trap.trapped == 9 * branches
        assert backend.last_request is not None and backend.last_request.skipped_steps > 0


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
        lambda x: x.tolist(),
        lambda x: bool(x.sum()),
        lambda x: float(x.sum()),
        lambda x: x.sum() > 0,
        lambda x: torch.equal(x, x),
        lambda x: x.detach().numpy(),
    ],
)
def test_every_kind_of_read_is_detected(pipe: FluxPipeline, read: Any) -> None:
    """A canary: a hook of a later registration than the trap's pre hook reads a value at the second step."""
    with cached(pipe):

        def sing(module: Any, args: Any, output: torch.Tensor) -> None:
            read(output)

        canary = pipe.transformer.norm_out.register_forward_hook(sing)
        trap = Trap(pipe.transformer)
        try:
            with pytest.raises(Sync):
                run_latents(pipe, num_inference_steps=4)
        finally:
            trap.remove()
            canary.remove()
