"""What is found of every class of diffusers that nobody has described: cached and batched, but for those named here."""

from __future__ import annotations

import pytest
import torch
from family import Family
from first_calls import first_call
from lanes import lane
from zoo import ZOO

from vllm_omni.diffusion.denoiser.prove import examine
from vllm_omni.diffusion.denoiser.specs import spec_of

FAST = {"Krea 2", "GLM-Image", "ERNIE-Image", "Wan Animate", "LTX-2", "ACE-Step"}
EXCEPT = {  # by family: cached, batched (None: near the bound, by the order of sums), and what it says
    "ERNIE-Image": (True, False, "the rows of its blocks are not its own"),  # its blocks have tokens before samples
    "GLM-Image": (False, False, "argument kv_caches"),
    "Qwen-Image-2.1": (False, False, "argument kv_cache"),
    "Bria FIBO": (True, False, "two calls cannot be joined"),  # its texts are a list by layer
    "AnyFlow FAR": (True, False, "two calls cannot be joined"),  # it takes keys and values of earlier chunks
    "Cosmos 3": (True, False, "two calls cannot be joined"),  # all samples are one packed sequence
    "Sana World Model": (True, None, ""),  # a rounding grows to thirty times what the proof allows
}
STREAMS = {"LTX-2": ("hidden_states", "audio_hidden_states"), "Kandinsky 6": ("vis", "aud")}  # sound and picture
EVERY_PLACE = {"Wan VACE", "Wan Animate", "Latte", "ConsisID", "Motif-Video"}  # something happens between their blocks
UNDESCRIBED = [family for family in ZOO if family.name not in ("Qwen-Image-Layered",)]


@pytest.mark.parametrize("family", lane(UNDESCRIBED, lambda family: family.name in FAST), ids=lambda f: f.name)
def test_it_is_found(family: Family) -> None:
    pipeline = family.build()
    module = pipeline.transformer
    assert spec_of(module) is None
    arguments = first_call(family, pipeline)
    with torch.inference_mode():
        finding = examine(module, lambda given: module(**given), arguments, None)
    cached, batched, why = EXCEPT.get(family.name, (True, True, ""))
    assert finding.cached is cached and batched in (finding.joined, None) and why in finding.reason, finding.reason
    assert (not finding.reason) is (finding.cached and finding.joined)
    if cached:
        spec = finding.spec
        assert len(spec.stack[0].streams) == 1 or spec.stack[0].streams == STREAMS[family.name]
        assert "encoder_hidden_states" not in spec.stack[0].streams
        assert spec.every_place is (family.name in EVERY_PLACE)


def test_the_exceptions_are_of_the_zoo() -> None:
    assert {*EXCEPT, *STREAMS, *EVERY_PLACE, *FAST} <= {family.name for family in ZOO}
