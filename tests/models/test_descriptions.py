"""What is found of the described classes is what their descriptions say, field by field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from first_calls import first_call
from lanes import lane, one_of_a_kind

from vllm_omni.diffusion.denoiser.prove import examine
from vllm_omni.diffusion.denoiser.specs import BlockList, spec_of

POSITIONS = "the ids of one call serve all, or are joined: both are right, and equal ids are asked for all the same"
NO_PICTURE = "it asks whether all rows have none (zeros), which is the same for all requests of one pipeline"
DIFFERENT = {  # by class and field: what is found, what the description says, and why both are right
    ("Flux2Transformer2DModel", "rows"): ({"img_ids", "txt_ids"}, set(), POSITIONS),
    ("HunyuanVideo15Transformer3DModel", "shared"): ({"image_embeds"}, set(), NO_PICTURE),
    ("PixArtTransformer2DModel", "rows"): (set(), {"added_cond_kwargs"}, "this call has nothing in it"),
}


def described(block_list: BlockList) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Its name, returns and streams, with the first two arguments named as descriptions name them."""
    usual = dict(zip(block_list.takes, ("hidden_states", "encoder_hidden_states"), strict=False))
    if "hidden_states" in block_list.takes:
        usual = {}
    returns = tuple(usual.get(name, name) for name in block_list.returns)
    return block_list.name, returns, tuple(usual.get(name, name) for name in block_list.streams)


@pytest.mark.parametrize("family", lane(FAMILIES, one_of_a_kind), ids=lambda family: family.name)
def test_what_is_found_is_what_the_description_says(family: Family) -> None:
    pipeline = family.build()
    module = pipeline.transformer
    arguments = first_call(family, pipeline)
    with torch.inference_mode():
        finding = examine(module, lambda given: module(**given), arguments, None)
    written = spec_of(module)
    assert written is not None
    if family.steps_aside:  # what is added between blocks is not seen: this is why descriptions name it
        assert written.adds_between_blocks(arguments) and not finding.joined
        return
    assert finding.cached and finding.joined, finding.reason
    spec, given = finding.spec, {name for name, value in arguments.items() if value is not None}
    assert [described(one) for one in spec.stack] == [described(one) for one in written.stack]
    assert (spec.image_first, spec.every_place, spec.in_place) == (written.image_first, False, False)
    for field in ("rows", "shared", "rows_in_dim_1"):
        more, less, _ = DIFFERENT.get((type(module).__name__, field), (set(), set(), ""))
        wanted: Any = vars(written)[field]
        assert set(vars(spec)[field]) - more == (set(wanted) & given) - less, field


def test_every_difference_is_of_a_described_class() -> None:
    assert {name for name, _ in DIFFERENT} <= {type(family.build().transformer).__name__ for family in FAMILIES}
