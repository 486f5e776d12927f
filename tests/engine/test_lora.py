"""LoRA per request: adapters by registered name, different ones in one batch, with the cache. Real PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_text_adapter
from closeness import assert_close, assert_differs
from diffusers import DiffusionPipeline
from errors_raised import assert_matches
from paths import DEMO
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from pipelines import CURVE, DEFAULTS, count_blocks, embeds, run_latents, tiny_flux
from stepping import add, drain

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.profile import fingerprint
from vllm_omni.diffusion.scheduler import StepKind
from vllm_omni.errors import InvalidValueError, ModelLoadError

TARGETS = ["to_q", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters in the format that diffusers saves, with weights large enough to see."""
    folder, modules = tmp_path_factory.mktemp("lora"), {}
    for seed, name in enumerate(("ink", "clay")):
        pipeline = tiny_flux()
        torch.manual_seed(seed)
        pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=TARGETS))
        pipeline.save_lora_weights(
            folder / name, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer)
        )
        modules[name] = str(folder / name)
    return modules


def engine(adapters: dict[str, str], **more: Any) -> Omni:
    return Omni.from_pipe(
        tiny_flux(),
        defaults=DEFAULTS,
        cache_backend="magcache",
        cache_config={"mag_ratios": CURVE},
        lora_modules=adapters,
        **more,
    )


def reference(adapters: dict[str, str], names: list[str], scales: list[float], **call: Any) -> torch.Tensor:
    """Plain diffusers with the adapters set as its users set them."""
    pipeline = tiny_flux()
    for name in names:
        pipeline.load_lora_weights(adapters[name], adapter_name=name)
    if names:
        pipeline.set_adapters(names, scales)
    return run_latents(pipeline, **call)


def test_each_request_of_a_batch_uses_its_own_adapters(adapters: dict[str, str]) -> None:
    asked: list[Any] = ["ink", {"name": "clay", "scale": 0.5}, ["ink", {"name": "clay", "scale": 0.5}], None, "ink"]
    expected = [(["ink"], [1.0]), (["clay"], [0.5]), (["ink", "clay"], [1.0, 0.5]), ([], []), (["ink"], [1.0])]
    parameters = [
        Params(num_inference_steps=4 + i, seed=i, output_type="latent", lora_request=lora, cache="off")
        for i, lora in enumerate(asked)
    ]
    with engine(adapters) as omni:
        outputs = omni.generate([embeds(i) for i in range(5)], parameters, use_tqdm=False)
    plain = [reference(adapters, [], [], i=i, seed=i, num_inference_steps=4 + i) for i in range(5)]
    for i, output in enumerate(outputs):
        assert output.ok, output.error
        wanted = reference(adapters, *expected[i], i=i, seed=i, num_inference_steps=4 + i)
        assert_close(output.latents, wanted)
        compare = assert_differs if expected[i][0] else assert_close
        compare(output.latents, plain[i], f"request {i} and the bare model")


def test_cached_requests_with_different_adapters_stay_apart(adapters: dict[str, str]) -> None:
    """The same prompt and seed with and without the adapter, in one engine, each as it is alone."""
    asked = ["ink", None, "clay"]
    parameters = [Params(num_inference_steps=10, seed=0, output_type="latent", lora_request=lora) for lora in asked]
    with engine(adapters) as omni:
        counter = count_blocks(omni.engine.worker.pipeline)
        together = omni.generate([embeds(0)] * 3, parameters, use_tqdm=False)
        assert counter.count == sum(output.computed_steps for output in together)  # never in one forward
        alone = [omni.generate(embeds(0), p, use_tqdm=False)[0] for p in parameters]
        assert omni.engine.worker.cache_bytes == 0
    for one, other in zip(together, alone, strict=True):
        assert one.skipped_steps == other.skipped_steps > 0
        assert_close(one.latents, other.latents)
    assert_differs(together[0].latents, together[1].latents)


def test_adapters_that_are_switched_for_a_skipped_step_are_on_for_the_next_computed_one(
    adapters: dict[str, str],
) -> None:
    """A skipped step's forward has none of the denoiser's blocks: those must be switched all the same."""
    asked = {"skips": ("ink", None), "computes": ("ink", "off"), "comes": ("clay", "off")}
    parameters = {
        name: Params(num_inference_steps=10, seed=0, output_type="latent", lora_request=lora, cache=cache)
        for name, (lora, cache) in asked.items()
    }
    with engine(adapters) as omni:
        for name in ("skips", "computes"):
            add(omni, name, embeds(0), parameters[name])
        outputs: dict[str, Any] = {}
        while (place := omni.engine.scheduler.running.get("skips")) is None or place.kind is not StepKind.SKIP:
            outputs |= {output.request_id: output for output in omni.engine.step()}
        add(omni, "comes", embeds(0), parameters["comes"])  # turns on its own
        drain(omni, outputs)
        for name, one in parameters.items():
            assert_close(outputs[name].latents, omni.generate(embeds(0), one, use_tqdm=False)[0].latents, name)
    assert outputs["skips"].skipped_steps > 0


