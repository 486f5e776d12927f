"""The models that a check runs: what ships, and FLUX and Wan with random weights, as large as the device will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_checks.machines import Machine

WORDS = ("red apple", "penguin", "guitar", "octopus", "sunflower", "rainbow", "sailboat", "cat face")
ROW_STEPS = 500  # forwards of one row that all checks of a model take, about
WEIGHTS_SHARE = 0.3  # of what is free
# double and single blocks, heads, size of a head, side of the latents, text tokens, width of the text
FLUX: dict[str, tuple[int, ...]] = {
    "full": (19, 38, 24, 128, 128, 512, 4096),  # FLUX.1 at 1024 by 1024
    "half": (8, 16, 24, 128, 128, 512, 4096),
    "small": (4, 8, 8, 64, 64, 64, 512),
    "tiny": (2, 3, 2, 16, 8, 8, 32),
}
_AXES = {16: (4, 6, 6), 64: (8, 28, 28), 128: (16, 56, 56)}
# blocks, heads, size of a head, inner width, frames, height and width in pixels, text tokens, width of the text
WAN: dict[str, tuple[int, ...]] = {
    "full": (30, 12, 128, 8960, 33, 480, 832, 512, 4096),  # Wan 2.1 1.3B, two seconds
    "half": (10, 12, 128, 8960, 17, 320, 512, 512, 4096),
    "small": (6, 8, 64, 2048, 9, 128, 128, 64, 512),
    "tiny": (3, 2, 16, 64, 5, 32, 32, 8, 32),
}


@dataclass
class Subject:
    """A pipeline on the device, and what one request of it takes."""

    name: str
    pipeline: Any
    arguments: dict[str, Any]
    prompt: Callable[[int], dict[str, Any]]
    width: int  # of the residual of a token
    tokens: int  # of a row
    branches: int = 1  # calls of the denoiser per step

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.transformer.dtype

    def plain(self, i: int, steps: int) -> torch.Tensor:
        """Request `i` by plain diffusers, to its latents."""
        output = self.pipeline(
            **self.prompt(i),
            **self.arguments,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(i),
            output_type="latent",
            return_dict=False,
        )
        return output[0]


def subjects(
    machine: Machine, dtype: torch.dtype, size: str | None, names: list[str], seconds: float
) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """A function per model, which loads it when it is its turn; each may take `seconds`."""
    from vllm_omni.model_folder import shipped_models

    makers: dict[str, Callable[[], Subject]] = {}
    for name in ("demo", "demo-video"):
        if name in shipped_models():
            makers[name] = lambda name=name: shipped(machine, name)
    for name, family in {
        "flux": Family(flux, _flux_weights, _flux_tokens, FLUX),
        "wan": Family(wan, _wan_weights, _wan_tokens, WAN),
    }.items():
        makers[name] = lambda family=family: fitting(machine, family, dtype, size, seconds)
    yield from ((name, make) for name, make in makers.items() if not names or name in names)


def shipped(machine: Machine, name: str) -> Subject:
    """A model that comes with the package, in float32: it is small, and differences are easy to read there."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.loader import load_pipeline
    from vllm_omni.model_folder import generation_defaults

    pipeline = load_pipeline(OmniDiffusionConfig(model=name, device=str(machine.device), dtype="float32"))
    given = {key: value for key, value in generation_defaults(name).items() if key != "num_inference_steps"}
    guided = "Flux" not in type(pipeline).__name__ and given.get("guidance_scale", 1.0) > 1.0
    transformer = pipeline.transformer

    def prompt(i: int) -> dict[str, Any]:
        return {"prompt": WORDS[i % len(WORDS)]}

    width = int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)
    return Subject(name, pipeline, given, prompt, width, 0, 2 if guided else 1)


@dataclass(frozen=True)
class Family:
    """Random models of one architecture: of a size, the number of its weights, and of tokens in a step of one row."""

    build: Callable[[Machine, tuple[int, ...], torch.dtype], Subject]
    weights: Callable[[tuple[int, ...]], int]
    tokens: Callable[[tuple[int, ...]], int]
    sizes: dict[str, tuple[int, ...]]


