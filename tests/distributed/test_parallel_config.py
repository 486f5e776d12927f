"""How several ranks are asked for, what is refused before a model loads, and the parts that need no second rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import tiny_flux

from vllm_omni import Omni
from vllm_omni.diffusion.cache.store import Buffer, CacheStore
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.loader import prepare
from vllm_omni.distributed.config import ParallelConfig
from vllm_omni.distributed.pace import GroupPace
from vllm_omni.distributed.peers import Peers
from vllm_omni.distributed.setup import split
from vllm_omni.errors import InvalidValueError
from vllm_omni.kernels.device import Memory
from vllm_omni.kernels.padding import padded
from vllm_omni.kernels.timing import Timings

CPU = torch.device("cpu")
SIZES = ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree", "ring_degree")


@pytest.mark.parametrize("name", SIZES)
def test_sizes_go_by_their_own_names_or_inside_parallel_config(name: str) -> None:
    alone = OmniDiffusionConfig(model="demo", **{name: 2})
    inside = OmniDiffusionConfig(model="demo", parallel_config={name: 2})
    made = OmniDiffusionConfig(model="demo", parallel_config=ParallelConfig(**{name: 2}))
    assert alone == inside == made and alone.parallel_config.ranks == 2
    assert OmniDiffusionConfig(model="demo", **{name: 1}).parallel_config.ranks == 1
    with pytest.raises(InvalidValueError, match=f"{name} is 2 in parallel_config; give it once"):
        OmniDiffusionConfig(model="demo", parallel_config={name: 2}, **{name: 3})
    with pytest.raises(InvalidValueError, match=name):
        OmniDiffusionConfig(model="demo", **{name: 0})


def test_tokens_are_split_by_two_kinds_and_branches_beside_any() -> None:
    assert ParallelConfig(ulysses_degree=2, ring_degree=4).ranks == 8
    whole = ParallelConfig(cfg_parallel_size=2, ulysses_degree=2, ring_degree=4)
    assert whole.ranks == 16 and whole.mesh == {"cfg": 2, "ring": 4, "ulysses": 2}
    assert ParallelConfig(cfg_parallel_size=2, tensor_parallel_size=4).mesh == {"cfg": 2, "tp": 4}


@pytest.mark.parametrize("inner", [{}, {"ulysses_degree": 2}, {"ring_degree": 2}, {"tensor_parallel_size": 2}], ids=str)
def test_ranks_of_one_branch_stand_next_to_each_other(inner: dict[str, int]) -> None:
    parallel = ParallelConfig(cfg_parallel_size=2, **inner)
    each = parallel.ranks // 2
    shares = [Peers(rank, parallel, CPU, lambda error: True).share for rank in range(parallel.ranks)]
    assert shares == [(0, 2)] * each + [(1, 2)] * each
    assert Peers(1, ParallelConfig(**inner), CPU, lambda error: True).share is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ulysses_degree": 2, "tensor_parallel_size": 2}, "cannot be combined with tensor_parallel_size"),
    ({"ring_degree": 2, "tensor_parallel_size": 2}, "cannot be combined with tensor_parallel_size"),
    ({"ulysses_anything": True}, "is for a ulysses_degree of more than 1"),
    ({"ring_degree": 2, "ulysses_anything": True}, "is for a ulysses_degree of more than 1"),
    ({"ring_degree": 2, "ulysses_degree": 2, "ring_anything": True}, "beside a ulysses_degree of 1"),
    ({"tensor_parallel_size": 2, "lora_modules": {"a": "b.safetensors"}}, "cannot be combined with lora_modules"),
    ({"tensor_parallel_size": 2, "quantization": "fp8"}, "cannot be combined with quantization"),
    ({"ulysses_degree": 2, "enable_cpu_offload": True}, "cannot be combined with ulysses_degree"),
    ({"ring_degree": 2, "enable_layerwise_offload": True}, "cannot be combined with ring_degree"),
    ({"cfg_parallel_size": 2, "join_guidance": False}, "is what cfg_parallel_size builds on"),
    ({"parallel_config": {"ulysses": 2}}, "has no 'ulysses'"),
]


@pytest.mark.parametrize(("given", "why"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_combinations_are_refused_with_the_fix(given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidValueError, match=why):
        OmniDiffusionConfig(model="demo", **given)


def test_what_no_device_here_can_do_is_refused_before_the_model_loads() -> None:
    with pytest.raises(InvalidValueError, match="on CPUs no model is split"):
        Omni("demo", device="cpu", ulysses_degree=2)
    with pytest.raises(InvalidValueError, match="on CPUs no model is split"):
        Omni("demo", device="cpu", ulysses_degree=2, cfg_parallel_size=2)
    with pytest.raises(InvalidValueError, match="every rank has its own"):
        Omni("demo", device="cuda:1", cfg_parallel_size=2)
    with pytest.raises(InvalidValueError, match="needs a model that every rank can load"):
        Omni.from_pipe(tiny_flux(), cfg_parallel_size=2)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"ulysses_degree": 3}, "ulysses_degree must divide the 2 attention heads"),
        ({"ulysses_degree": 3, "ulysses_anything": True}, "must leave heads for every rank"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size must divide the 2 attention heads"),
    ],
)
def test_heads_must_divide(how: dict[str, Any], why: str) -> None:
    module = tiny_flux().transformer
    with pytest.raises(InvalidValueError, match=why):
        split(module, ParallelConfig(**how))
    with pytest.raises(InvalidValueError, match="diffusers has no way to split"):
        split(torch.nn.Linear(1, 1), ParallelConfig(**how))


def test_measured_times_are_known_by_the_turn() -> None:
    """Rank 0 knows no more than it has told the others, who measure for themselves and do not use it."""
    first, other = GroupPace(), GroupPace()
    size = ("transformer", ((1, 16, 16),), True, False)
    for pace, seconds in ((first, 2.0), (other, 5.0)):
        times = Timings()
        for step in range(4):
            pace.note(size, times, step, seconds, True, step == 2)
        times.note_coding(1.0, True, True)
        pace.finish(size, times)
        assert pace.known(size) is None
    news = first.news()
    assert first.news() == []
    for pace in (first, other):
        pace.learn([[list(size), *([list(part) for part in entry[1:]])] for entry in news])
    known = [pace.known(size) for pace in (first, other)]
    assert known[0] == known[1] and known[0] is not None and known[0].computed.seconds == 2.0


def test_layers_that_will_be_split_wait_in_main_memory() -> None:
    for size, stays in ((2, True), (1, False)):
        pipeline = tiny_flux()
        prepare(pipeline, OmniDiffusionConfig(model="demo", tensor_parallel_size=size), "meta", torch.float32)
        assert next(pipeline.vae.parameters()).is_meta
        assert next(pipeline.transformer.parameters()).is_meta is not stays


def test_what_ranks_agree_on_is_not_what_one_of_them_has_measured() -> None:
    memory = Memory(torch.device("cuda"))
    memory.agree(1000)
    assert memory.free() == 1000 and memory.spare() == 0


def test_texts_are_padded_to_what_ranks_can_share() -> None:
    texts = [torch.ones(1, 5, 4), torch.ones(1, 3, 4)]
    (one,), (mask,) = padded(texts[:1], [None], 2)
    assert one.shape == (1, 6, 4) and mask.tolist() == [[True] * 5 + [False]]
    both, masks = padded(texts, [None, torch.tensor([[1, 1, 0]])], 4)
    assert [text.shape[1] for text in both] == [8, 8]
    assert [own.tolist()[0] for own in masks] == [[1] * 5 + [0] * 3, [1, 1] + [0] * 6]
    assert padded(texts[:1], [None], 5)[1] == [None]


def test_what_is_kept_counts_as_on_the_rank_that_keeps_most() -> None:
    store = CacheStore(100)
    store.counted = lambda nbytes: nbytes + 16
    kept: Buffer[str, torch.Tensor] = Buffer(store)
    assert kept.put("a", torch.zeros(10)) and store.used == 56
    assert not kept.put("b", torch.zeros(10)) and kept.put("a", torch.zeros(1)) and store.used == 20
    kept.clear()
    assert store.used == 0