def test_requests_with_equal_adapters_share_a_forward(adapters: dict[str, str]) -> None:
    params = Params(num_inference_steps=4, output_type="latent", lora_request="ink", cache="off", seed=1)
    with engine(adapters) as omni:
        counter = count_blocks(omni.engine.worker.pipeline)
        omni.generate([embeds(0), embeds(1)], params, use_tqdm=False)
        assert counter.count == 4 and counter.rows == 8


def test_close_removes_the_adapters(adapters: dict[str, str]) -> None:
    pipeline = tiny_flux()
    before = fingerprint(pipeline.transformer), run_latents(pipeline, num_inference_steps=3)
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, lora_modules=adapters) as omni:
        assert fingerprint(pipeline.transformer) == before[0]  # a checkpoint's curve is still found
        omni.generate(embeds(0), Params(num_inference_steps=3, lora_request="ink"), use_tqdm=False)
    assert torch.equal(run_latents(pipeline, num_inference_steps=3), before[1])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("inc", "lora_request must be one of: ink, clay"),
        ("../../etc/passwd", "lora_request must be one of: ink, clay"),
        ({"name": "ink", "path": "/x"}, "LoRARequest has no 'path'"),
        ({"name": "ink", "scale": float("nan")}, "scale"),
        ({"name": "ink", "scale": 1e9}, "scale.*10"),
        ([["ink"]], "lora_request must be a registered name"),
        (["ink", "ink"], "lora_request names an adapter twice"),
        (7, "lora_request must be a registered name"),
    ],
)
def test_a_bad_adapter_request_is_refused(adapters: dict[str, str], lora: Any, message: str) -> None:
    with engine(adapters) as omni:
        params = {"num_inference_steps": 3, "lora_request": lora, "output_type": "latent"}
        bad, good = omni.generate([embeds(0), embeds(1)], [params, {"num_inference_steps": 3}], use_tqdm=False)
        assert isinstance(bad.error, InvalidValueError)
        assert_matches(bad.error, message)
        assert good.ok


def test_bad_lora_modules_are_refused_at_start_up(tmp_path: Path) -> None:
    pickled = tmp_path / "a.bin"
    pickled.write_bytes(b"\x80\x04")
    cut = tmp_path / "b.safetensors"
    cut.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for where, message in [
        (str(pickled), "no .safetensors file"),
        (str(cut), "could not be loaded"),
        (str(tmp_path / "gone"), "does not exist"),
        ("/" + "a" * 300, "does not exist"),
        ("~nobody-here/adapter", "does not exist"),
    ]:
        with pytest.raises(ModelLoadError, match=message):
            Omni.from_pipe(tiny_flux(), defaults=DEFAULTS, lora_modules={"x": where})


