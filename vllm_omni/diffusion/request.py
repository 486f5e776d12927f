"""One request, as asked: immutable, validated where it entered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_omni.inputs.data import OmniDiffusionSamplingParams


@dataclass(frozen=True)
class OmniDiffusionRequest:
    """`conditioning` is the prompt as the pipeline's arguments; `prompt` what the user wrote."""

    request_id: str
    prompt: Any
    conditioning: dict[str, Any]
    params: OmniDiffusionSamplingParams = field(default_factory=OmniDiffusionSamplingParams)
    salt: str = ""  # whose it is: embeddings are shared by equal ones alone
