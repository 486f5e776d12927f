"""One tiny pipeline with random weights per family, and its conditioning: a new family is one more entry."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any

import diffusers as d
import torch
from family import (
    CLIP,
    HEADS,
    MASK,
    POOLED,
    SMALL,
    TEXT,
    TOKENS,
    TRUE_CFG,
    VIDEO,
    WAN,
    Family,
    assembled,
    edited,
    picture,
    random_model,
)
from pipelines import tiny_flux

FLUX2 = HEADS | {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT * 3}
FLUX2 |= {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}


def _kontext(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator) | {"_auto_resize": False, "max_area": 32 * 32}


def _fill(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator) | {"mask_image": picture(generator)}


def _control(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"control_image": picture(generator)}


def _lengths(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    cumulated = torch.tensor([0, given["prompt_embeds_qwen"].shape[1]], dtype=torch.int32)
    return {"prompt_cu_seqlens": cumulated, "negative_prompt_cu_seqlens": cumulated}


def qwen(pipeline: type = d.QwenImagePipeline) -> Any:
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": TEXT}
    sizes |= {"axes_dims_rope": (4, 6, 6)}
    vae = None
    if pipeline is not d.QwenImagePipeline:
        small = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        vae = random_model(d.AutoencoderKLQwenImage, small | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
        edits = (64, 64, None) if pipeline is d.QwenImageEditPipeline else (64, 64)
        module = sys.modules[pipeline.__module__]
        vars(module)["calculate_dimensions"] = lambda area, ratio: edits  # otherwise each picture is a megapixel
    return assembled(pipeline, d.QwenImageTransformer2DModel, HEADS | sizes, vae=vae, processor=None)


def sd3() -> Any:
    sizes = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": TEXT}
    sizes |= {"caption_projection_dim": 32, "pooled_projection_dim": TEXT, "pos_embed_max_size": 8}
    more = CLIP | {"text_encoder_3": None, "tokenizer_3": None}
    return assembled(d.StableDiffusion3Pipeline, d.SD3Transformer2DModel, HEADS | sizes, **more)


def wan() -> Any:
    return assembled(d.WanPipeline, d.WanTransformer3DModel, WAN)


def chroma() -> Any:
    sizes = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT}
    sizes |= {"axes_dims_rope": (4, 6, 6), "approximator_num_channels": 8, "approximator_hidden_dim": 32}
    return assembled(d.ChromaPipeline, d.ChromaTransformer2DModel, HEADS | sizes | {"approximator_layers": 1})


def hunyuan_video() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    sizes |= {"text_embed_dim": TEXT, "pooled_projection_dim": TEXT, "rope_axes_dim": (4, 6, 6)}
    return assembled(d.HunyuanVideoPipeline, d.HunyuanVideoTransformer3DModel, HEADS | sizes, **CLIP)


def ltx() -> Any:
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 3, "caption_channels": TEXT}
    return assembled(d.LTXPipeline, d.LTXVideoTransformer3DModel, HEADS | sizes)


def cogvideox() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": TEXT, "num_layers": 3}
    sizes |= {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 8}
    rope = {"use_rotary_positional_embeddings": True}
    scheduler = d.CogVideoXDDIMScheduler()
    return assembled(d.CogVideoXPipeline, d.CogVideoXTransformer3DModel, HEADS | sizes | rope, scheduler)


def aura_flow() -> Any:
    sizes = {"sample_size": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT}
    sizes |= {"caption_projection_dim": 32, "pos_embed_max_size": 16}
    return assembled(d.AuraFlowPipeline, d.AuraFlowTransformer2DModel, HEADS | sizes)


def cogview4() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT, "time_embed_dim": 16}
    sizes |= {"condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 4, "rope_axes_dim": (8, 8)}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    return assembled(d.CogView4Pipeline, d.CogView4Transformer2DModel, HEADS | sizes, scheduler)


def flux2_klein() -> Any:
    vae = d.AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    sizes = FLUX2 | {"guidance_embeds": False}
    return assembled(d.Flux2KleinPipeline, d.Flux2Transformer2DModel, sizes, vae=vae.eval())


def flux2() -> Any:
    klein = flux2_klein()
    return assembled(d.Flux2Pipeline, d.Flux2Transformer2DModel, FLUX2, vae=klein.vae)


def z_image() -> Any:
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    sizes |= {"cap_feat_dim": TEXT, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]}
    return assembled(d.ZImagePipeline, d.ZImageTransformer2DModel, sizes)


def hidream() -> Any:
    sizes = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "caption_channels": [TEXT, TEXT],
    }
    sizes |= {"text_emb_dim": TEXT, "axes_dims_rope": (4, 6, 6), "max_resolution": (8, 8), "llama_layers": [0, 1, 1, 0]}
    more = CLIP | {"text_encoder_3": None, "tokenizer_3": None, "text_encoder_4": None, "tokenizer_4": None}
    routed = {"num_routed_experts": 2, "num_activated_experts": 1, "force_inference_output": True}
    made = assembled(d.HiDreamImagePipeline, d.HiDreamImageTransformer2DModel, HEADS | sizes | routed, **more)
    made.default_sample_size = 4  # every picture is brought to this area
    return made


def lumina2() -> Any:
    sizes = {"in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_kv_heads": 1, "multiple_of": 16, "cap_feat_dim": TEXT, "sample_size": 4}
    rope = {"axes_dim_rope": (4, 6, 6), "axes_lens": (64, 32, 32)}
    return assembled(d.Lumina2Pipeline, d.Lumina2Transformer2DModel, sizes | rope)


def sana() -> Any:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2, "sample_size": 4}
    sizes |= {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT}
    return assembled(d.SanaPipeline, d.SanaTransformer2DModel, HEADS | sizes)


def pixart() -> Any:
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 3, "cross_attention_dim": 32, "sample_size": 4}
    sizes |= {"caption_channels": TEXT}
    return assembled(d.PixArtSigmaPipeline, d.PixArtTransformer2DModel, HEADS | sizes, d.DPMSolverMultistepScheduler())


def kandinsky5(pipeline: type, visual_cond: bool) -> Any:
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32}
    sizes |= {"model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6)}
    made = assembled(pipeline, d.Kandinsky5Transformer3DModel, sizes | {"visual_cond": visual_cond}, std=0.05, **CLIP)
    if not visual_cond:
        made.resolutions = [(32, 32)]  # the released model's start at a megapixel
    return made


def wan22() -> Any:
    second = random_model(d.WanTransformer3DModel, WAN, seed=1)
    return assembled(d.WanPipeline, d.WanTransformer3DModel, WAN, transformer_2=second, boundary_ratio=0.5)


def wan22_ti2v() -> Any:
    return assembled(d.WanPipeline, d.WanTransformer3DModel, WAN, expand_timesteps=True)


def wan_i2v() -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"in_channels": 12, "image_dim": TEXT, "added_kv_proj_dim": 32}
    vae = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    parts = {"vae": random_model(d.AutoencoderKLWan, vae | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})}
    clip = {"hidden_size": TEXT, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip |= {"image_size": 32, "patch_size": 16}
    square = {"height": 32, "width": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # two builds are the same model
        parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**clip)).eval()
    parts["image_processor"] = CLIPImageProcessor(size=square, crop_size=square)
    return assembled(d.WanImageToVideoPipeline, d.WanTransformer3DModel, WAN | sizes, **parts)


def hunyuan_video15() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    sizes = {"in_channels": 9, "out_channels": 4, "num_layers": 3, "num_refiner_layers": 1, "text_embed_dim": TEXT}
    sizes |= {"text_embed_2_dim": TEXT, "image_embed_dim": TEXT, "rope_axes_dim": (4, 6, 6), "target_size": 32}
    vae = {"latent_channels": 4, "block_out_channels": (8,) * 5, "layers_per_block": 1}
    parts = CLIP | {"guider": ClassifierFreeGuidance(guidance_scale=3.0)}
    parts["vae"] = random_model(d.AutoencoderKLHunyuanVideo15, vae)
    return assembled(d.HunyuanVideo15Pipeline, d.HunyuanVideo15Transformer3DModel, HEADS | sizes, **parts)


def mochi() -> Any:
    sizes = {"in_channels": 4, "num_layers": 3, "pooled_projection_dim": 32, "text_embed_dim": TEXT}
    sizes |= {"time_embed_dim": 32, "max_sequence_length": 8}
    scheduler = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return assembled(d.MochiPipeline, d.MochiTransformer3DModel, HEADS | sizes, scheduler)


def flux_kontext() -> Any:
    return d.FluxKontextPipeline(**_flux_parts(tiny_flux()))


def flux_fill() -> Any:
    base = tiny_flux()
    wide = dict(base.transformer.config) | {"in_channels": 16 + 16 + 16, "out_channels": 16}
    return d.FluxFillPipeline(**_flux_parts(base) | {"transformer": random_model(d.FluxTransformer2DModel, wide)})


def flux_controlnet() -> Any:
    base = tiny_flux()
    sizes = {
        k: v for k, v in base.transformer.config.items() if k in inspect.signature(d.FluxControlNetModel).parameters
    }
    control = random_model(d.FluxControlNetModel, sizes | {"num_layers": 1, "num_single_layers": 1})
    return d.FluxControlNetPipeline(**_flux_parts(base), controlnet=control)


def _flux_parts(pipeline: Any) -> dict[str, Any]:
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    return {name: pipeline.components[name] for name in names}


qwen_edit, qwen_edit_plus = partial(qwen, d.QwenImageEditPipeline), partial(qwen, d.QwenImageEditPlusPipeline)

HIDREAM = {"prompt_embeds_t5": (1, 8, TEXT), "prompt_embeds_llama3": (2, 1, 8, TEXT), "pooled_prompt_embeds": (1, TEXT)}
KANDINSKY = {"prompt_embeds_qwen": (1, 8, TEXT), "prompt_embeds_clip": (1, TEXT)}
HUNYUAN15 = TOKENS | {"prompt_embeds_2": (1, 8, TEXT)}
HUNYUAN15_MASKS = {"prompt_embeds_mask": (1, 8), "prompt_embeds_mask_2": (1, 8)}
BINNED = SMALL | {"use_resolution_binning": False, "negative_prompt": None}

FAMILIES = [
    Family("FLUX.1", tiny_flux, POOLED, settings=SMALL, guidance=TRUE_CFG),
    Family("Qwen-Image", qwen, TOKENS, {"prompt_embeds_mask": (1, 8)}, settings=SMALL, guidance=TRUE_CFG),
    Family("Stable Diffusion 3", sd3, POOLED, settings=SMALL),
    Family("Wan 2.1", wan, TOKENS, settings=VIDEO),
    Family("Chroma", chroma, TOKENS, MASK, torch.bool, settings=SMALL),
    Family("HunyuanVideo", hunyuan_video, POOLED, MASK, settings=VIDEO, guidance=TRUE_CFG),
    Family("LTX-Video", ltx, TOKENS, MASK, settings={"height": 64, "width": 64, "num_frames": 9}),
    Family("CogVideoX", cogvideox, TOKENS, settings=VIDEO),
    Family("AuraFlow", aura_flow, TOKENS, MASK, settings=SMALL),
    Family("CogView4", cogview4, TOKENS, settings=SMALL),
    Family("FLUX.1 Kontext", flux_kontext, POOLED, settings=SMALL, guidance=TRUE_CFG, more=_kontext),
    Family("FLUX.1 Fill", flux_fill, POOLED, settings=SMALL, negative=False, more=_fill),
    Family(
        "FLUX.1 ControlNet", flux_controlnet, POOLED, settings=SMALL, guidance=TRUE_CFG, more=_control, steps_aside=True
    ),
    Family("FLUX.2", flux2, {"prompt_embeds": (1, 8, TEXT * 3)}, settings=SMALL, negative=False),
    Family("FLUX.2 klein", flux2_klein, {"prompt_embeds": (1, 8, TEXT * 3)}, settings=SMALL),
    Family(
        "Qwen-Image-Edit",
        qwen_edit,
        TOKENS,
        {"prompt_embeds_mask": (1, 8)},
        settings=SMALL,
        guidance=TRUE_CFG,
        more=edited,
    ),
    Family(
        "Qwen-Image-Edit-Plus",
        qwen_edit_plus,
        TOKENS,
        {"prompt_embeds_mask": (1, 8)},
        settings=SMALL,
        guidance=TRUE_CFG,
        more=edited,
    ),
    Family("Z-Image", z_image, TOKENS, settings=SMALL, listed=True),
    Family("HiDream", hidream, HIDREAM, settings=SMALL),
    Family("Lumina 2", lumina2, TOKENS, MASK, settings=SMALL),
    Family("Sana", sana, TOKENS, MASK, settings=BINNED),
    Family("PixArt-Σ", pixart, TOKENS, MASK, settings=BINNED),
    Family(
        "Kandinsky 5 image",
        partial(kandinsky5, d.Kandinsky5T2IPipeline, False),
        KANDINSKY,
        settings=SMALL,
        more=_lengths,
        roundings=256,  # random layers in the place of its zeros amplify each rounding a hundredfold at guidance 5
    ),
    Family(
        "Kandinsky 5 video",
        partial(kandinsky5, d.Kandinsky5T2VPipeline, True),
        KANDINSKY,
        settings=VIDEO,
        more=_lengths,
        roundings=256,
    ),
    Family("Wan 2.1 I2V", wan_i2v, TOKENS, settings=VIDEO, more=edited),
    Family("Wan 2.2 (two experts)", wan22, TOKENS, settings=VIDEO),
    Family("Wan 2.2 TI2V", wan22_ti2v, TOKENS, settings=VIDEO),
    Family(
        "HunyuanVideo-1.5",
        hunyuan_video15,
        HUNYUAN15,
        HUNYUAN15_MASKS,
        settings=VIDEO | {"height": 64, "width": 64},
        guidance=None,
    ),
    Family("Mochi", mochi, TOKENS, MASK, torch.bool, settings=VIDEO),
]