@pytest.mark.parametrize("error", [IndexError, AttributeError, TypeError, KeyboardInterrupt])
def test_nothing_is_left_of_an_adapter_whose_loading_fails(
    error: type[BaseException], adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever diffusers raises, and wherever: here it has the adapter on the denoiser by then."""
    with engine({}) as omni:
        pipeline = omni.engine.worker.pipeline
        bare = omni.generate(embeds(0), Params(num_inference_steps=3, seed=0, output_type="latent"), use_tqdm=False)[0]
        own = type(pipeline).load_lora_weights

        def fail(self: Any, *args: Any, **kwargs: Any) -> None:
            own(self, *args, **kwargs)
            raise error

        with monkeypatch.context() as patched, pytest.raises(error if error is KeyboardInterrupt else ModelLoadError):
            patched.setattr(type(pipeline), "load_lora_weights", fail)
            omni.load_lora_adapter("ink", adapters["ink"])
        assert not pipeline.get_list_adapters() and not omni.engine.worker.runner.adapters.loaded
        omni.load_lora_adapter("ink", adapters["ink"])
        omni.unload_lora_adapter("ink")
        again = omni.generate(embeds(0), Params(num_inference_steps=3, seed=0, output_type="latent"), use_tqdm=False)[0]
        assert again.ok and torch.equal(again.latents, bare.latents)


def test_a_request_that_waits_for_its_encoder_is_not_changed_by_an_adapter_that_comes(tmp_path: Path) -> None:
    """Adapters of text encoders are on only while a request of theirs is encoded."""
    where = save_text_adapter(DiffusionPipeline.from_pretrained(DEMO), tmp_path / "text", 0)
    params = Params(num_inference_steps=3, seed=1, output_type="latent")
    with Omni("demo", dtype="float32", prompt_cache_mb=0) as omni:
        bare = omni.generate("penguin", params, use_tqdm=False)[0].latents
        add(omni, "before", "penguin", params)
        omni.engine.step()
        assert omni.engine.stage("before") == "encode"
        omni.load_lora_adapter("text", str(where))
        add(omni, "with", "penguin", params.model_copy(update={"lora_request": (("text", 1.0),)}))
        add(omni, "after", "penguin", params)
        outputs: dict[str, Any] = {}
        drain(omni, outputs)
        assert_close(outputs["before"].latents, bare)
        assert_close(outputs["after"].latents, bare)
        assert_differs(outputs["with"].latents, bare)
        own = params.model_copy(update={"lora_request": (("text", 1.0),)})
        alone = omni.generate("penguin", own, use_tqdm=False)
        assert_close(outputs["with"].latents, alone[0].latents)
        omni.unload_lora_adapter("text")
        assert torch.equal(omni.generate("penguin", params, use_tqdm=False)[0].latents, bare)


def test_a_denoiser_inside_pefts_own_wrapper_is_cached_and_shared() -> None:
    """What `get_peft_model` returns; others train with it and put it into the pipeline."""

    def wrapped() -> Any:
        pipe = tiny_flux()
        torch.manual_seed(0)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"])
        pipe.transformer = get_peft_model(pipe.transformer, config).eval()
        return pipe

    steps = (6, 8)
    wanted = [run_latents(wrapped(), i=i, seed=i, num_inference_steps=n) for i, n in enumerate(steps)]
    for cache in ({}, {"cache_backend": "magcache", "cache_config": {"mag_ratios": CURVE}}):
        with Omni.from_pipe(wrapped(), defaults=DEFAULTS, **cache) as omni:
            params = [Params(num_inference_steps=n, seed=i, output_type="latent") for i, n in enumerate(steps)]
            outputs = omni.generate([embeds(i) for i in range(2)], params, use_tqdm=False)
            assert sum(omni.engine.worker.runner.forwards.values()) < sum(steps)
        for output, latents in zip(outputs, wanted, strict=True):
            assert output.ok and bool(output.skipped_steps) == bool(cache), output.error
            assert float((output.latents - latents).norm() / latents.norm()) < (0.1 if cache else 1e-5)


def test_adapters_of_the_callers_own_stay_on_beside_a_request_s_and_when_the_engine_has_gone(
    adapters: dict[str, str],
) -> None:
    pipeline = tiny_flux()
    pipeline.load_lora_weights(adapters["clay"], adapter_name="mine")
    pipeline.set_adapters(["mine"], [0.7])
    before = run_latents(pipeline, i=0, seed=0, num_inference_steps=4)
    asked = [None, "ink"]
    parameters = [Params(num_inference_steps=4, seed=0, output_type="latent", lora_request=lora) for lora in asked]
    with Omni.from_pipe(pipeline, defaults=DEFAULTS, lora_modules={"ink": adapters["ink"]}) as omni:
        bare, ink = (omni.generate(embeds(0), one, use_tqdm=False)[0] for one in parameters)
        with pytest.raises(ModelLoadError, match="has an adapter of that name"):
            omni.engine.worker.runner.adapters.load("mine", adapters["ink"])
    assert_close(bare.latents, before)
    both = reference(adapters, ["clay", "ink"], [0.7, 1.0], i=0, seed=0, num_inference_steps=4)
    assert_close(ink.latents, both)
    assert pipeline.get_list_adapters() == {"transformer": ["mine"]}
    assert_close(run_latents(pipeline, i=0, seed=0, num_inference_steps=4), before)


def test_an_adapter_of_the_callers_own_with_a_scale_for_each_layer_is_refused_with_what_to_do(
    adapters: dict[str, str],
) -> None:
    pipeline = tiny_flux()
    pipeline.load_lora_weights(adapters["clay"], adapter_name="mine")
    pipeline.transformer.transformer_blocks[0].attn.to_q.set_scale("mine", 0.5)
    with pytest.raises(InvalidValueError, match="fuse it"):
        Omni.from_pipe(pipeline, defaults=DEFAULTS, lora_modules={"ink": adapters["ink"]})


def test_a_file_that_cannot_be_loaded_leaves_the_adapters_that_are_there(adapters: dict[str, str]) -> None:
    with engine({"ink": adapters["ink"]}) as omni:
        params = Params(num_inference_steps=4, seed=0, output_type="latent", lora_request="ink")
        before = omni.generate(embeds(0), params, use_tqdm=False)[0]
        with pytest.raises(ModelLoadError):
            omni.load_lora_adapter("torn", "/no/such/file")
        after = omni.generate(embeds(0), params, use_tqdm=False)[0]
    assert before.ok and after.ok, (before.error, after.error)
    assert torch.equal(after.latents, before.latents)
