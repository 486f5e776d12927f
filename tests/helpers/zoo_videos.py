"""The zoo's videos: a tiny pipeline for every video pipeline of diffusers that has no hand-written description."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers as d
import torch
from families import WAN, wan_i2v
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
    Family,
    assembled,
    edited,
    picture,
    random_model,
)
from zoo_parts import (
    TRANSFORMS,
    sentence,
    spoken,
    stand_in,
    t5,
    wan_vae,
    words_tokenizer,
)
from zoo_sound import ltx2_video_vae

HUNYUAN = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "rope_axes_dim": (4, 6, 6),
}
HUNYUAN |= {"num_refiner_layers": 1, "text_embed_dim": TEXT, "pooled_projection_dim": TEXT}
COSMOS = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT, "adaln_lora_dim": 8}
COSMOS |= {"max_size": (8, 16, 16)}


def allegro() -> Any:
    sizes = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 3, "cross_attention_dim": 32}
    sizes |= {"attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": TEXT, "sample_height": 4}
    sizes |= {"sample_width": 4, "sample_frames": 2}
    return assembled(d.AllegroPipeline, d.AllegroTransformer3DModel, sizes, d.EulerAncestralDiscreteScheduler())


def anyflow() -> Any:
    return assembled(
        d.AnyFlowPipeline, d.AnyFlowTransformer3DModel, WAN, d.FlowMapEulerDiscreteScheduler(), vae=wan_vae()
    )


def anyflow_far() -> Any:
    sizes = WAN | {"chunk_partition": (1, 1)}
    return assembled(
        d.AnyFlowFARPipeline, d.AnyFlowFARTransformer3DModel, sizes, d.FlowMapEulerDiscreteScheduler(), vae=wan_vae()
    )


def chrono_edit() -> Any:
    base = wan_i2v()
    sizes = WAN | {"in_channels": 12, "image_dim": TEXT, "added_kv_proj_dim": 32}
    parts = {name: base.components[name] for name in ("vae", "image_encoder", "image_processor")}
    return assembled(d.ChronoEditPipeline, d.ChronoEditTransformer3DModel, sizes, **parts)


def cosmos() -> Any:
    stand_in(d.CosmosTransformer3DModel.__module__, "transforms", TRANSFORMS)
    return assembled(
        d.CosmosTextToWorldPipeline, d.CosmosTransformer3DModel, COSMOS,
        d.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=Unchecked(),
    )  # fmt: skip


def cosmos2() -> Any:
    stand_in(d.CosmosTransformer3DModel.__module__, "transforms", TRANSFORMS)
    sizes = COSMOS | {"extra_pos_embed_type": None}
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return assembled(
        d.Cosmos2TextToImagePipeline, d.CosmosTransformer3DModel, sizes, scheduler, safety_checker=Unchecked()
    )


def consisid() -> Any:
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # offered with OpenCV alone

    sizes = HEADS | {"in_channels": 8, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": TEXT, "num_layers": 4}
    sizes |= {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 8}
    sizes |= {"use_rotary_positional_embeddings": True, "is_train_face": True, "cross_attn_dim_head": 8}
    sizes |= {"cross_attn_num_heads": 2, "LFE_id_dim": 16, "LFE_vit_dim": 16, "LFE_depth": 5, "LFE_dim_head": 8}
    sizes |= {"LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 21, "LFE_ff_mult": 1}
    vae = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    parts = {"vae": random_model(d.AutoencoderKLCogVideoX, vae)}
    return assembled(ConsisIDPipeline, d.ConsisIDTransformer3DModel, sizes, d.CogVideoXDPMScheduler(), **parts)


def sana_wm() -> Any:
    sizes = {"in_channels": 4, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16}
    sizes |= {"chunk_plucker_channels": 12, "chunk_plucker_post_attn_blocks": 4, "image_size": 32}
    sizes |= {"caption_channels": TEXT, "softmax_every_n": 2, "fp32_attention": False, "mixed_precision": "no"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = ltx2_video_vae().eval()
    return assembled(d.SanaWMPipeline, d.SanaWMTransformer3DModel, sizes, vae=vae)


def kandinsky6_sr() -> Any:
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 32, "model_dim": 32, "ff_dim": 64}
    sizes |= {"num_visual_blocks": 3, "axes_dims": (4, 6, 6), "tile_sizes": ((128, 128),)}
    vae = {"latent_channels": 4, "encoder_block_out_channels": (8,) * 5, "decoder_block_out_channels": (8,) * 5}
    parts = {"vae": random_model(d.Kandinsky6SRVAE, vae | {"layers_per_block": 1})}
    return assembled(d.Kandinsky6SRPipeline, d.Kandinsky6SRTransformer3DModel, sizes, **parts)


def _face(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator) | {
        "id_vit_hidden": [torch.randn(1, 4, 16, generator=generator) for _ in range(5)],
        "id_cond": torch.randn(1, 16, generator=generator),
    }


def _clip(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"video": [picture(generator, 64) for _ in range(5)]}


def _camera(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator) | {"prompt": sentence(generator)}


class Unchecked:
    """In the place of NVIDIA's guardrail: every text and picture passes."""

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video

    def to(self, device: Any) -> Any:
        return self


