"""A video is as long as its model made it: the frame rate of its file, and what the model was told."""

from __future__ import annotations

from typing import Any

import diffusers as d
import pytest
import torch
from families import cogvideox, wan, wan22_ti2v
from zoo_sound import LTX_GUIDANCE, LTX_TEXT, ltx2

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.arguments import ArgumentBuilder
from vllm_omni.errors import InvalidValueError

SIZE = {"height": 32, "width": 32, "num_frames": 5}
CONSIS_ID = type("ConsisIDPipeline", (d.CogVideoXPipeline,), {})  # diffusers' own needs OpenCV
CONFIG = OmniDiffusionConfig(model="x")


def bare(kind: type) -> Any:
    """A pipeline without parts: what it is told is in its call."""
    pipeline = object.__new__(kind)
    vars(pipeline)["_internal_dict"] = {}
    return pipeline


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        (d.LTX2Pipeline, 24), (d.LTXPipeline, 25), (d.CosmosTextToWorldPipeline, 30), (d.Cosmos3OmniPipeline, 24),
        (d.SkyReelsV2DiffusionForcingPipeline, 24), (d.Cosmos2VideoToWorldPipeline, 16),
        (d.Kandinsky6TI2VAPipeline, 24), (d.Kandinsky6SRPipeline, 24), (d.Kandinsky5T2VPipeline, 24),
        (d.MotifVideoPipeline, 24), (d.HeliosPipeline, 24), (d.LucyEditPipeline, 24), (d.WanAnimatePipeline, 30),
        (d.WanPipeline, 16), (d.HunyuanVideoFramepackPipeline, 30), (d.HunyuanVideoPipeline, 24),
        (d.EasyAnimatePipeline, 8), (CONSIS_ID, 8), (d.AllegroPipeline, 15), (d.MochiPipeline, 30),
        (d.Cosmos2_5_TransferPipeline, 30), (d.Cosmos2_5_PredictBasePipeline, 16), (d.SanaVideoPipeline, 16),
    ],
)  # fmt: skip
def test_a_family_has_the_rate_of_its_call_or_of_diffusers_example(kind: type, rate: float) -> None:
    assert ArgumentBuilder(bare(kind), {}, CONFIG).rates.fps == rate


def test_one_class_of_two_rates_shows_its_checkpoint() -> None:
    newer = cogvideox()
    newer.transformer.register_to_config(patch_size_t=2)
    for pipeline, rate in ((cogvideox(), 8), (newer, 16), (wan(), 16), (wan22_ti2v(), 24)):
        assert ArgumentBuilder(pipeline, {}, CONFIG).rates.fps == rate


def asked(pipeline: Any, params: Params, prompt: dict[str, Any], **defaults: Any) -> tuple[dict[str, Any], float]:
    """The pipeline's arguments, and the rate of the file."""
    builder = ArgumentBuilder(pipeline, defaults, CONFIG)
    request = OmniDiffusionRequest("a", prompt, prompt, params)
    arguments = builder.build(request)
    return arguments, builder.rates.of(request.params.fps, arguments)


def test_the_model_is_told_the_rate_of_its_file() -> None:
    prompt, world = {"prompt": "a"}, bare(d.CosmosTextToWorldPipeline)
    made, rate = asked(world, Params(fps=12), prompt)
    assert made["fps"] == rate == 12
    made, rate = asked(world, Params(), prompt)
    assert "fps" not in made and rate == 30
    made, rate = asked(world, Params(), prompt, fps=10)
    assert made["fps"] == rate == 10
    for params in (Params(frame_rate=50), Params(extra_args={"frame_rate": 50})):
        made, rate = asked(bare(d.LTXPipeline), params, prompt)
        assert made["frame_rate"] == rate == 50
    assert asked(bare(d.LTX2DFRTemporalRefinePipeline), Params(fps=24), prompt)[1] == 48  # the round doubles it
    made, rate = asked(wan(), Params(fps=8), prompt)
    assert "fps" not in made and rate == 8


def test_two_rates_are_refused() -> None:
    for more in ({"frame_rate": 24.0}, {"extra_args": {"frame_rate": 24.0}}):
        with pytest.raises(InvalidValueError, match=r"fps must be the frame_rate, which is 24\.0"):
            asked(bare(d.LTXPipeline), Params(fps=30, **more), {"prompt": "a"})
    for params in (Params(extra_args={"frame_rate": "fast"}), Params(frame_rate=1e9), Params(frame_rate=1e-9)):
        with pytest.raises(InvalidValueError, match="frame_rate must be a number from 1 to 120"):
            asked(bare(d.LTXPipeline), params, {"prompt": "a"})
    with pytest.raises(InvalidValueError, match="fps"):
        Params(fps=float("inf"))


@pytest.mark.slow
def test_a_clip_of_any_rate_is_as_long_as_its_sound() -> None:
    """The tiny vocoder makes a fortieth of the samples, at every rate alike."""
    embeds = torch.randn(1, 8, LTX_TEXT * 2, generator=torch.Generator().manual_seed(0))
    prompt = {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long)}
    common = {"num_inference_steps": 2, "guidance_scale": 1.0, "extra_args": LTX_GUIDANCE, **SIZE, "num_frames": 49}
    with Omni.from_pipe(ltx2()) as omni:
        rates = (None, 12.0, 48.0)
        outputs = omni.generate([prompt] * 3, [Params(seed=0, fps=fps, **common) for fps in rates], use_tqdm=False)
    assert [output.fps for output in outputs] == [24, 12, 48], [output.error for output in outputs]
    seconds = [len(output.videos[0]) / (output.fps or 1) for output in outputs]
    samples = [output.audio[0].shape[-1] for output in outputs]
    per_second = [count / length for count, length in zip(samples, seconds, strict=True)]
    assert per_second == pytest.approx([per_second[0]] * 3, rel=0.02)
