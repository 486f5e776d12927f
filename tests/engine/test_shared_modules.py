"""What a pipeline changes on shared modules for the time of its call: never mixed, and afterwards as before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from families import FAMILIES
from peft import LoraConfig
from pipelines import CURVE, DEFAULTS, count_blocks, embeds, negative, run_latents, save_tiny_flux, tiny_flux
from stepping import add, drain

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import InvalidValueError, RequestAbortedError

FAMILY = {family.name: family for family in FAMILIES}
CACHE = {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


# ------------------------------------------------------------------------------------------- attention processors (PAG)

PAG: list[tuple[str, type, list[str]]] = [
    ("Sana", d.SanaPAGPipeline, ["blocks.1"]),
    ("PixArt-Σ", d.PixArtSigmaPAGPipeline, ["blocks.1"]),
]


class Pag:
    """A PAG pipeline over a tiny family, its plain pictures, and the same requests for the engine."""

    def __init__(self, family: str, pipeline: type, layers: list[str]) -> None:
        self.family = FAMILY[family]
        self.pipe = pipeline(**self.family.build().components, pag_applied_layers=layers)
        self.pipe.set_progress_bar_config(disable=True)
        sizes = ("height", "width")
        self.size = {name: value for name, value in self.family.settings.items() if name in sizes}
        self.rest = {n: v for n, v in self.family.settings.items() if n not in sizes and v is not None}
        self.processors = dict(self.pipe.transformer.attn_processors)

    def plain(self, i: int, steps: int, scale: float) -> torch.Tensor:
        call = dict(num_inference_steps=steps, pag_scale=scale, output_type="latent")
        generator = torch.Generator().manual_seed(i)
        return self.pipe(**self.family.prompt(i), **self.family.settings, **call, generator=generator).images

    def params(self, i: int, steps: int, scale: float, **more: Any) -> Params:
        extra = {"pag_scale": scale, **self.rest}
        return Params(num_inference_steps=steps, seed=i, output_type="latent", extra_args=extra, **self.size, **more)

    def add(self, omni: Omni, i: int, steps: int, scale: float, **more: Any) -> None:
        add(omni, str(i), self.family.prompt(i), self.params(i, steps, scale, **more))

    @property
    def bare(self) -> bool:
        now = self.pipe.transformer.attn_processors
        return all(now[name] is processor for name, processor in self.processors.items())


CASES = [(0, 4, 3.0), (1, 7, 0.0), (3, 5, 3.0), (4, 9, 0.0)]


@pytest.mark.parametrize(("family", "pipeline", "layers"), PAG, ids=[name for name, *_ in PAG])
def test_pag_beside_requests_without(family: str, pipeline: type, layers: list[str]) -> None:
    pag = Pag(family, pipeline, layers)
    plain = [pag.plain(*case) for case in CASES]
    with Omni.from_pipe(pag.pipe, defaults={"negative_prompt": None}) as omni:
        prompts = [pag.family.prompt(i) for i, *_ in CASES]
        outputs = omni.generate(prompts, [pag.params(*case) for case in CASES], use_tqdm=False)
        assert pag.bare
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert distance(output.latents, wanted) < 1e-4
    assert torch.equal(pag.plain(*CASES[1]), plain[1])


@pytest.mark.parametrize("after", range(5))
def test_pag_that_is_aborted_or_fails_leaves_nothing(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pag = Pag(*PAG[0])
    plain = pag.plain(1, 7, 0.0)
    with Omni.from_pipe(pag.pipe, defaults={"negative_prompt": None}) as omni:
        pag.add(omni, 0, 6, 3.0)
        pag.add(omni, 1, 7, 0.0)
        for _ in range(after):
            omni.engine.step()
            assert pag.bare
        omni.engine.abort(["0"])
        assert pag.bare
        outputs = drain(omni, {output.request_id: output for output in omni.engine.collect()})
        assert isinstance(outputs["0"].error, RequestAbortedError)
        assert outputs["1"].ok and distance(outputs["1"].latents, plain) < 1e-4

        own, calls = pag.pipe.transformer.forward, []

        def fails(*args: Any, **kwargs: Any) -> Any:
            calls.append(pag.bare)
            if not pag.bare and calls.count(False) > after // 2:
                raise RuntimeError("out of luck")
            return own(*args, **kwargs)

        monkeypatch.setattr(pag.pipe.transformer, "forward", fails)
        pag.add(omni, 0, 6, 3.0)
        pag.add(omni, 1, 7, 0.0)
        outputs = drain(omni, {})
        assert "out of luck" in str(outputs["0"].error) and pag.bare
        assert outputs["1"].ok and distance(outputs["1"].latents, plain) < 1e-4


def test_processors_set_between_requests_are_for_all_that_follow() -> None:
    pipe = tiny_flux()

    class Halved(type(next(iter(pipe.transformer.attn_processors.values())))):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(value * 0.5 for value in super().__call__(*args, **kwargs))

    params = [Params(num_inference_steps=4 + i, seed=i, output_type="latent") for i in range(3)]
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        omni.generate(embeds(0), params[0], use_tqdm=False)
        block = copy.deepcopy(pipe.transformer.transformer_blocks[1])  # new blocks are looked at as well
        pipe.transformer.transformer_blocks[1] = block
        for one in pipe.transformer.transformer_blocks:
            one.attn.set_processor(Halved())
        plain = [run_latents(pipe, i=i, seed=i, num_inference_steps=4 + i) for i in range(3)]
        forwards = omni.engine.worker.runner.forwards["computed"]
        outputs = omni.generate([embeds(i) for i in range(3)], params, use_tqdm=False)
        assert omni.engine.worker.runner.forwards["computed"] - forwards == 6  # they share them
        assert isinstance(block.attn.processor, Halved)
    for output, wanted in zip(outputs, plain, strict=True):
        assert distance(output.latents, wanted) < 1e-5
    assert distance(plain[0], run_latents(tiny_flux(), num_inference_steps=4)) > 1e-3


# ----------------------------------------------------------------------------------- settings kept on the module itself


class Scaling(d.FluxTransformer2DModel):
    """Its strength is kept on the module, as the attention masks of some models are."""

    strength = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(value * self.strength for value in super().forward(*args, **kwargs))


class Sets(d.FluxPipeline):
    """Sets the module's strength by its guidance scale, and changes it half-way; never sets it back unless it is 1."""

    def __call__(self, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
        if guidance_scale != 1.0:
            self.transformer.strength = guidance_scale
        own = self.scheduler.step

        def step(*given: Any, **named: Any) -> Any:
            if guidance_scale != 1.0 and self.scheduler.step_index == 2:
                self.transformer.strength = 1.0 / guidance_scale
            return own(*given, **named)

        self.scheduler.step = step
        try:
            return super().__call__(guidance_scale=1.0, **kwargs)
        finally:
            del self.scheduler.step


def test_what_a_pipeline_sets_on_the_denoiser_is_there_for_its_own_forwards_alone() -> None:
    pipe = tiny_flux()
    pipe.__class__, pipe.transformer.__class__ = Sets, Scaling
    asked = [(1.0, 6), (0.8, 6), (1.2, 5), (1.0, 7)]
    plain = []
    for i, (scale, steps) in enumerate(asked):
        plain.append(run_latents(pipe, i=i, seed=i, num_inference_steps=steps, guidance_scale=scale))
        vars(pipe.transformer).pop("strength", None)
    before = dict(vars(pipe.transformer))
    params = [
        Params(num_inference_steps=n, seed=i, output_type="latent", guidance_scale=scale)
        for i, (scale, n) in enumerate(asked)
    ]
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        forwards = omni.engine.worker.runner.forwards
        outputs = omni.generate([embeds(i) for i in range(4)], params, use_tqdm=False)
        assert forwards["computed"] == 7 + 6 + 5  # the two that set nothing share theirs
        assert vars(pipe.transformer) == before
        add(omni, "a", embeds(1), params[1])
        for _ in range(4):
            omni.engine.step()
            assert vars(pipe.transformer) == before
        omni.engine.abort(["a"])
        assert vars(pipe.transformer) == before
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert distance(output.latents, wanted) < 1e-5
    assert distance(plain[1], run_latents(tiny_flux(), i=1, seed=1, num_inference_steps=6, guidance_scale=1.0)) > 0.01


def test_what_a_preview_sets_is_gone_after_it() -> None:
    """It is a second run of the same pipeline, which sets the same again."""
    pipe = tiny_flux()
    pipe.__class__, pipe.transformer.__class__ = Sets, Scaling
    before = dict(vars(pipe.transformer))
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        add(omni, "a", embeds(1), Params(num_inference_steps=6, seed=1, guidance_scale=0.8, preview_every=2))
        previews = 0
        while omni.engine.has_unfinished_requests():
            omni.engine.step()
            previews += sum(len(output.images) for output in omni.engine.progress(previews_only=True))
            assert vars(pipe.transformer) == before
    assert previews == 2


# ----------------------------------------------------------------------------------------------------------------- LoRA


def with_adapters(seed: int = 0) -> Any:
    pipe = tiny_flux()
    torch.manual_seed(seed)
    for name in ("ink", "clay"):
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
        pipe.transformer.add_adapter(config, adapter_name=name)
    pipe.transformer.set_adapters(["ink"], [0.7])
    return pipe


def scalings(pipe: Any) -> list[dict[str, float]]:
    return [dict(module.scaling) for module in pipe.transformer.modules() if hasattr(module, "scaling")]


def test_scales_of_requests_are_never_mixed_and_leave_nothing() -> None:
    pipe = with_adapters()
    before = scalings(pipe)
    scales: list[float | None] = [None, 0.5, 2.0, 0.5, 0.0]
    kwargs = [{} if scale is None else {"joint_attention_kwargs": {"scale": scale}} for scale in scales]
    plain = [
        run_latents(with_adapters(), i=i, seed=i, num_inference_steps=4, **given) for i, given in enumerate(kwargs)
    ]
    params = [
        Params(num_inference_steps=4, seed=i, output_type="latent", extra_args=given) for i, given in enumerate(kwargs)
    ]
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        outputs = omni.generate([embeds(i) for i in range(5)], params, use_tqdm=False)
        assert scalings(pipe) == before
        block = pipe.transformer.transformer_blocks[1]
        handle = block.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
        failed = omni.generate(embeds(0), params[4], use_tqdm=False)[0]
        handle.remove()
        assert "out of luck" in str(failed.error) and scalings(pipe) == before
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert distance(output.latents, wanted) < 1e-5
    assert distance(plain[1], run_latents(with_adapters(), i=1, seed=1, num_inference_steps=4)) > 1e-3


def test_text_encoders_with_adapters_are_scaled_for_one_request_alone(tmp_path: Path) -> None:
    save_tiny_flux(tmp_path)
    scales = [0.5, 2.0, 0.0, 0.5]

    def make() -> Any:
        pipe = d.FluxPipeline.from_pretrained(tmp_path, image_encoder=None, feature_extractor=None)
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=400, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        pipe.text_encoder.add_adapter(config, adapter_name="ink")
        return pipe

    given = {"num_inference_steps": 3, "output_type": "latent", "max_sequence_length": 32}
    params, plain = [], []
    for i, scale in enumerate(scales):
        more = {"joint_attention_kwargs": {"scale": scale}}
        params.append(Params(**given, seed=i, extra_args=more))
        generator = torch.Generator().manual_seed(i)
        plain.append(make()(prompt="red apple", generator=generator, **given, **more, **DEFAULTS).images)
    with Omni.from_pipe(pipe := make(), defaults=DEFAULTS) as omni:
        outputs = omni.generate(["red apple"] * len(scales), params, use_tqdm=False)
    layers = [module for module in pipe.text_encoder.modules() if hasattr(module, "scaling")]
    assert layers and all(layer.scaling == {"ink": 100.0} for layer in layers)
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert distance(output.latents, wanted) < 1e-5


# ------------------------------------------------------------------------------------ modules that are not as they were


class Derived(d.FluxTransformer2DModel):
    pass


def compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def derived(pipe: Any) -> None:
    pipe.transformer.__class__ = Derived


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("change", [compiled, derived], ids=lambda change: change.__name__)
@pytest.mark.parametrize("cache", [{}, CACHE], ids=["uncached", "cached"])
def test_wrapped_and_derived_denoisers(change: Callable[[Any], None], cache: dict[str, Any]) -> None:
    counts = [6, 8]
    plain = [run_latents(tiny_flux(), i=i, seed=i, num_inference_steps=n) for i, n in enumerate(counts)]
    with fresh_compiler():
        pipe = tiny_flux()
        change(pipe)
        with Omni.from_pipe(pipe, defaults=DEFAULTS, **cache) as omni:
            params = [Params(num_inference_steps=n, seed=i, output_type="latent") for i, n in enumerate(counts)]
            outputs = omni.generate([embeds(i) for i in range(2)], params, use_tqdm=False)
            assert sum(omni.engine.worker.runner.forwards.values()) < sum(counts)  # they share forwards
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert bool(output.skipped_steps) == bool(cache)
        assert distance(output.latents, wanted) < (0.1 if cache else 1e-5)


def test_a_replaced_denoiser_needs_a_new_engine() -> None:
    pipe = tiny_flux()
    params = Params(num_inference_steps=3, seed=0, output_type="latent")
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **CACHE) as omni:
        own, pipe.transformer = pipe.transformer, tiny_flux(seed=1).transformer
        refused = omni.generate(embeds(0), params, use_tqdm=False)[0]
        assert isinstance(refused.error, InvalidValueError) and "make a new engine" in str(refused.error)
        pipe.transformer = own
        assert omni.generate(embeds(0), params, use_tqdm=False)[0].ok


