"""In every Python process that has this folder on its PYTHONPATH: what diffusers needs to split a model on a CPU.

Its parallel modes count accelerators, want an attention kernel that also returns the log-sum-exp for the ring, know
"cpu" as no device for tensor parallelism, and gather unlike parts, which gloo does not; tests alone stand in for these.
Variables, without effect where they are not:

- OMNI_RANK_FAMILY: the model of that name in `families.py` is loaded, whatever model is asked for
- OMNI_RANK_FAULT: a file; as soon as it is there with `RANK KIND` in it, that rank removes it in the middle of its next
  forward and is killed (`kill`), raises (`raise`), has no memory (`oom`), stops (`stop`) or sleeps (`sleep`)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def split_on_cpu() -> None:
    import torch
    from diffusers.hooks import context_parallel, tensor_parallel
    from diffusers.models import attention_dispatch

    counted = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(1, counted())
    tensor_parallel._SUPPORTED_TP_DEVICES = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")
    plain = attention_dispatch._native_attention_forward_op

    def with_sums(
        ctx: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: Any = None, enable_gqa: bool = False, return_lse: bool = False,
        *others: Any, **more: Any,
    ) -> Any:  # fmt: skip
        given = attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse
        if not return_lse:
            return plain(ctx, query, key, value, *given, *others, **more)
        heads_first = [x.permute(0, 2, 1, 3) for x in (query, key, value)]
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return out.permute(0, 2, 1, 3), sums.permute(0, 2, 1)

    attention_dispatch._native_attention_forward_op = with_sums

    def gathered(tensor: Any, dim: int, group: Any) -> Any:
        sizes = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
        gap = list(tensor.shape)
        gap[dim] = max(sizes) - tensor.shape[dim]
        filled = torch.cat([tensor, tensor.new_zeros(gap)], dim).contiguous()
        parts = [torch.empty_like(filled) for _ in sizes]
        torch.distributed.all_gather(parts, filled, group=group)
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)

    context_parallel._all_gather_anything = gathered


def load(name: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from families import FAMILIES

    from vllm_omni.diffusion.worker import worker

    family = next(family for family in FAMILIES if family.name == name)
    worker.load_pipeline = lambda config: family.build()


def fail(asked: Path) -> None:
    import torch

    from vllm_omni.distributed import setup

    split = setup.split

    def met(*args: Any) -> None:
        if not asked.exists():
            return
        rank, kind = asked.read_text().split()
        if int(rank) != torch.distributed.get_rank():
            return
        asked.unlink()
        if kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        elif kind == "sleep":
            time.sleep(1000)
        elif kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory, on one rank")
        else:
            raise RuntimeError("on one rank")

    def split_with_fault(module: Any, *how: Any) -> None:
        split(module, *how)
        blocks = next(part for part in module.children() if isinstance(part, torch.nn.ModuleList))
        blocks[1].register_forward_pre_hook(met)  # the first block's collectives are done

    setup.split = split_with_fault


ENGINES = {"vllm_omni.distributed.rank", "vllm_omni.engine.process"}
if ENGINES & {*sys.orig_argv} or "OMNI_RANK_LEADER" in os.environ:
    split_on_cpu()
    if "OMNI_RANK_FAMILY" in os.environ:
        load(os.environ["OMNI_RANK_FAMILY"])
    if "OMNI_RANK_FAULT" in os.environ:
        fail(Path(os.environ["OMNI_RANK_FAULT"]))
