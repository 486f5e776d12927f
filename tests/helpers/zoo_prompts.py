"""The zoo's pictures whose pipelines need more than embeddings: a text, a picture, or both."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import diffusers as d
import torch
from families import qwen
from family import HEADS, SMALL, TEXT, TOKENS, TRUE_CFG, Family, assembled, edited, picture, random_model
from zoo_parts import (
    CHAT,
    TRANSFORMS,
    Processor,
    certain,
    drawn,
    flux2_vae,
    kl_vae,
    language_model,
    qwen_vae,
    sentence,
    spoken,
    stand_in,
    vision_language,
    wan_vae,
    words_tokenizer,
)

EMBEDS_MASK = {"prompt_embeds_mask": (1, 8)}


def longcat() -> Any:
    sizes = HEADS | {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT}
    sizes |= {"pooled_projection_dim": TEXT, "axes_dims_rope": (4, 6, 6)}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"text_encoder": language_model(), "tokenizer": words_tokenizer(), "text_processor": None}
    made = assembled(d.LongCatImagePipeline, d.LongCatImageTransformer2DModel, sizes, scheduler, **parts)
    made.tokenizer_max_length = 16
    return made


def layered() -> Any:
    made = qwen(d.QwenImageLayeredPipeline)
    made.register_modules(text_encoder=language_model(), tokenizer=words_tokenizer(32))
    made.prompt_template_encode_start_idx = 0
    return made


def qwen21() -> Any:
    sizes = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 3, "context_in_dim": TEXT}
    sizes |= {"axes_dims_rope": (4, 6, 6)}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"processor": Processor()}
    return assembled(d.QwenImage21Pipeline, d.QwenImage21Transformer2DModel, sizes, scheduler, **parts)


def flux3() -> Any:
    blocks = d.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")  # a language model that writes the prompt anew
    sizes = HEADS | {"in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"joint_attention_dim": TEXT * 2, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    made = blocks.init_pipeline()
    made.update_components(
        transformer=random_model(d.Flux3Transformer2DModel, sizes),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=language_model(),
        tokenizer=Processor(),
    )
    return made


def joy(pipeline: type, transformer: type) -> Any:
    sizes = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT, "num_layers": 3}
    vae = certain(wan_vae())
    parts = {"vae": vae, "processor": Processor(), "text_encoder": vision_language()}
    made = assembled(pipeline, transformer, sizes | {"rope_dim_list": [4, 6, 6]}, **parts)
    made.prompt_template_encode_start_idx = {"image": 0, "multiple_images": 0}
    processor = vars(made).get("vae_image_processor", made.image_processor)
    sys.modules[type(processor).__module__].BUCKETS[32] = [(32, 32)]  # the released sizes are a megapixel each
    processor.register_to_config(basesize=32)
    return made


def fibo() -> Any:
    sizes = HEADS | {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT * 2}
    sizes |= {"axes_dims_rope": (4, 6, 6), "text_encoder_dim": TEXT}
    parts = {"vae": qwen_vae(), "text_encoder": language_model(), "tokenizer": words_tokenizer()}
    parts["text_encoder"].resize_token_embeddings(128064)  # the pipeline has the number of its token for no text
    made = assembled(d.BriaFiboPipeline, d.BriaFiboTransformer2DModel, sizes, **parts)
    return drawn(made, "text_encoder", "embed_tokens")


def ideogram() -> Any:
    module = sys.modules[d.Ideogram4Pipeline.__module__]
    vars(module)["QWEN3_VL_ACTIVATION_LAYERS"] = (0, 1)  # of 36
    sizes = HEADS | {"in_channels": 16, "num_layers": 3, "intermediate_size": 64, "adaln_dim": 16}
    sizes |= {"llm_features_dim": TEXT * 2, "mrope_section": (4, 2, 2)}
    parts = {
        "vae": flux2_vae(),
        "text_encoder": vision_language().model,
        "tokenizer": words_tokenizer(template=CHAT),
        "unconditional_transformer": random_model(d.Ideogram4Transformer2DModel, sizes, seed=1),
    }
    return assembled(d.Ideogram4Pipeline, d.Ideogram4Transformer2DModel, sizes, **parts)


def omnigen() -> Any:
    processor = importlib.import_module("diffusers.pipelines.omnigen.processor_omnigen")
    stand_in(processor.__name__, "transforms", TRANSFORMS)
    stand_in(d.OmniGenPipeline.__module__, "OmniGenMultiModalProcessor", processor.OmniGenMultiModalProcessor)
    sizes = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_layers": 3}
    sizes |= {"intermediate_size": 64, "vocab_size": 64, "pad_token_id": 0, "pos_embed_max_size": 16}
    sizes |= {"time_step_dim": 16, "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}}
    deep = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    deep |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    parts = {"tokenizer": words_tokenizer(), "vae": kl_vae(**deep)}
    return assembled(d.OmniGenPipeline, d.OmniGenTransformer2DModel, sizes, **parts)


def _images(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"images": [picture(generator)], "prompt": sentence(generator)}


def _told_edit(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator) | {"prompt": sentence(generator), "negative_prompt": sentence(generator)}


PROMPTS = [
    Family(
        "FLUX.3",
        flux3,
        {},
        settings={"height": 64, "width": 64, "text_encoder_out_layers": (0, 1)},
        negative=False,
        guidance=None,
        more=spoken,
    ),
    Family(
        "LongCat-Image", longcat, {}, settings=SMALL | {"enable_prompt_rewrite": False}, negative=False, more=spoken
    ),
    Family("Qwen-Image-2.1", qwen21, TOKENS, EMBEDS_MASK, settings=SMALL, guidance=TRUE_CFG),
    Family(
        "Qwen-Image-2.1, use_kv_cache=False",
        qwen21,
        TOKENS,
        EMBEDS_MASK,
        settings=SMALL | {"use_kv_cache": False},
        guidance=TRUE_CFG,
    ),
    Family(
        "JoyImage-Edit",
        partial(joy, d.JoyImageEditPipeline, d.JoyImageEditTransformer3DModel),
        TOKENS,
        EMBEDS_MASK,
        settings=SMALL,
        more=edited,
    ),
    Family(
        "JoyImage-Edit-Plus",
        partial(joy, d.JoyImageEditPlusPipeline, d.JoyImageEditPlusTransformer3DModel),
        {},
        settings=SMALL,
        negative=False,
        more=_images,
    ),
    Family(
        "Qwen-Image-Layered",
        layered,
        {},
        settings={"layers": 2},
        negative=False,
        guidance=TRUE_CFG,
        output="np",
        more=_told_edit,
    ),
    Family("Bria FIBO", fibo, {}, settings=SMALL, negative=False, more=spoken),
    Family(
        "Ideogram 4",
        ideogram,
        {},
        settings=SMALL | {"max_sequence_length": 16, "guidance_schedule": None},
        negative=False,
        more=spoken,
    ),
    Family(
        "OmniGen",
        omnigen,
        {},
        settings=SMALL,
        negative=False,
        more=spoken,
        why="its positions are read from the first row: only requests with equal prompts share a forward",
    ),
]
