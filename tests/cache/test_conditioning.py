"""What skipped steps need not embed again: the same bits, one request's own, forgotten before weights can change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from peft import LoraConfig

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoisers import DENOISERS
from vllm_omni.diffusion.hooks.conditioning import Conditioning

MASK = [1, 1, 0, 0, 0, 1]  # four forwards compute at most, three skip in a row
CACHE = {"steps_mask": MASK, "predictor": "linear"}


DESCRIBED = [
    next(family for family in FAMILIES if family.name == name)
    for name in ("FLUX.1", "FLUX.2", "Qwen-Image", "Stable Diffusion 3", "CogView4")
]


def named(name: str) -> Family:
    return next(family for family in DESCRIBED if family.name == name)


def test_every_described_class_is_tested() -> None:
    tested = {type(family.build().transformer).__name__ for family in DESCRIBED}
    assert tested == {name for name, spec in DENOISERS.items() if spec.conditioning}


def latents(family: Family, pipeline: Any, i: int = 0, **more: Any) -> torch.Tensor:
    arguments = {**family.settings, **family.prompt(i), **family.guided(2.0 + i), "num_inference_steps": len(MASK)}
    arguments |= more
    output = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(i), output_type="latent")
    return next(iter(output.values())).clone()


class Calls:
    """Calls of each child of the embedding modules."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.counts: dict[str, int] = {}
        for part in DENOISERS[type(transformer).__name__].conditioning:
            for name, child in transformer.get_submodule(part).named_children():
                child.register_forward_hook(lambda *_, name=name: self._note(name))

    def _note(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, int]:
        taken, self.counts = self.counts, {}
        return taken


@pytest.mark.parametrize("family", DESCRIBED, ids=lambda f: f.name)
@pytest.mark.parametrize("engine", [False, True], ids=["standalone", "engine"])
def test_fewer_calls_and_the_same_bits(family: Family, engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = family.build()
    calls = Calls(pipeline.transformer)
    if engine:
        omni = Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=CACHE, defaults=family.settings)
        params = Params(num_inference_steps=len(MASK), seed=0, output_type="latent", **family.guided(2.0))

        def run() -> torch.Tensor:
            output = omni.generate(family.prompt(0), params, use_tqdm=False)[0]
            assert output.error is None and output.skipped_steps == MASK.count(0)
            return output.latents
    else:
        MagCacheBackend(DiffusionCacheConfig(**CACHE)).enable(pipeline)

        def run() -> torch.Tensor:
            return latents(family, pipeline)

    run()
    calls.take()
    remembered, with_memory = run(), calls.take()
    monkeypatch.setattr(Conditioning, "enter", lambda self, memory: None)
    always, without = run(), calls.take()
    assert torch.equal(remembered, always)
    assert all(with_memory[name] <= without[name] for name in without)
    assert sum(with_memory.values()) < sum(without.values())


def test_flux_embeds_guidance_and_text_once_for_all_skips() -> None:
    """Two branches: the step and the guidance are theirs in common, the text is not."""
    family = named("FLUX.1")
    pipeline = family.build()
    calls = Calls(pipeline.transformer)
    MagCacheBackend(DiffusionCacheConfig(**CACHE)).enable(pipeline)
    latents(family, pipeline)
    computed, skipped = 2 * MASK.count(1), MASK.count(0)
    assert calls.take() == {
        "time_proj": 2 * computed + skipped + 1,
        "timestep_embedder": computed + skipped,
        "guidance_embedder": computed + 1,
        "text_embedder": computed + 2,
    }
    latents(family, pipeline, 1)  # another prompt; of the same timesteps, the first is looked at again
    assert calls.take() == {
        "time_proj": 2 * computed + 1,
        "timestep_embedder": computed + 1,
        "guidance_embedder": computed + 1,
        "text_embedder": computed + 2,
    }


def test_two_branches_embed_a_step_once() -> None:
    family = named("CogView4")
    pipeline = family.build()
    calls = Calls(pipeline.transformer)
    MagCacheBackend(DiffusionCacheConfig(**CACHE)).enable(pipeline)
    latents(family, pipeline)
    counts = calls.take()
    assert counts["timestep_embedder"] == 2 * MASK.count(1) + MASK.count(0)
    assert counts["condition_embedder"] == 2 * MASK.count(1) + 1


