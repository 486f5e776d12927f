"""A turn of the loop that would last too long is shared by fewer requests, in the order in which they came."""

from __future__ import annotations

from closeness import assert_close
from pipelines import embeds

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import normalise_prompt

STEPS = 6


def asked(side: int, i: int) -> Params:
    return Params(num_inference_steps=STEPS, seed=i, height=side, width=side, output_type="latent", cache="off")


def test_requests_that_have_no_time_together_run_in_turn(tiny: Omni) -> None:
    runner = tiny.engine.worker.runner
    free = tiny.generate([embeds(i) for i in range(4)], [asked(32, i) for i in range(4)], use_tqdm=False)
    assert runner.forwards["computed"] == STEPS
    (work,) = [work for work in runner.room._sizes if work.elements]
    each = runner.room._sizes[work].each_s
    assert each is not None
    runner.room.longest_s, runner.room.lasted = 2.5 * each, lambda *measured: None
    cut = tiny.generate([embeds(i) for i in range(4)], [asked(32, i) for i in range(4)], use_tqdm=False)
    assert runner.forwards["computed"] == 3 * STEPS
    for one, other in zip(free, cut, strict=True):
        assert one.error is None and other.error is None
        assert_close(other.latents, one.latents)


def test_those_who_came_first_end_first_and_another_size_is_not_kept_waiting(tiny: Omni) -> None:
    engine = tiny.engine
    engine.worker.runner.room.longest_s = 1e-9
    sizes = {"a0": 32, "a1": 32, "a2": 32, "b0": 64}
    for i, (name, side) in enumerate(sizes.items()):
        engine.add_request(OmniDiffusionRequest(name, embeds(i), normalise_prompt(embeds(i)), asked(side, i)))
    ended = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            ended.append(output.request_id)
    assert [name for name in ended if name.startswith("a")] == ["a0", "a1", "a2"]
    assert ended.index("b0") <= 2  # it took turns with the others' first
