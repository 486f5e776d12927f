"""From a model's name to a diffusers pipeline: ``demo``, a diffusers folder, or a hub id. safetensors only."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidValueError, ModelLoadError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if (folder / "model_index.json").is_file())


def resolve_model(model: str) -> str:
    """A folder for a shipped name or a path; a hub id stays as it is. ModelLoadError where it can be neither."""
    if model in shipped_models():
        return str(ASSETS / model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder)
    if folder.exists():
        raise ModelLoadError(f"model {model!r} is a file; give the folder that holds model_index.json")
    looks_like_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        names = ", ".join(shipped_models())
        raise ModelLoadError(f"model {model!r} does not exist; give a diffusers folder, a hub id, or one of: {names}")
    return model


def check_folder(folder: Path) -> None:
    """Refuse, before any weight loads, a folder that is incomplete, truncated, or would need pickle."""
    index = _read_json(folder / "model_index.json")
    for name, entry in index.items():
        if name.startswith("_") or not (isinstance(entry, list) and len(entry) == 2) or entry[0] is None:
            continue
        part = folder / name
        if Path(name).name != name:
            raise ModelLoadError(f"{folder}: model_index.json names {name!r}, which is outside the folder")
        if not part.is_dir():
            raise ModelLoadError(f"{folder}: model_index.json names {name!r}, but there is no such folder")
        weights = [f for f in part.iterdir() if f.name.endswith(".safetensors")]
        pickled = [f.name for f in part.iterdir() if f.suffix in _PICKLED]
        if pickled and not weights:
            raise ModelLoadError(f"{part}: {pickled[0]} is pickled, which can run code; convert it to safetensors")
        if not weights and (part / "config.json").is_file():
            raise ModelLoadError(f"{part}: holds a config.json but no .safetensors weights")
        for file in weights:
            check_safetensors(file)
        for file in part.glob("*.index.json"):
            _check_shards(file)


def _check_shards(file: Path) -> None:
    """Shards are safetensors beside their index: what else it names would be read, or unpickled."""
    named = _read_json(file).get("weight_map")
    for name in set(map(str, named.values())) if isinstance(named, dict) else ("no weight_map",):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{file}: names {name!r}, which is no .safetensors file beside it")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelLoadError(f"{file.parent}: has no {file.name}; is it a diffusers model folder?")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file}: is not complete JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file}: must hold a JSON object")
    return content


def check_safetensors(file: Path) -> None:
    """The header tells how long the file must be (safetensors format: u64 length, JSON, data)."""
    if not file.is_file():  # a link to nothing, or a pipe
        raise ModelLoadError(f"{file}: is no file; copy it again")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100 * 2**20):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        end = max(
            (int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0
        )
    except (struct.error, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file}: is not a safetensors file ({error})") from None
    if size < 8 + length + end:
        raise ModelLoadError(f"{file}: is truncated, {size} of {8 + length + end} bytes; copy it again")


def generation_defaults(model: str) -> dict[str, Any]:
    """The model's own defaults for the pipeline's call, from `generation_config.json` in its folder."""
    file = Path(resolve_model(model)) / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


def load_pipeline(config: OmniDiffusionConfig) -> Any:
    """The diffusers pipeline on its device, as `config` asks. ModelLoadError says what is wrong with the folder."""
    import torch  # only here: that a folder is wrong shows before seconds of imports
    from diffusers import DiffusionPipeline

    where = resolve_model(config.model)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    dtype: torch.dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    for offload in ("enable_cpu_offload", "enable_layerwise_offload"):
        if vars(config)[offload] and device == "cpu":
            raise InvalidValueError(offload, True, "needs an accelerator to offload from; leave it out on cpu")
    try:
        if not Path(where).is_dir():  # a hub id: what comes from there is checked like any other folder
            where = str(DiffusionPipeline.download(where, use_safetensors=True, revision=config.revision))
            check_folder(Path(where))
        pipeline = DiffusionPipeline.from_pretrained(where, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"model {config.model!r} could not be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    if config.vae_use_slicing:
        pipeline.vae.enable_slicing()
    if config.vae_use_tiling:
        pipeline.vae.enable_tiling()
    prepare(pipeline, config, device, dtype)
    if not config.enforce_eager:
        pipeline.transformer.compile_repeated_blocks(dynamic=True)
    return pipeline


def prepare(pipeline: Any, config: OmniDiffusionConfig, device: str, dtype: Any) -> None:
    """Quantisation, attention kernels, and where the weights are kept: diffusers does it all."""
    import torch

    from vllm_omni.diffusion.denoiser.specs import denoisers_of

    for denoiser in denoisers_of(pipeline).values():
        if config.quantization == "fp8":
            denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        if config.attention_backend is not None:
            try:
                denoiser.set_attention_backend(config.attention_backend)
            except (ValueError, RuntimeError, ImportError, OSError) as error:
                fix = f"cannot be used: {error}"
                raise InvalidValueError("attention_backend", config.attention_backend, fix) from None
    try:
        if config.enable_layerwise_offload:
            pipeline.enable_group_offload(torch.device(device), offload_type="block_level", num_blocks_per_group=1)
        elif config.enable_cpu_offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's own words: the build has no CUDA, there is no cuda:7
        raise InvalidValueError("device", device, f"cannot be used ({str(error).splitlines()[0]})") from error