def test_on_a_device_nothing_is_read_or_remembered() -> None:
    """The meta device has no values: reading one raises."""
    embedding = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))
    holder = torch.nn.ModuleDict({"embedding": embedding})
    conditioning, memory = Conditioning(holder, ("embedding",)), {}
    x = torch.zeros(1, 4, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        x.tolist()
    calls = 0

    def note(*_: Any) -> None:
        nonlocal calls
        calls += 1

    embedding[0].register_forward_hook(note)
    with torch.no_grad():
        for _ in range(2):
            conditioning.enter(memory)
            assert holder["embedding"](x).shape == (1, 4)
            conditioning.leave()
    assert calls == 2 and memory == {"embedding.0": {}}


@pytest.mark.parametrize("name", ["FLUX.1", "CogView4"])
def test_weights_that_change_between_requests_are_seen(name: str) -> None:
    """As fusing an adapter does it: in place, behind autograd's back."""
    family = named(name)
    pipeline, fresh = family.build(), family.build()
    for pipe in (pipeline, fresh):
        MagCacheBackend(DiffusionCacheConfig(**CACHE)).enable(pipe)
    before = latents(family, pipeline)
    for pipe in (pipeline, fresh):
        for part in DENOISERS[type(pipe.transformer).__name__].conditioning:
            for weight in pipe.transformer.get_submodule(part).parameters():
                weight.data.mul_(1.5)
    after = latents(family, pipeline)
    assert torch.equal(after, latents(family, fresh)) and not torch.allclose(after, before, atol=1e-4)


def test_an_adapter_on_the_embedding_has_its_scale_in_skipped_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    family = named("FLUX.1")
    pipeline = family.build()
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["linear_1", "linear_2"])
    pipeline.transformer.add_adapter(config)
    MagCacheBackend(DiffusionCacheConfig(**CACHE)).enable(pipeline)
    half, full = [latents(family, pipeline, joint_attention_kwargs={"scale": scale}) for scale in (0.5, 1.0)]
    assert not torch.allclose(half, full, atol=1e-4)
    monkeypatch.setattr(Conditioning, "enter", lambda self, memory: None)
    for scale, remembered in ((0.5, half), (1.0, full)):
        assert torch.equal(latents(family, pipeline, joint_attention_kwargs={"scale": scale}), remembered)


@pytest.mark.parametrize("name", ["FLUX.1", "CogView4"])
def test_requests_that_take_turns_stay_apart(name: str) -> None:
    """Of different lengths, prompts and guidance, so that most skips are of one request alone."""
    family = named(name)
    pipeline = family.build()
    omni = Omni.from_pipe(pipeline, cache_backend="magcache", cache_config=CACHE, defaults=family.settings)
    params = [
        Params(num_inference_steps=steps, seed=i, output_type="latent", **family.guided(1.5 + 2 * i))
        for i, steps in enumerate((6, 9, 13))
    ]
    prompts = [family.prompt(i) for i in range(len(params))]
    alone = [omni.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
    for one, mixed in zip(alone, omni.generate(prompts, params, use_tqdm=False), strict=True):
        assert one.error is None and mixed.error is None
        assert one.skipped_steps == mixed.skipped_steps > 0
        assert (one.latents - mixed.latents).abs().max() < 1e-5


def test_an_error_in_a_skipped_step_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    family = named("FLUX.1")
    pipeline = family.build()
    plain = latents(family, pipeline)
    own = dict(pipeline.transformer.time_text_embed.named_children())
    backend = MagCacheBackend(DiffusionCacheConfig(**CACHE))
    backend.enable(pipeline)
    monkeypatch.setattr(pipeline.transformer.norm_out, "forward", _fail_in_a_skip(pipeline.transformer))
    with pytest.raises(RuntimeError, match="in a skipped step"):
        latents(family, pipeline)
    monkeypatch.undo()
    backend.disable(pipeline)
    assert dict(pipeline.transformer.time_text_embed.named_children()) == own
    assert torch.equal(latents(family, pipeline), plain)


def _fail_in_a_skip(transformer: Any) -> Any:
    forward = transformer.norm_out.forward

    def failing(*args: Any) -> Any:
        if len(transformer.single_transformer_blocks) == 0:
            raise RuntimeError("in a skipped step")
        return forward(*args)

    return failing
