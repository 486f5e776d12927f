"""The zoo's sounds: tiny pipelines that make audio, alone or with a video."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from family import CLIP, HEADS, POOLED, TEXT, TOKENS, VIDEO, Family, assembled, random_model
from zoo_parts import CHAT, language_model, spoken, t5, wan_vae, words_tokenizer

RATE = 16000
LTX_TEXT = 16


def ltx2_transformer() -> Any:
    return d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=LTX_TEXT,
        rope_double_precision=False,
        rope_type="split",
    )


def ltx2_connectors() -> Any:
    return LTX2TextConnectors(
        caption_channels=LTX_TEXT,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )


def ltx2_video_vae() -> Any:
    return d.AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def ltx2_audio_vae() -> Any:
    return d.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=RATE,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )


def ltx2_vocoder() -> Any:
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=RATE,
    )


def ltx2() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = d.LTX2Pipeline(
            scheduler=d.FlowMatchEulerDiscreteScheduler(),
            vae=ltx2_video_vae().eval(),
            audio_vae=ltx2_audio_vae().eval(),
            text_encoder=None,
            tokenizer=None,
            connectors=ltx2_connectors().eval(),
            transformer=ltx2_transformer().eval(),
            vocoder=ltx2_vocoder().eval(),
        )
    made.set_progress_bar_config(disable=True)
    return made


def oobleck(channels: int = 4, ratios: tuple[int, int] = (2, 4)) -> Any:
    """An audio VAE: one latent of eight samples."""
    sizes = {"encoder_hidden_size": 4, "downsampling_ratios": list(ratios), "channel_multiples": [1, 2]}
    sizes |= {"decoder_channels": 4, "decoder_input_channels": channels, "sampling_rate": RATE}
    return random_model(d.AutoencoderOobleck, sizes)


def stable_audio() -> Any:
    sizes = HEADS | {"sample_size": 64, "in_channels": 4, "out_channels": 4, "num_layers": 3, "time_proj_dim": 16}
    sizes |= {"num_key_value_attention_heads": 1, "cross_attention_dim": 16, "cross_attention_input_dim": TEXT}
    sizes |= {"global_states_input_dim": 2 * TEXT}
    projection = {"text_encoder_dim": TEXT, "conditioning_dim": TEXT, "min_value": 0, "max_value": 32}
    parts = {"vae": oobleck(), "projection_model": random_model(StableAudioProjectionModel, projection)}
    parts |= {"text_encoder": t5(), "tokenizer": words_tokenizer(8)}
    scheduler = d.EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500, sigma_data=1.0)
    return assembled(d.StableAudioPipeline, d.StableAudioDiTModel, sizes, scheduler, **parts)


def stable_audio3() -> Any:
    sizes = {"io_channels": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "cond_token_dim": TEXT}
    sizes |= {"global_cond_dim": TEXT, "local_add_cond_dim": 0, "timestep_features_dim": 16, "num_memory_tokens": 2}
    vae = {"patch_size": 4, "encoder_channels": 8, "encoder_c_mults": (2,), "encoder_strides": (2,), "dim_heads": 8}
    vae |= {"encoder_transformer_depths": (1,), "latent_dim": 8, "sampling_rate": RATE}
    seconds = {"output_dim": TEXT, "fourier_dim": 16}
    parts = {
        "vae": random_model(d.AutoencoderSAME, vae),
        "duration_embedder": random_model(d.StableAudio3DurationEmbedder, seconds),
    }
    scheduler = d.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    return assembled(d.StableAudio3Pipeline, d.StableAudio3DiTModel, sizes, scheduler, **parts)


def ace_step() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 32}
    heads |= {"intermediate_size": 64}
    sizes = heads | {"num_hidden_layers": 3, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 8}
    given = heads | {"text_hidden_dim": TEXT, "timbre_hidden_dim": 4, "num_lyric_encoder_hidden_layers": 1}
    given |= {"num_timbre_encoder_hidden_layers": 1}
    parts = {
        "vae": oobleck(ratios=(8, 200)), "condition_encoder": random_model(AceStepConditionEncoder, given),
        "text_encoder": language_model(), "tokenizer": words_tokenizer(32),
    }  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    return assembled(d.AceStepPipeline, d.AceStepTransformer1DModel, sizes, scheduler, **parts)


def longcat_audio() -> Any:
    sizes = {"dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": TEXT, "latent_dim": 8}
    vae = {"channels": 8, "c_mults": [1, 1], "strides": [2], "latent_dim": 8, "encoder_latent_dim": 16}
    vae |= {"downsampling_ratio": 2, "sample_rate": RATE}
    parts = {"vae": random_model(d.LongCatAudioDiTVae, vae), "text_encoder": t5(), "tokenizer": words_tokenizer()}
    return assembled(d.LongCatAudioDiTPipeline, d.LongCatAudioDiTTransformer, sizes, **parts)


def kandinsky6() -> Any:
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32}
    sizes |= {"model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6)}
    sizes |= {"in_audio_dim": 8, "out_audio_dim": 8, "model_dim_a": 32, "time_dim_a": 32, "ff_dim_a": 64}
    sizes |= {"axes_dims_a": (16,)}
    audio = {"mel_bins": 16, "latent_channels": 8, "hidden_channels": 8, "channel_multipliers": (1, 2)}
    audio |= {"layers_per_block": 1, "sample_rate": RATE, "n_fft": 64, "hop_length": 16}
    voice = {"num_mels": 16, "upsample_initial_channel": 16, "upsample_rates": (4, 4), "upsample_kernel_sizes": (8, 8)}
    voice |= {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),)}
    vae = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    parts = CLIP | {
        "vae": random_model(d.AutoencoderKLHunyuanVideo, vae),
        "audio_vae": random_model(d.MMAudioVAE, audio | {"layers_per_block": 1}),
        "vocoder": random_model(d.MMAudioVocoder, voice),
    }
    return assembled(d.Kandinsky6TI2VAPipeline, d.Kandinsky6Transformer3DModel, sizes, std=0.05, **parts)


def cosmos3() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 3, "latent_channel": 4, "patch_latent_dim": 16}
    sizes |= {
        "vocab_size": 64,
        "dtype": "float32",
        "rope_axes_dim": None,
        "sound_gen": True,
        "sound_dim": 8,
        "rope_scaling": {"mrope_section": [4, 2, 2]},
    }
    parts = {"text_tokenizer": words_tokenizer(special=("<|vision_start|>",), template=CHAT), "vae": wan_vae()}
    parts |= {"safety_checker": None, "enable_safety_checker": False}
    sound = {"sampling_rate": RATE, "vocoder_input_dim": 8, "dec_dim": 4, "dec_c_mults": (1, 2), "dec_strides": (2, 4)}
    sound |= {"hop_size": 8, "encoder_enabled": False}
    parts["sound_tokenizer"] = random_model(d.Cosmos3AVAEAudioTokenizer, sound)
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return assembled(d.Cosmos3OmniPipeline, d.Cosmos3OmniTransformer, sizes, scheduler, **parts)


LTX_GUIDANCE = {
    "stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0, "use_cross_timestep": False,
}  # fmt: skip
SECOND = 8 * 32 / RATE

SOUNDS = [
    Family(
        "LTX-2",
        ltx2,
        {"prompt_embeds": (1, 8, LTX_TEXT * 2)},
        {"prompt_attention_mask": (1, 8)},
        settings=VIDEO | LTX_GUIDANCE,
    ),
    Family("Kandinsky 6", kandinsky6, POOLED, settings=VIDEO),
    Family("Cosmos 3", cosmos3, {}, negative=False, settings=VIDEO | {"enable_sound": True}, more=spoken),
    Family("Stable Audio", stable_audio, TOKENS, {"attention_mask": (1, 8)}, settings={"audio_end_in_s": SECOND}),
    Family("Stable Audio 3", stable_audio3, TOKENS, {"encoder_attention_mask": (1, 8)}, settings={"duration": SECOND}),
    Family("ACE-Step", ace_step, {}, negative=False, settings={"audio_duration": 1.6}, more=spoken),
    Family("LongCat-AudioDiT", longcat_audio, {}, negative=False, settings={"audio_duration_s": SECOND}, more=spoken),
]
