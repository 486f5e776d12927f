"""Models that nobody has described, one's own among them: in the engine, and in a plain pipeline."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trap_models as traps
from closeness import assert_close, assert_differs
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from paths import ROOT

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.magcache import MagCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.envs import profile_folder

PAGE = ROOT / "docs" / "any_model.md"
MASK = [1, 1, 0, 1, 0, 1]
STEPS = 6


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path / "profiles"))


class Pipeline(DiffusionPipeline):
    """Calls its denoiser once a step."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt: str = "", num_inference_steps: int = STEPS, generator: Any = None, output_type: str = "latent"
    ) -> Any:
        latents = torch.randn(1, 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            velocity = self.transformer(latents, t.expand(1) / 1000)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return {"images": latents}


def pipeline_of(kind: type) -> Pipeline:
    return Pipeline(traps.made(kind), FlowMatchEulerDiscreteScheduler())


def plain_of(pipeline: Any, seed: int = 0) -> torch.Tensor:
    return pipeline(generator=torch.Generator().manual_seed(seed))["images"]


def served(pipeline: Any, count: int = 3, **settings: Any) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
    """Outputs of requests that run together, what is known of the denoiser, and forwards."""
    with Omni.from_pipe(pipeline, cache_backend="magcache", cache_config={"steps_mask": MASK}, **settings) as omni:
        params = [Params(num_inference_steps=STEPS, seed=i, output_type="latent") for i in range(count)]
        outputs = omni.generate(["x"] * count, params, use_tqdm=False)
        assert all(output.error is None for output in outputs), outputs[0].error
        assert omni.engine.worker.cache_bytes == 0
        runner = omni.engine.worker.runner
        return outputs, runner.denoisers["transformer"].facts(), dict(runner.forwards)


def test_a_model_that_keeps_state_serves_one_request_after_the_other() -> None:
    """As the plain pipeline does: the requests' calls do not alternate."""
    plain = pipeline_of(traps.Compares)
    wanted = [plain_of(plain, seed) for seed in range(3)]
    outputs, facts, _ = served(pipeline_of(traps.Compares))
    assert not facts["cached"] and not facts["batched"]
    for output, latents in zip(outputs, wanted, strict=True):
        assert_close(output.latents, latents)


def test_the_page_shows_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    assert capsys.readouterr().out.strip().endswith("13 7")
    facts = space["omni"].engine.worker.runner.denoisers["transformer"].facts()
    assert (facts["known"], facts["cached"], facts["batched"], facts["reasons"]) == ("found", True, True, [])


@pytest.mark.parametrize("kind", [traps.Plain, traps.ByPosition, traps.Nested, traps.InPlace], ids=lambda k: k.__name__)
def test_a_model_of_ones_own_is_cached_from_its_first_request(kind: type) -> None:
    pipeline = pipeline_of(kind)
    plain = [plain_of(pipeline, i) for i in range(3)]
    outputs, facts, forwards = served(pipeline)
    assert facts["known"] == "found" and facts["cached"] and facts["batched"] and not facts["reasons"]
    assert [output.skipped_steps for output in outputs] == [2, 2, 2]
    assert forwards == {"computed": 4, "skipped": 2}  # three requests in each
    for output, wanted in zip(outputs, plain, strict=True):
        assert_differs(output.latents, wanted)
    alone = [served(pipeline, i + 1)[0][i] for i in range(3)]
    for output, own in zip(outputs, alone, strict=True):
        assert_close(output.latents, own.latents)
    assert torch.equal(plain_of(pipeline), plain[0])


UNSUITED = [traps.EarlyRead, traps.Parallel, traps.Twice, traps.Unused, traps.ReturnsMore]


@pytest.mark.parametrize("kind", UNSUITED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_cached_is_served_as_it_is(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = pipeline_of(kind)
    plain = [plain_of(pipeline, i) for i in range(3)]
    outputs, facts, _ = served(pipeline)
    assert not facts["cached"] and facts["batched"] and len(facts["reasons"]) == 1
    assert caplog.text.count(f"{kind.__name__} was found to be not cached, in batches: {facts['reasons'][0]}") == 1
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.skipped_steps == 0
        assert_close(output.latents, wanted)


@pytest.mark.parametrize("kind", [traps.BatchMean, traps.Remembers], ids=lambda kind: kind.__name__)
def test_what_cannot_be_joined_goes_alone(kind: type) -> None:
    pipeline = pipeline_of(kind)
    (output,), facts, _ = served(pipeline, 1)
    assert facts["cached"] is (kind is traps.BatchMean) and not facts["batched"] and facts["reasons"]
    if kind is traps.Remembers:  # the examination has left nothing in it, and took nothing out
        assert torch.equal(output.latents, plain_of(pipeline_of(kind)))


@pytest.mark.parametrize("kind", [traps.Plain, traps.AddsBetween, traps.EarlyRead], ids=lambda kind: kind.__name__)
def test_without_the_engine(kind: type) -> None:
    """As in the engine; every block runs as often as planned, not counting the one examination."""
    pipeline, ran = pipeline_of(kind), []
    plain = plain_of(pipeline)
    pipeline.transformer.trunk[1].register_forward_hook(lambda *_: ran.append(1))
    backend = MagCacheBackend(DiffusionCacheConfig(steps_mask=[1] * STEPS))
    backend.enable(pipeline)
    assert torch.equal(plain_of(pipeline), plain)
    examined = len(ran) - STEPS
    assert 0 < examined <= 6  # forwards
    backend.disable(pipeline)
    ran.clear()
    backend = MagCacheBackend(DiffusionCacheConfig(steps_mask=MASK))
    backend.enable(pipeline)
    first, again = plain_of(pipeline), plain_of(pipeline)
    assert torch.equal(first, again) and backend.store.used == 0
    assert len(ran) == 2 * (STEPS if kind is traps.EarlyRead else sum(MASK))  # examined no second time
    if kind is traps.EarlyRead:
        assert torch.equal(first, plain)
    backend.disable(pipeline)
    assert torch.equal(plain_of(pipeline), plain)


def module_in(folder: Path, name: str, text: str) -> Any:
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_found_is_kept_and_goes_with_the_code(tmp_path: Path) -> None:
    """In a file of plain values, without a number of the model; another code, or a torn file, is examined anew."""
    code = "from trap_models import *\n\n\nclass Mine(Plain):\n    pass\n"

    def calls(kind: type) -> int:
        pipeline, count = pipeline_of(kind), []
        pipeline.transformer.trunk[1].register_forward_hook(lambda *_: count.append(1))
        assert served(pipeline, 1)[0][0].skipped_steps == 2
        return len(count)

    try:
        mine = module_in(tmp_path, "mine", code)
        first = calls(mine.Mine)
        (file,) = (profile_folder() / "denoisers").glob("Mine-*.json")
        kept = json.loads(file.read_text())
        assert kept["class"] == "Mine" and len(kept["calls"]) == 1 and len(file.read_text()) < 2000
        assert calls(mine.Mine) == sum(MASK) < first
        file.write_text(file.read_text()[:100])
        assert calls(mine.Mine) == first
        mine = module_in(tmp_path, "mine", code + "\n\nOTHER = 1\n")
        assert calls(mine.Mine) == first
        assert len(list((profile_folder() / "denoisers").glob("Mine-*.json"))) == 2
    finally:
        sys.modules.pop("mine", None)
