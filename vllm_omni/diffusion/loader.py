"""From a model's name to a diffusers pipeline on its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidValueError, ModelLoadError
from vllm_omni.model_folder import UNREADABLE, check_folder, made_by_function, resolve_model
from vllm_omni.modular import whole


def load_pipeline(config: OmniDiffusionConfig) -> Any:
    """The diffusers pipeline on its device, as `config` asks. ModelLoadError says what is wrong with the folder."""
    import torch  # only here: that a folder is wrong shows before seconds of imports

    from vllm_omni.kernels.placement import device_for

    where = resolve_model(config.model)
    device = device_for(config.device)
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    dtype: torch.dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    for offload in ("enable_cpu_offload", "enable_layerwise_offload"):
        if vars(config)[offload] and device == "cpu":
            raise InvalidValueError(offload, True, "needs an accelerator to offload from; leave it out on cpu")
    try:
        pipeline = _pipeline(config, where, dtype)
    except UNREADABLE as error:
        raise ModelLoadError(f"model {config.model!r} could not be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    for option, enable in {"vae_use_slicing": "enable_slicing", "vae_use_tiling": "enable_tiling"}.items():
        if vars(config)[option]:
            with asked_by(option, True):
                getattr(pipeline.vae, enable)()
    prepare(pipeline, config, device, dtype)
    return pipeline


def _pipeline(config: OmniDiffusionConfig, where: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    if (made := made_by_function(where)) is not None:
        if not isinstance(pipeline := whole(made), DiffusionPipeline):
            raise TypeError(f"the function returned a {type(made).__name__}, and not a DiffusionPipeline")
        return pipeline if config.dtype == "auto" else pipeline.to(dtype)
    if not Path(where).is_dir():  # a hub id: what comes from there is checked like any other folder
        where = str(DiffusionPipeline.download(where, use_safetensors=True, revision=config.revision))
        check_folder(Path(where))
    return DiffusionPipeline.from_pretrained(where, dtype=dtype, use_safetensors=True)


@contextmanager
def asked_by(option: str, value: Any) -> Iterator[None]:
    """What the model does not do is an InvalidValueError about the option that asks for it."""
    try:
        yield
    except (AttributeError, ValueError, RuntimeError, ImportError, OSError) as error:
        raise InvalidValueError(option, value, f"cannot be used with this model, leave it out ({error})") from error


def prepare(pipeline: Any, config: OmniDiffusionConfig, device: str, dtype: Any) -> None:
    """Quantisation, attention kernels, where the weights are kept, compiled blocks: diffusers does it all."""
    import torch

    from vllm_omni.diffusion.denoiser.specs import denoisers_of
    from vllm_omni.kernels.placement import offload_blocks, put_on

    for denoiser in denoisers_of(pipeline).values():
        if config.quantization == "fp8":
            with asked_by("quantization", "fp8"):
                denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        if config.attention_backend is not None:
            with asked_by("attention_backend", config.attention_backend):
                denoiser.set_attention_backend(config.attention_backend)
    if config.enable_layerwise_offload:
        with asked_by("enable_layerwise_offload", True):
            offload_blocks(pipeline, device, [*denoisers_of(pipeline)])
    else:
        later = [*denoisers_of(pipeline)] if config.parallel_config.tensor_parallel_size > 1 else []  # once split
        put_on(pipeline, device, config.enable_cpu_offload, config.component_devices, later)
    for denoiser in denoisers_of(pipeline).values() if not config.enforce_eager else ():
        with asked_by("enforce_eager", False):
            denoiser.compile_repeated_blocks(dynamic=True)
