"""The zoo's pictures: a tiny pipeline for every image pipeline of diffusers that has no hand-written description."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from family import CLIP, HEADS, MASK, SMALL, TEXT, TOKENS, Family, assembled
from zoo_parts import drawn, flux2_vae, kl_vae

PACKED = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT}
PACKED |= {"axes_dims_rope": (4, 6, 6)}
EMBEDS_MASK = {"prompt_embeds_mask": (1, 8)}
COGVIEW = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "time_embed_dim": 16, "condition_dim": 8}


def bria() -> Any:
    vae = kl_vae(shift_factor=0.1)
    return assembled(d.BriaPipeline, d.BriaTransformer2DModel, HEADS | PACKED | {"guidance_embeds": False}, vae=vae)


def cogview3() -> Any:
    sizes = HEADS | COGVIEW | {"text_embed_dim": TEXT, "pos_embed_max_size": 8, "sample_size": 4}
    return assembled(d.CogView3PlusPipeline, d.CogView3PlusTransformer2DModel, sizes, d.CogVideoXDDIMScheduler())


def dit() -> Any:
    sizes = HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "norm_num_groups": 4}
    return assembled(
        d.DiTPipeline, d.DiTTransformer2DModel, sizes | {"num_embeds_ada_norm": 1000}, d.DDIMScheduler(), vae=kl_vae()
    )


def ernie() -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 64, "in_channels": 16}
    sizes |= {"out_channels": 16, "text_in_dim": TEXT, "rope_axes_dim": (4, 6, 6)}
    return assembled(d.ErnieImagePipeline, d.ErnieImageTransformer2DModel, sizes, vae=flux2_vae())


def glm_image() -> Any:
    sizes = HEADS | COGVIEW | {"text_embed_dim": TEXT, "prior_vq_quantizer_codebook_size": 32}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)
    parts = {"processor": None, "vision_language_encoder": None}
    return assembled(d.GlmImagePipeline, d.GlmImageTransformer2DModel, sizes, scheduler, **parts)


def hunyuan_dit() -> Any:
    sizes = HEADS | {"in_channels": 4, "patch_size": 2, "sample_size": 4, "hidden_size": 32, "num_layers": 4}
    sizes |= {"cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "pooled_projection_dim": 16}
    sizes |= {"text_len": 8, "text_len_t5": 8}
    parts = CLIP | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return assembled(
        d.HunyuanDiTPipeline, d.HunyuanDiT2DModel, sizes, d.DDPMScheduler(prediction_type="v_prediction"), **parts
    )


def hunyuan_image() -> Any:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    sizes = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"num_refiner_layers": 1, "text_embed_dim": TEXT, "text_embed_2_dim": TEXT, "rope_axes_dim": (8, 8)}
    parts = CLIP | {"guider": AdaptiveProjectedMixGuidance(guidance_scale=3.0), "ocr_guider": None}
    return assembled(d.HunyuanImagePipeline, d.HunyuanImageTransformer2DModel, sizes, **parts)


def krea2() -> Any:
    sizes = {"in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 64, "timestep_embed_dim": 16, "text_hidden_dim": TEXT}
    sizes |= {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    sizes |= {"text_intermediate_size": 64, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    sizes |= {"axes_dims_rope": (4, 6, 6)}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return assembled(d.Krea2Pipeline, d.Krea2Transformer2DModel, sizes, scheduler)


def lumina() -> Any:
    sizes = {"sample_size": 4, "in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 2}
    sizes |= {"num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": TEXT}
    return drawn(assembled(d.LuminaPipeline, d.LuminaNextDiT2DModel, sizes), "transformer", "pad_token")


def nucleus() -> Any:
    sizes = HEADS | {"in_channels": 16, "out_channels": 4, "num_layers": 5, "joint_attention_dim": TEXT}
    sizes |= {"axes_dims_rope": (4, 6, 6), "num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": 2.0}
    made = assembled(d.NucleusMoEImagePipeline, d.NucleusMoEImageTransformer2DModel, sizes, processor=None)
    return drawn(made, "transformer", "experts.")  # made without values


def ovis() -> Any:
    return assembled(d.OvisImagePipeline, d.OvisImageTransformer2DModel, HEADS | PACKED | {"out_channels": 16})


def prx() -> Any:
    sizes = {"in_channels": 4, "context_in_dim": TEXT, "hidden_size": 32, "num_heads": 2, "depth": 3}
    return assembled(d.PRXPipeline, d.PRXTransformer2DModel, sizes | {"axes_dim": [8, 8]})


def fibo2() -> Any:
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": TEXT}
    sizes |= {"injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2}
    sizes |= {"max_num_gist_tokens": 4, "gist_step": 1, "gist_min_text_len": 2, "gist_max_text_len": 8}
    sizes |= {"axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32)}
    return assembled(d.BriaFibo2Pipeline, d.BriaFibo2Transformer2DModel, sizes, vae=flux2_vae(), processor=None)


def _label(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"class_labels": [int(torch.randint(1000, (), generator=generator))]}


def _prior(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"prior_token_ids": torch.randint(32, (1, 4), generator=generator)}


IMAGES = [
    Family("Bria 3.2", bria, TOKENS, settings=SMALL),
    Family("CogView3+", cogview3, TOKENS, settings=SMALL),
    Family("DiT", dit, {}, negative=False, output="np", more=_label),
    Family("ERNIE-Image", ernie, TOKENS, settings=SMALL, listed=True),
    Family("GLM-Image", glm_image, TOKENS, settings=SMALL, more=_prior),
    Family(
        "HunyuanDiT",
        hunyuan_dit,
        TOKENS | {"prompt_embeds_2": (1, 8, TEXT)},
        {"prompt_attention_mask": (1, 8), "prompt_attention_mask_2": (1, 8)},
        settings=SMALL | {"use_resolution_binning": False},
    ),
    Family(
        "HunyuanImage 2.1",
        hunyuan_image,
        TOKENS | {"prompt_embeds_2": (1, 8, TEXT)},
        {"prompt_embeds_mask": (1, 8), "prompt_embeds_mask_2": (1, 8)},
        settings={"height": 128, "width": 128},
        guidance=None,
    ),
    Family("Krea 2", krea2, {"prompt_embeds": (1, 8, 2, TEXT)}, EMBEDS_MASK, torch.bool, settings=SMALL),
    Family("Lumina", lumina, TOKENS, MASK, settings=SMALL),
    Family("Nucleus-Image", nucleus, TOKENS, EMBEDS_MASK, settings=SMALL),
    Family("Ovis-Image", ovis, TOKENS, settings=SMALL | {"negative_prompt": None}),
    Family("PRX", prx, TOKENS, MASK, torch.bool, settings=SMALL | {"use_resolution_binning": False}),
    Family("Bria FIBO 2", fibo2, {"prompt_embeds": (1, 2, 8, TEXT)}, EMBEDS_MASK, torch.bool, settings=SMALL),
]