def test_replaced_blocks_are_followed() -> None:
    pipe, other = tiny_flux(), tiny_flux(seed=1)
    params = Params(num_inference_steps=10, seed=0, output_type="latent")
    with Omni.from_pipe(pipe, defaults=DEFAULTS, **CACHE) as omni:
        first = omni.generate(embeds(0), params, use_tqdm=False)[0]
        pipe.transformer.transformer_blocks[0] = other.transformer.transformer_blocks[0]
        pipe.transformer.single_transformer_blocks = other.transformer.single_transformer_blocks
        blocks = count_blocks(pipe)
        second = omni.generate(embeds(0), params, use_tqdm=False)[0]
        assert blocks.count == second.computed_steps == first.computed_steps < 10
        assert distance(second.latents, run_latents(pipe, num_inference_steps=10)) < 0.1
        assert distance(second.latents, first.latents) > 0.01


def test_two_engines_over_one_pipeline() -> None:
    pipe = tiny_flux()
    params = Params(num_inference_steps=10, seed=0, output_type="latent", true_cfg_scale=3.0)
    one, other = (Omni.from_pipe(pipe, defaults=DEFAULTS, **CACHE) for _ in range(2))
    prompt = embeds(0) | negative(0)
    first = one.generate(prompt, params, use_tqdm=False)[0]
    second = other.generate(prompt, params, use_tqdm=False)[0]
    one.close()
    third = other.generate(prompt, params, use_tqdm=False)[0]
    other.close()
    assert first.ok and second.ok and third.ok and first.skipped_steps > 0
    assert torch.equal(first.latents, second.latents) and torch.equal(first.latents, third.latents)