def easy_animate() -> Any:
    sizes = HEADS | {"attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 3}
    sizes |= {"mmdit_layers": 3, "time_embed_dim": 16, "text_embed_dim": TEXT, "sample_width": 4, "sample_height": 4}
    vae = random_model(d.AutoencoderKLMagvit, {
        "latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    })  # fmt: skip
    return assembled(d.EasyAnimatePipeline, d.EasyAnimateTransformer3DModel, sizes, vae=vae)


def helios() -> Any:
    sizes = WAN | {"rope_dim": (4, 6, 6)}
    return assembled(d.HeliosPipeline, d.HeliosTransformer3DModel, sizes, d.HeliosScheduler(stages=1), vae=wan_vae())


def framepack() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = HUNYUAN | {
        "image_condition_type": None,
        "has_image_proj": True,
        "image_proj_dim": TEXT,
        "has_clean_x_embedder": True,
    }
    vae = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    eyes = {"hidden_size": TEXT, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    from transformers import SiglipImageProcessor

    parts = CLIP | {"vae": random_model(d.AutoencoderKLHunyuanVideo, vae)}
    parts["image_encoder"] = random_model(
        SiglipVisionModel, {"config": SiglipVisionConfig(**eyes, image_size=32, patch_size=16)}
    )
    parts["feature_extractor"] = SiglipImageProcessor(size={"height": 32, "width": 32})
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return assembled(
        d.HunyuanVideoFramepackPipeline, d.HunyuanVideoFramepackTransformer3DModel, sizes, scheduler, **parts
    )


def latte() -> Any:
    sizes = HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 4}
    sizes |= {"patch_size": 2, "norm_type": "ada_norm_single", "caption_channels": TEXT, "video_length": 2}
    sizes |= {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "attention_bias": True}
    return assembled(d.LattePipeline, d.LatteTransformer3DModel, sizes, d.DDIMScheduler())


def motif() -> Any:
    from diffusers.guiders import AdaptiveProjectedGuidance

    sizes = HEADS | {"in_channels": 9, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"num_decoder_layers": 1, "text_embed_dim": TEXT, "rope_axes_dim": (4, 6, 6)}
    parts = {"vae": wan_vae(), "guider": AdaptiveProjectedGuidance(guidance_scale=3.0)}
    return assembled(d.MotifVideoPipeline, d.MotifVideoTransformer3DModel, sizes, **parts)


def sana_video() -> Any:
    sizes = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2}
    sizes |= {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT, "sample_size": 4}
    scheduler = d.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0, solver_order=2
    )
    return assembled(d.SanaVideoPipeline, d.SanaVideoTransformer3DModel, sizes, scheduler, vae=wan_vae())


def skyreels(pipeline: type = d.SkyReelsV2Pipeline) -> Any:
    scheduler = d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=8.0
    )
    parts = {"text_encoder": None, "tokenizer": None}
    if pipeline is not d.SkyReelsV2Pipeline:
        stand_in(pipeline.__module__, "ftfy", SimpleNamespace(fix_text=str))
        parts = {"text_encoder": t5(), "tokenizer": words_tokenizer()}
    return assembled(pipeline, d.SkyReelsV2Transformer3DModel, WAN, scheduler, vae=wan_vae(), **parts)