def fitting(machine: Machine, family: Family, dtype: torch.dtype, size: str | None, seconds: float) -> Subject:
    """The largest of the sizes whose weights have room and whose checks are done within `seconds`, or the one asked."""
    names = [size] if size is not None else list(family.sizes)
    rate = _rate(machine, dtype) if len(names) > 1 else 0.0
    for name in names:
        last = name == names[-1]
        weights, tokens = family.weights(family.sizes[name]), family.tokens(family.sizes[name])
        too_long = 2 * weights * tokens * ROW_STEPS > seconds * rate  # a step of it could take minutes on a CPU
        if not last and (too_long or weights * dtype.itemsize > WEIGHTS_SHARE * machine.free()):
            continue
        subject = family.build(machine, family.sizes[name], dtype)
        subject.name += f" ({name})"
        if last:
            return subject
        subject.plain(0, 1)
        if machine.seconds(lambda subject=subject: subject.plain(0, 2)) / 2 * ROW_STEPS < seconds:
            return subject
        subject.pipeline.to("meta")
        if machine.kind == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("the smallest is always taken")


def _rate(machine: Machine, dtype: torch.dtype) -> float:
    """Operations a second in a product of two large matrices, which no forward exceeds."""
    one = torch.ones(2048, 2048, dtype=dtype, device=machine.device)
    one @ one
    return 2 * 2048**3 / max(min(machine.seconds(lambda: one @ one) for _ in range(3)), 1e-9)


def _embeddings(machine: Machine, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> Callable[[int], Any]:
    def prompt(i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + i)
        return {
            name: torch.randn(shape, generator=generator).to(machine.device, dtype) for name, shape in shapes.items()
        }

    return prompt


def _random(machine: Machine, kind: type, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model with random weights, drawn on the device itself: twelve billion on a CPU take minutes."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(machine.device if machine.kind == "cuda" else "cpu"):
            return kind(**config).eval().to(machine.device, dtype)
    finally:
        torch.set_default_dtype(before)


def flux(machine: Machine, size: tuple[int, ...], dtype: torch.dtype) -> Subject:
    """FLUX.1 without text encoders."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    double, single, heads, head, side, text, text_width = size
    config = {"patch_size": 1, "in_channels": 64, "num_layers": double, "num_single_layers": single}
    config |= {"attention_head_dim": head, "num_attention_heads": heads, "joint_attention_dim": text_width}
    config |= {"pooled_projection_dim": text_width, "guidance_embeds": True, "axes_dims_rope": _AXES[head]}
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    ends |= {"latent_channels": 16, "block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 2 * side}
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=_random(machine, AutoencoderKL, ends | {"shift_factor": 0.1, "scaling_factor": 0.36}, dtype),
        transformer=_random(machine, FluxTransformer2DModel, config, dtype),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = _embeddings(
        machine, dtype, {"prompt_embeds": (1, text, text_width), "pooled_prompt_embeds": (1, text_width)}
    )
    arguments = {"height": 2 * side, "width": 2 * side, "guidance_scale": 3.5}
    return Subject("flux", pipeline, arguments, prompt, heads * head, _flux_tokens(size))


def _flux_weights(size: tuple[int, ...]) -> int:
    double, single, heads, head = size[:4]
    return (heads * head) ** 2 * (36 * double + 15 * single)


def _flux_tokens(size: tuple[int, ...]) -> int:
    return (size[4] // 2) ** 2


def wan(machine: Machine, size: tuple[int, ...], dtype: torch.dtype) -> Subject:
    """Wan 2.1 without a text encoder; guidance takes a second call per step."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    blocks, heads, head, inner, frames, height, width, text, text_width = size
    config = {"num_attention_heads": heads, "attention_head_dim": head, "in_channels": 16, "out_channels": 16}
    config |= {"text_dim": text_width, "freq_dim": 64, "ffn_dim": inner, "num_layers": blocks}
    ends = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_random(machine, AutoencoderKLWan, ends, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_random(machine, WanTransformer3DModel, config, dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    positive = _embeddings(machine, dtype, {"prompt_embeds": (1, text, text_width)})

    def prompt(i: int) -> dict[str, Any]:
        given = positive(i)
        return given | {"negative_prompt_embeds": -given["prompt_embeds"]}

    arguments = {"height": height, "width": width, "num_frames": frames, "guidance_scale": 3.0}
    return Subject("wan", pipeline, arguments, prompt, heads * head, _wan_tokens(size) // 2, branches=2)


def _wan_weights(size: tuple[int, ...]) -> int:
    blocks, heads, head, inner = size[:4]
    return heads * head * (8 * heads * head + 2 * inner) * blocks


def _wan_tokens(size: tuple[int, ...]) -> int:
    """Of both calls of a step."""
    frames, height, width = size[4:7]
    return 2 * ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
