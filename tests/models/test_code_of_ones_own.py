"""A described class that runs code of one's own is examined like any other; what is found holds for that code alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import trap_models as traps
from closeness import assert_close
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from pipelines import DEFAULTS, embeds, run_latents, tiny_flux

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.known import Denoiser, _file_of

STEPS = 6
MASK = [1, 1, 0, 1, 0, 1]


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path / "profiles"))


class ReadsEarly(FluxTransformer2DModel):
    """Leaves out its last two blocks, and adds to the output what the first one has made."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        blocks, seen = self.single_transformer_blocks, []
        hook = self.transformer_blocks[0].register_forward_hook(lambda *given: seen.append(given[-1][1]))
        self.single_transformer_blocks = blocks[:1]
        try:
            (output,) = super().forward(hidden_states, **kwargs | {"return_dict": False})
        finally:
            self.single_transformer_blocks = blocks
            hook.remove()
        return (output + self.proj_out(seen[-1]),) if seen else (output,)


class Doubles(FluxAttnProcessor):
    """Attention whose result is twice as large."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        return tuple(2 * one for one in made) if isinstance(made, tuple) else 2 * made


class Halves(Doubles): ...


def changed(kind: type | None = None, processor: type | None = None) -> Any:
    pipe = tiny_flux()
    if kind is not None:
        pipe.transformer.__class__ = kind
    if processor is not None:
        pipe.transformer.transformer_blocks[0].attn.set_processor(processor())
    return pipe


def wrapped(pipe: Any) -> Any:
    """A forward that says it is another."""
    own = pipe.transformer.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    pipe.transformer.forward = forward
    return pipe


def test_what_runs_diffusers_own_code_is_as_described() -> None:
    assert Denoiser(tiny_flux().transformer).facts()["known"] == "described"
    hooked = tiny_flux()
    backend = MagCacheBackend(DiffusionCacheConfig(steps_mask=MASK))
    backend.enable(hooked)  # our own hook, by diffusers' registry
    assert Denoiser(hooked.transformer).facts()["known"] == "described"
    compiled = torch.compile(tiny_flux().transformer, backend="eager")
    assert Denoiser(compiled).facts()["known"] == "described"


@pytest.mark.parametrize(
    ("pipe", "cached"),
    [
        (lambda: changed(ReadsEarly), False),
        (lambda: changed(processor=Doubles), True),
        (lambda: wrapped(tiny_flux()), True),
    ],
    ids=["a forward that reads an early block", "a processor", "a wrapped forward"],
)
def test_code_of_ones_own_is_examined(pipe: Any, cached: bool) -> None:
    made = pipe()
    plain = [run_latents(made, i, seed=i, num_inference_steps=STEPS) for i in range(2)]
    with Omni.from_pipe(made, cache_backend="magcache", cache_config={"steps_mask": MASK}, defaults=DEFAULTS) as omni:
        params = [Params(num_inference_steps=STEPS, seed=i, output_type="latent", cache="off") for i in range(2)]
        for output, wanted in zip(omni.generate([embeds(0), embeds(1)], params, use_tqdm=False), plain, strict=True):
            assert output.ok, output.error
            assert_close(output.latents, wanted)
        (known,) = [denoiser.facts() for denoiser in omni.engine.worker.runner.denoisers.values()]
        (output,) = omni.generate([embeds(0)], Params(num_inference_steps=STEPS, seed=0), use_tqdm=False)
        assert output.skipped_steps == (2 if cached else 0)
        (known,) = [denoiser.facts() for denoiser in omni.engine.worker.runner.denoisers.values()]
    assert (known["known"], known["cached"]) == ("found", cached), known


def test_a_finding_holds_for_the_processor_that_it_was_made_with() -> None:
    kinds = [None, Doubles, Halves]
    files = [_file_of(changed(processor=kind).transformer) for kind in kinds]
    assert len({*files}) == 3 and None not in files
    assert files[1] == _file_of(changed(processor=Doubles).transformer)
    assert _file_of(wrapped(tiny_flux()).transformer) not in files


class Controlled(traps.Plain):
    """Takes what a ControlNet makes anew for each step."""

    def forward(self, noisy: torch.Tensor, when: torch.Tensor, controlnet_samples: Any = None) -> torch.Tensor:
        x, emb = self.begin(noisy, when)
        for block in self.trunk:
            x = block(x, emb)
            x = x if controlnet_samples is None else x + controlnet_samples
        return self.head(x)


def test_a_call_with_a_controlnets_samples_computes() -> None:
    model = traps.made(Controlled)
    denoiser = Denoiser(model)
    plain = traps.call_of()
    controlled = plain | {"controlnet_samples": torch.ones(1, 6, traps.WIDTH)}
    for call in (plain, controlled):
        denoiser.learn(call, lambda given: model(**given))
    assert denoiser.stack_for(plain) is not None
    assert denoiser.stack_for(controlled) is None