def wan_vace() -> Any:
    sizes = WAN | {"vace_layers": [0, 2], "vace_in_channels": 4 * 2 + 64}
    return assembled(d.WanVACEPipeline, d.WanVACETransformer3DModel, sizes, vae=wan_vae())


def wan_animate() -> Any:
    base = wan_i2v()
    sizes = WAN | {"in_channels": 12, "latent_channels": 4, "image_dim": TEXT, "added_kv_proj_dim": None}
    sizes |= {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8, "32": 8, "64": 8}, "motion_encoder_size": 64}
    sizes |= {"motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16}
    sizes |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2, "num_layers": 4}
    parts = {name: base.components[name] for name in ("vae", "image_encoder", "image_processor")}
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return assembled(d.WanAnimatePipeline, d.WanAnimateTransformer3DModel, sizes, scheduler, **parts)


def _animated(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator) | {
        "pose_video": [picture(generator) for _ in range(5)],
        "face_video": [picture(generator) for _ in range(5)],
    }


def _window(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return edited(given, generator)


VIDEOS = [
    Family("Allegro", allegro, TOKENS, MASK, settings=VIDEO | {"negative_prompt": None}),
    Family("AnyFlow", anyflow, TOKENS, settings=VIDEO),
    Family("AnyFlow FAR", anyflow_far, TOKENS, settings=VIDEO),
    Family("ChronoEdit", chrono_edit, TOKENS, settings=VIDEO, more=edited),
    Family("Cosmos 1", cosmos, TOKENS, settings=VIDEO),
    Family("Cosmos 2", cosmos2, TOKENS, settings=SMALL),
    Family(
        "ConsisID",
        consisid,
        TOKENS,
        settings=VIDEO,
        more=_face,
        why="a face is not given per row: only requests with the same one share a forward",
    ),
    Family(
        "Kandinsky 6 SR",
        kandinsky6_sr,
        {},
        negative=False,
        settings={"resolution_scale": 2.0},
        guidance=None,
        output="np",
        more=_clip,
    ),
    Family(
        "Sana World Model",
        sana_wm,
        TOKENS,
        MASK,
        settings=VIDEO | {"num_frames": 9, "action": "w-8", "intrinsics": [30.0, 30.0, 16.0, 16.0]},
        more=_camera,
    ),
    Family("EasyAnimate", easy_animate, TOKENS, MASK, settings=VIDEO),
    Family(
        "Helios",
        helios,
        TOKENS,
        settings=VIDEO | {"num_frames": 9, "history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2},
    ),
    Family(
        "FramePack",
        framepack,
        POOLED,
        MASK,
        settings=VIDEO | {"num_frames": 17, "latent_window_size": 2},
        guidance=TRUE_CFG,
        more=_window,
    ),
    Family(
        "Latte",
        latte,
        TOKENS,
        settings=SMALL | {"video_length": 2, "negative_prompt": None},
        roundings=1024,  # DDIM divides by what is left of the signal; 270 were seen on an AMD EPYC
    ),
    Family("Motif-Video", motif, TOKENS, MASK, settings=VIDEO, guidance=None),
    Family(
        "Sana Video",
        sana_video,
        TOKENS,
        MASK,
        settings=SMALL | {"frames": 5, "use_resolution_binning": False, "negative_prompt": None},
    ),
    Family("SkyReels V2", skyreels, TOKENS, settings=VIDEO),
    Family(
        "SkyReels V2 diffusion forcing",
        partial(skyreels, d.SkyReelsV2DiffusionForcingPipeline),
        {},
        negative=False,
        settings=VIDEO
        | {"num_frames": 9, "base_num_frames": 5, "overlap_history": 1, "ar_step": 1, "causal_block_size": 1},
        more=spoken,
        why="each frame has a scheduler of its own: nothing says which step a call is",
    ),
    Family("Wan VACE", wan_vace, TOKENS, settings=VIDEO),
    Family("Wan Animate", wan_animate, TOKENS, settings=SMALL | {"segment_frame_length": 5}, more=_animated),
]
