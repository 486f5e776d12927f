"""What a user asks for: sampling parameters and prompts. Knows no tensors beyond passing them on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vllm_omni.errors import InvalidValueError
from vllm_omni.inputs.lora import Adapters, as_adapters
from vllm_omni.settings import Settings

MAX_PROMPT_CHARACTERS = 32_000
RENAMED: dict[str, tuple[str, ...]] = {  # our names, and the pipelines' for the same
    "num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
    "num_frames": ("num_frames", "frames", "video_length"),
    "seconds": ("audio_end_in_s", "duration", "audio_duration", "audio_duration_s", "audio_length_in_s"),
}
MAX_FPS = 120  # that a request may ask for
_OF_PARAMS = {"generator", "output_type"}
_OF_ENGINE = {"return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps"}
RESERVED = _OF_PARAMS | _OF_ENGINE  # arguments of a pipeline's call that the engine itself gives
NoiseLevel = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class OmniDiffusionSamplingParams(Settings):
    """One request's parameters; None leaves the model's (then the pipeline's) own default.

    `seed` is ``torch.Generator("cpu").manual_seed(seed)``, the picture plain diffusers makes with it; without seed and
    generator a random seed is drawn and reported. `cache` is None (the engine's setting), ``"off"``, a preset's name,
    or a dict of overrides. `lora_request` names adapters that are loaded: ``"style"``,
    ``{"name": "style", "scale": 0.8}``, or a list of them. `preview_every` steps, a progress report carries the images
    as they stand (flow matching). `fps`: frames per second of a video (default: the model's own).
    `seconds`: how long a sound is to be, of a model that makes sound alone.
    `boundary_ratio`: of the noise schedule, where a model's second expert takes over (Wan 2.2). `generator_device` is
    where random numbers are drawn (default: the CPU, which gives the same ones everywhere). `lora_scale` multiplies the
    scales of `lora_request`. `resolution`, `eta`, `guidance_rescale`, `frame_rate`, `layers`, `cfg_normalize` and
    `use_en_prompt` are for pipelines that have such arguments.
    """

    num_inference_steps: int | None = Field(default=None, ge=1)
    timesteps: list[NoiseLevel] | None = None
    sigmas: list[NoiseLevel] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    generator: Any = None
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    num_frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, ge=1, le=MAX_FPS, strict=True, allow_inf_nan=False)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    guidance_scale_2: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    boundary_ratio: float | None = Field(default=None, ge=0, le=1)
    true_cfg_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    negative_prompt: str | None = None
    strength: float | None = Field(default=None, ge=0, le=1)
    num_outputs_per_prompt: int = Field(default=1, ge=1, le=64)
    latents: Any = None
    max_sequence_length: int | None = Field(default=None, ge=1)
    output_type: Literal["pil", "np", "pt", "latent"] | None = None
    lora_request: Adapters | None = None
    lora_scale: float | None = Field(default=None, ge=-10, le=10, allow_inf_nan=False)
    generator_device: str | None = None
    resolution: int | None = Field(default=None, ge=1)
    eta: float | None = Field(default=None, ge=0, le=1)
    guidance_rescale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    frame_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    layers: int | None = Field(default=None, ge=1)
    cfg_normalize: bool | None = None
    use_en_prompt: bool | None = None
    extra_args: dict[str, Any] = Field(default_factory=dict)
    cache: Any = None
    preview_every: int | None = Field(default=None, ge=1)

    @field_validator("lora_request", mode="before")
    @classmethod
    def _adapters(cls, value: Any) -> Any:
        return None if value is None else as_adapters(value)

    @field_validator("sigmas", "timesteps", mode="before")
    @classmethod
    def _levels(cls, value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor

    @model_validator(mode="after")
    def _one_source(self) -> OmniDiffusionSamplingParams:
        if self.seed is not None and self.generator is not None:
            raise InvalidValueError("seed", self.seed, "is not used with a generator, which has its own; give one")
        return self

    @model_validator(mode="after")
    def _scaled(self) -> OmniDiffusionSamplingParams:
        """The scale becomes a part of the adapters, once there are any: who reads these need not know of it."""
        if self.lora_scale is not None and self.lora_request is not None:
            scaled = tuple((name, scale * self.lora_scale) for name, scale in self.lora_request)
            vars(self).update(lora_request=as_adapters(scaled))
        if self.lora_scale == 1 or self.lora_request is not None:
            vars(self).update(lora_scale=None)
        return self

    @classmethod
    def from_params(cls, params: Any) -> Self:
        """Parameters of any kind as ours: a mapping of names, or vLLM's, which hold `seed`, `n` and `extra_args`."""
        if isinstance(params, cls):
            return params
        if isinstance(params, Mapping):
            return cls.from_dict(params)
        extra = (params.extra_args or {}) if hasattr(params, "extra_args") else params
        if not isinstance(extra, Mapping):
            raise InvalidValueError("sampling_params", params, "must be sampling parameters, ours or vLLM's, or a dict")
        count = getattr(params, "n", 1)
        theirs = {"seed": getattr(params, "seed", None), "num_outputs_per_prompt": None if count == 1 else count}
        theirs = {name: value for name, value in theirs.items() if value is not None}
        for name in theirs.keys() & extra.keys():
            if theirs[name] != extra[name]:
                raise InvalidValueError(name, extra[name], f"is {theirs[name]} outside extra_args; give it once")
        return cls.from_dict({**theirs, **extra})

    def clone(self) -> Self:
        """A copy that shares nothing with this one but its generator."""
        copied: Self = own(self)
        return copied


PROMPT_KEYS_DOC = "prompt, negative_prompt, prompt_embeds, pooled_prompt_embeds, multi_modal_data"


def check_text(field: str, text: Any) -> str:
    """A prompt: text, not blank, without NUL and half characters, of a sane length."""
    if not isinstance(text, str):
        raise InvalidValueError(field, text, "must be a string")
    if not text.strip():
        raise InvalidValueError(field, text, "must not be empty")
    if "\0" in text:
        raise InvalidValueError(field, text, "must not contain the NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidValueError(field, text, "must hold whole characters only; it has half of a surrogate pair")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidValueError(field, f"{len(text)} characters", f"must have at most {MAX_PROMPT_CHARACTERS}")
    return text


def own(value: Any) -> Any:
    """A copy for the engine: what its caller changes later changes no request.

    Lists, dicts, tensors, arrays and pictures are copied; a generator is shared, as it is with a plain pipeline.
    """
    if isinstance(value, dict):
        return {key: own(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(own, value))
    if isinstance(value, Settings):
        return value.model_copy(update={name: own(entry) for name, entry in value})
    for module, name in (("torch", "Tensor"), ("numpy", "ndarray"), ("PIL.Image", "Image")):
        if (loaded := sys.modules.get(module)) is not None and isinstance(value, vars(loaded)[name]):
            return value.detach().clone() if name == "Tensor" else value.copy()
    return value


def refuse_reserved(names: Iterable[str]) -> None:
    """InvalidValueError for an argument in a prompt or in `extra_args` that would not be what the pipeline gets."""
    for name in names:
        if name in _OF_PARAMS:
            raise InvalidValueError(name, "given", "is a sampling parameter: not for the prompt, nor for extra_args")
        if name in _OF_ENGINE:
            raise InvalidValueError(name, "given", "is the engine's own: it follows each step and reads all results")


def has_embeds(text: str, given: Iterable[str]) -> bool:
    """Whether embeddings are given in place of `text`, under whatever name the pipeline has for them."""
    return any(name.startswith(f"{text}_embeds") for name in given)


def normalise_prompt(prompt: Any) -> dict[str, Any]:
    """A prompt as the dict of the pipeline's conditioning arguments: text, or a dict such as PROMPT_KEYS_DOC."""
    if isinstance(prompt, str):
        return {"prompt": check_text("prompt", prompt)}
    if not isinstance(prompt, dict):
        raise InvalidValueError("prompt", prompt, f"must be a string or a dict ({PROMPT_KEYS_DOC}, ...)")
    given = {key: value for key, value in prompt.items() if value is not None}
    media = given.pop("multi_modal_data", {})
    if not isinstance(media, dict):
        raise InvalidValueError("multi_modal_data", media, "must be a dict, e.g. {'image': picture}")
    for name, entry in media.items():
        if any(isinstance(one, str | bytes | Path) for one in (entry if isinstance(entry, list | tuple) else [entry])):
            raise InvalidValueError(name, entry, "must be a picture, not where to find one (PIL.Image.open opens it)")
    given.update(media)
    for text in ("prompt", "negative_prompt"):
        if given.get(text) == "" and has_embeds(text, given):
            del given[text]
    if "prompt" in given:
        check_text("prompt", given["prompt"])
    elif not given:  # a pipeline that takes no text has a word to say later
        raise InvalidValueError("prompt", prompt, "must hold 'prompt' or 'prompt_embeds'")
    if "negative_prompt" in given and given["negative_prompt"] != "":
        check_text("negative_prompt", given["negative_prompt"])
    return given
