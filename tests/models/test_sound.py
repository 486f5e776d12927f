"""LTX-2, video with sound: its pipeline copies its scheduler within the call, and its denoiser is served uncached."""

from __future__ import annotations

from typing import Any

import diffusers as d
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params

TEXT, RATE = 16, 16000
SIZE = {"height": 32, "width": 32, "num_frames": 5}
GUIDANCE = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "use_cross_timestep": False,
}


def transformer() -> Any:
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
        caption_channels=TEXT,
        rope_double_precision=False,
        rope_type="split",
    )


def connectors() -> Any:
    return LTX2TextConnectors(
        caption_channels=TEXT,
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


def video_vae() -> Any:
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


def audio_vae() -> Any:
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


def vocoder() -> Any:
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


@pytest.fixture(scope="module")
def pipe() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = d.LTX2Pipeline(
            scheduler=d.FlowMatchEulerDiscreteScheduler(),
            vae=video_vae().eval(),
            audio_vae=audio_vae().eval(),
            text_encoder=None,
            tokenizer=None,
            connectors=connectors().eval(),
            transformer=transformer().eval(),
            vocoder=vocoder().eval(),
        )
    made.set_progress_bar_config(disable=True)
    return made


def prompt(i: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return {
        "prompt_embeds": torch.randn(1, 8, TEXT * 2, generator=generator),
        "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long),
    }


def test_video_and_sound_are_what_diffusers_makes(pipe: Any) -> None:
    counts = [6, 4]
    plain = []
    for i, steps in enumerate(counts):
        call = dict(guidance_scale=1.0, frame_rate=25.0, num_inference_steps=steps, output_type="np")
        generator = torch.Generator().manual_seed(i)
        plain.append(pipe(**prompt(i), **SIZE, **GUIDANCE, **call, generator=generator))
    params = [
        Params(
            num_inference_steps=n, seed=i, output_type="np", guidance_scale=1.0, fps=25.0, extra_args=GUIDANCE, **SIZE
        )
        for i, n in enumerate(counts)
    ]
    with Omni.from_pipe(pipe) as omni:
        outputs = omni.generate([prompt(0), prompt(1)], params, use_tqdm=False)
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert output.computed_steps == output.num_inference_steps and output.skipped_steps == 0
        torch.testing.assert_close(
            torch.as_tensor(output.videos[0]), torch.as_tensor(wanted.frames[0]), rtol=1e-4, atol=1e-5
        )
        sound, expected = torch.as_tensor(output.audio[0]), torch.as_tensor(wanted.audio[0])
        assert (sound - expected).norm() <= 1e-4 * expected.norm()
        assert expected.norm() > 0 and output.audio_rate == RATE and output.fps == 25.0
    assert type(pipe.scheduler) is d.FlowMatchEulerDiscreteScheduler
