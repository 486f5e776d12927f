"""Both calls of a guided step in one forward: the same results, half of the forwards, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import patching
import pytest
import torch
from closeness import assert_close
from families import FAMILIES, Family
from gating import GATES, asked
from lanes import lane, one_of_a_kind
from pipelines import CURVE, DEFAULTS, Blocks, embeds, negative, tiny_flux
from serving import MASK, drawn_alike, flat, made
from stepping import add, drain
from two_calls import two_calls

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import RequestAbortedError

NEAR = 84  # roundings: 1e-5 of the largest number
TWO_CALLS = [f for f in FAMILIES if f.name in {
    "FLUX.1", "Qwen-Image", "Wan 2.1", "Chroma", "HunyuanVideo", "CogView4", "FLUX.1 Kontext", "FLUX.2 klein",
    "Qwen-Image-Edit", "Qwen-Image-Edit-Plus", "Lumina 2", "Kandinsky 5 image", "Kandinsky 5 video", "Wan 2.1 I2V",
    "Wan 2.2 (two experts)", "Wan 2.2 TI2V", "HunyuanVideo-1.5", "FLUX.1 ControlNet",
}]  # fmt: skip
STEPS = len(MASK)
GUIDED = {"true_cfg_scale": 3.0}


def near(got: Any, wanted: Any, roundings: float = NEAR) -> None:
    assert_close(flat(got).float(), flat(wanted).float(), roundings=roundings)


def both(
    build: Callable[[], Any], generate: Callable[[Omni], list[Any]], **engine: Any
) -> tuple[list[Any], dict[str, int], list[Any], dict[str, int]]:
    """What comes out call by call, and joined; with the forwards of each."""
    results: list[Any] = []
    for joins in (False, True):
        with Omni.from_pipe(build(), join_guidance=joins, **engine) as omni, drawn_alike():
            results += [generate(omni), dict(omni.engine.worker.runner.forwards)]
            assert omni.engine.worker.cache_bytes == 0
    return tuple(results)  # type: ignore[return-value]


def same(apart: list[Any], joined: list[Any], roundings: float = NEAR) -> None:
    for one, other in zip(apart, joined, strict=True):
        near(made(other), made(one), roundings)
        assert (one.computed_steps, one.skipped_steps) == (other.computed_steps, other.skipped_steps)
        assert one.plan == other.plan


@pytest.mark.parametrize("family", lane(TWO_CALLS, one_of_a_kind), ids=lambda f: f.name)
def test_a_family_is_the_same_in_half_the_forwards(family: Family) -> None:
    def generate(omni: Omni) -> list[Any]:
        params = Params(num_inference_steps=STEPS, seed=0, output_type="latent", **family.guided(3.0))
        return omni.generate(family.prompt(0), params, use_tqdm=False)

    engine = {"cache_backend": "magcache", "cache_config": {"steps_mask": MASK}, "defaults": family.settings}
    apart, counts, joined, fewer = both(family.build, generate, **engine)
    same(apart, joined, max(NEAR, family.roundings))
    if family.steps_aside:  # its calls fit no other
        assert counts == fewer == {"computed": 2 * STEPS, "skipped": 0}
        return
    experts = 2 if "experts" in family.name else 1
    assert counts == {"computed": 2 * sum(MASK), "skipped": 2 * (STEPS - sum(MASK))}
    # the first step of each expert shows how many calls a step has
    assert fewer == {"computed": sum(MASK) + experts, "skipped": STEPS - sum(MASK)}


def test_every_family_with_two_calls_is_in_the_list() -> None:
    """By counting; those that were left out make one call per step."""
    for family in FAMILIES if any(f not in TWO_CALLS for f in FAMILIES) else ():
        if family in TWO_CALLS:
            continue
        pipeline = family.build()
        blocks = Blocks(pipeline)
        with drawn_alike():
            pipeline(
                **{**family.settings, **family.prompt(0), **family.guided(3.0)},
                num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        assert blocks.count == 3, family.name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("FLUX.1", "Wan 2.1")], ids=lambda f: f.name)
def test_a_mixed_batch_is_the_same(family: Family) -> None:
    """Guided and not, other steps, other caches, an abort: all at once."""
    caches: list[Any] = ["off", {"steps_mask": MASK}, {"backend": "easycache", "rel_l1_thresh": 0.3}, {"nfe": 4}, "off"]

    def generate(omni: Omni) -> list[Any]:
        for i, cache in enumerate(caches):
            scale = 1.0 if i == 1 else 2.0 + i
            params = Params(
                num_inference_steps=6 + i % 3, seed=i, output_type="latent", cache=cache, **family.guided(scale)
            )
            add(omni, str(i), family.prompt(i), params)
        ended: dict[str, Any] = {}
        for _ in range(9):
            ended |= {output.request_id: output for output in omni.engine.step()}
        omni.engine.abort(["4"])
        drain(omni, ended)
        assert isinstance(ended.pop("4").error, RequestAbortedError)
        return [ended[str(i)] for i in range(4)]

    engine = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}, "defaults": family.settings}
    apart, counts, joined, fewer = both(family.build, generate, **engine)
    same(apart, joined)
    assert sum(fewer.values()) < sum(counts.values())


@pytest.mark.parametrize("gate", GATES)
def test_gates_decide_the_same(gate: str) -> None:
    def generate(omni: Omni) -> list[Any]:
        prompts = [{**embeds(i), **negative(i)} for i in range(3)]
        params = [
            Params(num_inference_steps=10 + i, seed=i, output_type="latent", cache=asked(gate), **GUIDED)
            for i in range(3)
        ]
        return omni.generate(prompts, params, use_tqdm=False)

    apart, counts, joined, fewer = both(tiny_flux, generate, defaults=DEFAULTS)
    same(apart, joined)
    assert any(output.skipped_steps for output in joined)
    assert fewer["computed"] < counts["computed"]


# ------------------------------------------------------------------------------------------- what comes between


def calls_of(way: str) -> tuple[dict[str, int], dict[str, int], str]:
    """The forwards of two requests one after another, call by call and joined."""

    def generate(omni: Omni) -> list[Any]:
        prompt = {**embeds(0), **negative(0)}
        params = [Params(num_inference_steps=8, seed=i, output_type="latent", extra_args={"way": way}) for i in (1, 2)]
        return [omni.generate(prompt, one, use_tqdm=False)[0] for one in params]

    apart, counts, joined, fewer = both(two_calls, generate)
    same(apart, joined)
    return counts, fewer, ""


@pytest.mark.parametrize("way", ["plain", "dict", "views"])
def test_who_takes_views_is_joined(way: str) -> None:
    counts, fewer, _ = calls_of(way)
    assert counts["computed"] == 32 and fewer["computed"] == 18


@pytest.mark.parametrize("way", ["reads", "picks", "passes on"])
def test_who_needs_the_first_result_gets_it(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """At once, and it is told once: the next request is not even tried."""
    with caplog.at_level("INFO", "vllm_omni"):
        counts, fewer, _ = calls_of(way)
    assert counts == fewer and counts["computed"] == 32
    assert caplog.text.count("is made call by call") == 1


def test_a_buffer_that_is_used_again_keeps_its_first_content() -> None:
    counts, fewer, _ = calls_of("one buffer")
    assert counts == fewer


def test_a_buffer_is_looked_for_also_where_guidance_begins_late() -> None:
    counts, fewer, _ = calls_of("late, one buffer")
    assert counts == fewer


def test_what_is_changed_for_the_second_call_is_not_there_for_the_first_or_for_neighbours() -> None:
    ways = ("changes between", "plain", "plain")

    def generate(omni: Omni) -> list[Any]:
        params = [Params(num_inference_steps=8, seed=i, extra_args={"way": way}) for i, way in enumerate(ways)]
        return omni.generate([{**embeds(0), **negative(0)}] * 3, params, use_tqdm=False)

    apart, _, joined, _ = both(two_calls, generate)
    same(apart, joined)
    plain = generate(Omni.from_pipe(two_calls()))
    near(made(joined[1]), made(plain[1]))


def test_a_scheduler_that_somebody_has_patched_keeps_to_its_request_while_results_are_awaited() -> None:
    """A step that takes a promised result must not wait for it while the shared original has its state."""

    def build() -> Any:
        pipe = two_calls()
        patching.closure(pipe)
        return pipe

    def generate(omni: Omni) -> list[Any]:
        params = [Params(num_inference_steps=n, seed=n, extra_args={"way": "stops"}) for n in (8, 10, 9)]
        return omni.generate([{**embeds(0), **negative(0)}] * 3, params, use_tqdm=False)

    apart, counts, joined, fewer = both(build, generate)
    same(apart, joined)
    assert sum(fewer.values()) < sum(counts.values())


def test_guidance_may_stop() -> None:
    counts, fewer, _ = calls_of("stops")
    assert counts["computed"] == 24 and fewer["computed"] == 2 * (2 + 3 + 4)


def test_a_pipeline_that_fails_ends_with_its_error() -> None:
    with Omni.from_pipe(two_calls()) as omni:
        params = Params(num_inference_steps=4, seed=0, output_type="latent", extra_args={"way": "raises"})
        (output,) = omni.generate({**embeds(0), **negative(0)}, params, use_tqdm=False)
        assert isinstance(output.error, ValueError) and "at the end" in str(output.error)


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.fixture
def omni() -> Iterator[Omni]:
    config = {"mag_ratios": CURVE}
    with Omni.from_pipe(tiny_flux(), defaults=DEFAULTS, cache_backend="magcache", cache_config=config) as engine:
        yield engine


def guided(omni: Omni, seeds: tuple[int, ...], **more: Any) -> list[Any]:
    params = [Params(num_inference_steps=8, seed=s, output_type="latent", **GUIDED, **more) for s in seeds]
    return omni.generate([{**embeds(s), **negative(s)} for s in seeds], params, use_tqdm=False)


class Limit:
    """No room for more than `rows` at a time."""

    def __init__(self, module: torch.nn.Module, rows: int, error: Exception) -> None:
        self.rows, self.error, self.met = rows, error, 0
        module.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if len(kwargs["hidden_states"]) > self.rows:
            self.met += 1
            raise self.error


@pytest.mark.parametrize("cache", ["off", {"nfe": 4}])
def test_without_room_for_two_rows_the_calls_are_made_one_by_one(omni: Omni, cache: Any) -> None:
    wanted = guided(omni, (1, 2), cache=cache)
    limit = Limit(omni.engine.worker.pipeline.transformer, 1, torch.OutOfMemoryError("no room"))
    got = guided(omni, (1, 2), cache=cache)
    same(wanted, got)
    met = limit.met
    same(wanted, guided(omni, (1, 2), cache=cache))
    assert met > 0 and limit.met == met  # what helped is remembered


def test_a_joint_failure_is_made_again_call_by_call(omni: Omni) -> None:
    wanted = guided(omni, (1, 2))
    Limit(omni.engine.worker.pipeline.transformer, 1, RuntimeError("two are too many"))
    same(wanted, guided(omni, (1, 2)))


def test_an_abort_between_the_calls_leaves_nothing(omni: Omni) -> None:
    params = Params(num_inference_steps=8, seed=0, output_type="latent", cache={"nfe": 4}, **GUIDED)
    for steps in range(7):
        add(omni, "a", {**embeds(0), **negative(0)}, params)
        for _ in range(steps):
            omni.engine.step()
        omni.engine.abort(["a"])
        (output,) = omni.engine.collect()
        assert isinstance(output.error, RequestAbortedError)
        assert omni.engine.worker.cache_bytes == 0 and not omni.engine.has_unfinished_requests()


def test_previews_come_of_guided_steps(omni: Omni) -> None:
    params = Params(num_inference_steps=8, seed=0, output_type="pil", preview_every=2, **GUIDED)
    add(omni, "a", {**embeds(0), **negative(0)}, params)
    pictures = 0
    while omni.engine.has_unfinished_requests():
        omni.engine.step()
        pictures += sum(len(output.images) for output in omni.engine.progress(previews_only=True))
    assert pictures == 3
