"""An engine driven by hand: requests added and steps taken by the test itself."""

from __future__ import annotations

from typing import Any

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import normalise_prompt


def add(omni: Omni, name: str, prompt: Any, params: Params) -> None:
    omni.engine.add_request(OmniDiffusionRequest(name, prompt, normalise_prompt(prompt), params))


def drain(omni: Omni, outputs: dict[str, Any]) -> dict[str, Any]:
    while omni.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in omni.engine.step()}
    return outputs
