"""A request as the arguments of its pipeline's call: checked before anything runs. Knows no model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidValueError, check_keys, did_you_mean
from vllm_omni.inputs.data import RENAMED, has_embeds, refuse_reserved
from vllm_omni.outputs.rates import Rates

_OURS = {"seed", "cache", "preview_every", "extra_args", "fps", "lora_request", "generator", "output_type"}
_NOTHING = {"eta", "guidance_rescale", "cfg_normalize", "use_en_prompt"}
_OURS |= {"boundary_ratio", "generator_device"}
MAX_DRAWN_SEED = 2**32  # ten digits: somebody will read it out or type it


class ArgumentBuilder:
    """For one pipeline: which arguments its call takes, the model's defaults, and the limits."""

    def __init__(self, pipeline: Any, defaults: Mapping[str, Any], config: OmniDiffusionConfig) -> None:
        self._name = type(pipeline).__name__
        self._two_experts = vars(pipeline).get("transformer_2") is not None
        taken = arguments_of(type(pipeline))
        self._accepted, self._required = {*taken}, {name for name, one in taken.items() if one.default is one.empty}
        self.defaults = {key: value for key, value in defaults.items() if key in self._accepted}
        own = config.default_sampling_params
        for name in own:
            if name not in self._accepted:
                raise InvalidValueError("default_sampling_params", name, f"is not an argument of {self._name}")
        self.rates = Rates(pipeline, taken, defaults)
        self.defaults |= self.rates.defaults
        self._config = config
        processor = vars(pipeline).get("image_processor")
        self.multiple = processor.config.vae_scale_factor if isinstance(processor, VaeImageProcessor) else 1
        self.defaults |= own
        if own:
            self._check(self.defaults)

    def build(self, request: OmniDiffusionRequest) -> dict[str, Any]:
        """Everything but the generator. InvalidValueError names what the pipeline does not take, or a limit."""
        arguments = dict(self.defaults)
        given = {k: v for k, v in request.params if v is not None and k not in _OURS}
        if given.get("num_outputs_per_prompt") == 1:
            del given["num_outputs_per_prompt"]
        for name in _NOTHING - self._accepted:  # upstream's defaults, which ask for nothing
            if not given.get(name):
                given.pop(name, None)
        refuse_reserved([*request.conditioning, *request.params.extra_args])
        given |= request.conditioning
        for name, value in given.items():
            target = next((n for n in RENAMED.get(name, (name,)) if n in self._accepted), None)
            if target is None:
                close = did_you_mean(name, self._accepted, most=1, alike=0.75)
                raise InvalidValueError(name, value, f"is not an argument of {self._name}; {close or 'leave it out'}")
            arguments[target] = value
        if (boundary := request.params.boundary_ratio) is not None and not self._two_experts:
            raise InvalidValueError("boundary_ratio", boundary, "is where a second expert takes over; leave it out")
        for name in self._accepted:  # embeddings take the place of a text, which then is not the pipeline's default
            if f"{name}_embeds" in given and name not in given:
                arguments[name] = None
        check_keys("extra_args", request.params.extra_args, self._accepted)
        arguments |= request.params.extra_args
        arguments |= self.rates.asked(request.params.fps, given | request.params.extra_args)
        arguments["output_type"] = request.params.output_type or "pil"
        if "prompt" in self._accepted and "prompt" not in given and not has_embeds("prompt", given):
            raise InvalidValueError("prompt", request.prompt, "must hold 'prompt' or 'prompt_embeds'")
        for name in self._required - arguments.keys():
            raise InvalidValueError(name, None, f"is needed by {self._name}; give it with the prompt")
        self._check(arguments)
        return arguments

    def _check(self, arguments: dict[str, Any]) -> None:
        self.rates.check(arguments)
        for name in ("num_inference_steps", "height", "width"):
            if not isinstance(arguments.get(name), int | None):
                raise InvalidValueError(name, arguments[name], "must be a whole number")
        steps, most = arguments.get("num_inference_steps"), self._config.max_inference_steps
        if steps is not None and not 1 <= steps <= most:
            raise InvalidValueError("num_inference_steps", steps, f"must be between 1 and {most}")
        for name in ("sigmas", "timesteps"):
            if (own := arguments.get(name)) is not None and len(own) > most:
                raise InvalidValueError(name, f"{len(own)} values", f"must be at most {most}, one per step")
        for name in ("height", "width"):
            value = arguments.get(name)
            if value is not None and value % self.multiple:
                near = max(self.multiple, round(value / self.multiple) * self.multiple)
                raise InvalidValueError(name, value, f"must be a multiple of {self.multiple} (nearest: {near})")
        height, width = arguments.get("height"), arguments.get("width")
        if height and width and height * width > (most := self._config.max_image_pixels):
            raise InvalidValueError("height x width", f"{height}x{width}", f"must be at most {most} pixels")


def arguments_of(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """What a pipeline's call takes; one that hands **kwargs on takes what the class does that it derives from."""
    found: dict[str, inspect.Parameter] = {}
    for owner in pipeline_class.__mro__:
        if "__call__" in vars(owner):
            taken = list(inspect.signature(vars(owner)["__call__"]).parameters.values())[1:]
            own = {one.name: one for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
            found = own | found
            if all(one.kind is not one.VAR_KEYWORD for one in taken):
                break
    return found


def generator_of(request: OmniDiffusionRequest) -> tuple[Any, int | None]:
    """(generator, seed): the caller's own, or one of the seed (on the CPU unless asked), drawn if none is given."""
    params = request.params
    if params.generator is not None:
        return params.generator, None
    seed = params.seed if params.seed is not None else int(torch.randint(MAX_DRAWN_SEED, ()).item())
    try:
        return torch.Generator(params.generator_device or "cpu").manual_seed(seed), seed
    except (RuntimeError, AssertionError):
        where = params.generator_device
        raise InvalidValueError("generator_device", where, "must be a device that is here; leave it out") from None
