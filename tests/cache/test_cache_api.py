"""The public cache API: names, defaults, allowed ranges, hooks, and errors that name the field and the fix."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from pipelines import tiny_flux

from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.magcache import (
    Flux2MagCacheStrategy,
    FluxMagCacheStrategy,
    MagCacheBackend,
    MagCacheStrategy,
    MagCacheStrategyRegistry,
    apply_mag_cache_hook,
    get_strategy,
    register_strategy,
)
from vllm_omni.diffusion.cache.magcache.config import MagCacheConfig
from vllm_omni.diffusion.cache.profile import profile_names, shipped_profile
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.cache.standalone import detach
from vllm_omni.diffusion.data import DiffusionCacheConfig
from vllm_omni.diffusion.denoiser.specs import DENOISERS
from vllm_omni.diffusion.hooks.base import HookRegistry, ModelHook, StateManager
from vllm_omni.errors import InvalidValueError, OmniError, UnknownKeyError

NAMES = {
    "vllm_omni.diffusion.data": ["DiffusionCacheConfig"],
    "vllm_omni.diffusion.cache.base": ["CacheBackend"],
    "vllm_omni.diffusion.cache.selector": ["get_cache_backend"],
    "vllm_omni.diffusion.cache.magcache": [
        "Flux2MagCacheStrategy",
        "FluxMagCacheStrategy",
        "MagCacheBackend",
        "MagCacheConfig",
        "MagCacheState",
        "MagCacheStrategy",
        "MagCacheStrategyRegistry",
        "apply_mag_cache_hook",
        "get_strategy",
        "register_strategy",
    ],
    "vllm_omni.diffusion.cache.magcache.backend": ["MagCacheBackend"],
    "vllm_omni.diffusion.cache.magcache.config": ["MagCacheConfig"],
    "vllm_omni.diffusion.cache.magcache.hook": ["apply_mag_cache_hook"],
    "vllm_omni.diffusion.cache.magcache.strategy": ["MagCacheStrategy", "register_strategy", "get_strategy"],
    "vllm_omni.diffusion.hooks.base": ["ModelHook", "HookRegistry", "StateManager"],
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_can_be_imported_from_their_modules(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in NAMES[module] if name not in vars(loaded)] == []


# ------------------------------------------------------------------------------------------------------ configuration


def test_cache_config_defaults() -> None:
    config = DiffusionCacheConfig()
    assert config.mag_ratios is None and config.num_inference_steps is None
    assert (config.mag_threshold, config.mag_max_skip_steps, config.mag_retention_ratio) == (0.24, 5, 0.1)
    assert config.mag_calibrate is False and config.coefficients is None and config.rel_l1_thresh is None
    assert config.compute_last_step is True and config.curve_resampling == "log" and config.predictor == "auto"


def test_cache_config_from_dict_takes_lists_arrays_and_tensors() -> None:
    curve = [1.0, 1.25, 0.75]
    for given in (curve, tuple(curve), torch.tensor(curve), torch.tensor(curve).numpy(), iter(curve)):
        assert DiffusionCacheConfig.from_dict({"mag_ratios": given}).mag_ratios == (1.0, 1.25, 0.75)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("mag_treshold", "mag_threshold"), ("mag_ratio", "mag_ratios"), ("max_skip_steps", "mag_max_skip_steps")],
)
def test_an_unknown_key_raises_and_names_the_close_match(typo: str, meant: str) -> None:
    for make in (DiffusionCacheConfig.from_dict, lambda d: DiffusionCacheConfig(**d)):
        with pytest.raises(UnknownKeyError, match=rf"{typo}.*did you mean.*'{meant}'") as caught:
            make({typo: 1})
        assert isinstance(caught.value, ValueError)


def test_an_unknown_key_without_a_close_match_lists_all() -> None:
    with pytest.raises(UnknownKeyError, match=r"xyzzy.*it has:.*mag_threshold"):
        DiffusionCacheConfig.from_dict({"xyzzy": 1})


def test_settings_are_frozen() -> None:
    with pytest.raises((TypeError, ValueError)):
        DiffusionCacheConfig().mag_threshold = 1.0  # type: ignore[misc]


def test_mag_cache_config_defaults() -> None:
    config = MagCacheConfig()
    assert (config.threshold, config.max_skip_steps, config.retention_ratio) == (0.24, 5, 0.1)
    assert config.num_inference_steps == 28 and config.mag_ratios is None and config.mag_calibrate is False
    assert config.transformer_type == "FluxTransformer2DModel"


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("threshold", 0, "0"),
        ("threshold", -0.1, "0"),
        ("threshold", math.nan, "0|finite"),
        ("threshold", math.inf, "finite"),
        ("max_skip_steps", 0, "1"),
        ("max_skip_steps", -3, "1"),
        ("retention_ratio", -0.1, "0"),
        ("retention_ratio", 1.0, "1"),
        ("num_inference_steps", 0, "1"),
        ("num_inference_steps", 10**9, "10000"),
        ("mag_ratios", [], "empty"),
        ("mag_ratios", [1.0, math.nan], "finite number above 0"),
        ("mag_ratios", [1.0, math.inf], "finite number above 0"),
        ("mag_ratios", [1.0, 0.0], "above 0"),
        ("mag_ratios", [1.0, -1.0], "above 0"),
        ("mag_ratios", "1.0", "list of numbers"),
        ("mag_ratios", 1.0, "list of numbers"),
        ("mag_ratios", [[1.0, 2.0]], "flat list"),
        ("mag_ratios", torch.ones(2, 3), "flat list"),
    ],
)
def test_mag_cache_config_ranges_name_field_value_and_range(field: str, value: Any, bound: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}.*({bound}).*got ") as caught:
        MagCacheConfig(**{field: value})
    assert isinstance(caught.value, OmniError)


# ------------------------------------------------------------------------------------------------------------ factory


def test_the_factory_returns_none_for_none() -> None:
    assert get_cache_backend(None, None) is None
    assert get_cache_backend("none", {}) is None


@pytest.mark.parametrize("name", ["magcache", "mag_cache"])
@pytest.mark.parametrize("config", [{"mag_threshold": 0.1}, DiffusionCacheConfig(mag_threshold=0.1)])
def test_the_factory_takes_both_spellings_and_both_configs(name: str, config: Any) -> None:
    backend = get_cache_backend(name, config)
    assert isinstance(backend, MagCacheBackend) and isinstance(backend, CacheBackend)
    assert backend.config.mag_threshold == 0.1 and not backend.is_enabled() and not backend.enabled


def test_an_unknown_backend_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"magcash|magcache") as caught:
        get_cache_backend("magcash", {})
    assert "'magcash'" in str(caught.value) and "'magcache'" in str(caught.value) and "none" in str(caught.value)


def test_the_factory_refuses_unknown_settings() -> None:
    with pytest.raises(UnknownKeyError, match="mag_threshold"):
        get_cache_backend("magcache", {"mag_treshold": 0.1})


def test_cache_backend_is_abstract_and_shows_its_config() -> None:
    with pytest.raises(TypeError):
        CacheBackend(DiffusionCacheConfig())  # type: ignore[abstract]

    class Nothing(CacheBackend):
        def enable(self, pipeline: Any) -> None:
            self.enabled = True

        def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None: ...

        def disable(self, pipeline: Any) -> None:
            self.enabled = False

    config = DiffusionCacheConfig(mag_threshold=0.125)
    backend = Nothing(config)
    assert backend.config is config and backend.is_enabled() is False
    backend.enable(None)
    assert backend.is_enabled() is True
    assert "0.125" in repr(backend) and "Nothing" in repr(backend)


# --------------------------------------------------------------------------------------------------------- strategies


def test_flux_ratios_are_the_official_curve() -> None:
    ratios = FluxMagCacheStrategy.FLUX_MAG_RATIOS
    assert len(ratios) == 28 and ratios[0] == 1.0
    assert tuple(ratios) == shipped_profile("flux1-dev-28").ratios
    assert ratios[1] == pytest.approx(1.21094) and ratios[-1] == pytest.approx(0.89062)


def test_shipped_profiles_all_load_and_say_where_they_come_from() -> None:
    assert "flux1-dev-28" in profile_names()
    for name in profile_names():
        profile = shipped_profile(name)
        assert profile.name == name and profile.provenance.get("kind") in ("published", "calibrated")


def test_strategies_are_registered_and_found_by_name() -> None:
    assert isinstance(get_strategy("FluxTransformer2DModel"), FluxMagCacheStrategy)
    assert isinstance(get_strategy("Flux2Transformer2DModel"), Flux2MagCacheStrategy)
    assert MagCacheStrategyRegistry.get_if_exists("NoSuchModel") is None
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel.*NoSuchModel"):
        get_strategy("NoSuchModel")


@pytest.fixture
def flux_strategy_restored() -> Any:
    registry = MagCacheStrategyRegistry
    strategies, own = dict(registry._strategies), set(registry._own)
    yield
    registry._strategies.clear()
    registry._strategies.update(strategies)
    registry._own.clear()
    registry._own.update(own)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_registered_strategy_provides_the_curve(kind: type, flux_strategy_restored: None) -> None:
    class Mine(MagCacheStrategy):
        spec = DENOISERS["FluxTransformer2DModel"]
        mag_ratios = kind([1.0] * 10)

    register_strategy("FluxTransformer2DModel", Mine())
    assert isinstance(get_strategy("FluxTransformer2DModel"), Mine)
    backend = MagCacheBackend(DiffusionCacheConfig())
    pipeline = tiny_flux()
    backend.enable(pipeline)
    try:
        plan = backend.plan(10, tuple(1 - i / 10 for i in range(10)))
        assert plan.full_forwards < 10
    finally:
        backend.disable(pipeline)


def test_a_checkpoint_without_a_curve_is_refused_with_how_to_calibrate() -> None:
    pipeline = tiny_flux()
    with pytest.raises(InvalidValueError, match=r"mag_ratios.*calibrate"):
        MagCacheBackend(DiffusionCacheConfig()).enable(pipeline)
    assert not pipeline.transformer._forward_hooks


def test_a_bare_denoiser_never_gets_a_curve_by_its_class_alone() -> None:
    """Point 6: a distilled FLUX has the same class; the published curve must be passed on purpose."""
    transformer = tiny_flux().transformer
    with pytest.raises(InvalidValueError, match="mag_ratios"):
        apply_mag_cache_hook(transformer, MagCacheConfig())
    apply_mag_cache_hook(transformer, MagCacheConfig(), FluxMagCacheStrategy())
    detach(transformer)


def test_a_pipeline_with_unknown_blocks_is_refused() -> None:
    class Odd(torch.nn.Module): ...

    pipeline = tiny_flux()
    pipeline.transformer = Odd()
    with pytest.raises(InvalidValueError, match=r"cache_backend.*FluxPipeline"):
        MagCacheBackend(DiffusionCacheConfig(mag_ratios=[1.0, 1.0])).enable(pipeline)


# -------------------------------------------------------------------------------------------------------------- hooks


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Note(ModelHook):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.log.append(f"init {self.name}")
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"pre {self.name}")
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self.log.append(f"post {self.name}" if output is not None else f"failed {self.name}")
        return output

    def reset_state(self, module: torch.nn.Module) -> None:
        self.log.append(f"reset {self.name}")


class PlusOne(ModelHook):
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.original_forward(*args, **kwargs) + 1


def test_hooks_run_in_order_and_reset_by_name() -> None:
    module, log = Double(), []
    registry = HookRegistry.get_or_create(module)
    assert HookRegistry.get_or_create(module) is registry
    first, second = Note("a", log), Note("b", log)
    registry.register_hook("a", first)
    registry.register_hook("b", second)
    assert registry.get_hook("a") is first and registry.get_hook("c") is None
    assert module(torch.tensor(2.0)).item() == 4
    registry.reset_hook("b")
    registry.reset_hook("missing")
    assert log == ["init a", "init b", "pre a", "pre b", "post b", "post a", "reset b"]


def test_a_duplicate_hook_is_refused() -> None:
    registry = HookRegistry.get_or_create(Double())
    registry.register_hook("a", Note("a", []))
    with pytest.raises(ValueError, match="'a'"):
        registry.register_hook("a", Note("a", []))
    registry.register_hook("one", PlusOne())
    with pytest.raises(RuntimeError, match="forward"):
        registry.register_hook("two", PlusOne())
    assert registry.get_hook("two") is None


def test_hooks_may_change_arguments_and_output() -> None:
    class Change(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (args[0] + 1,), kwargs

        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            return output - 0.5

    module = Double()
    HookRegistry.get_or_create(module).register_hook("change", Change())
    assert module(torch.tensor(2.0)).item() == 5.5


def test_removing_the_last_hook_restores_the_modules_own_forward() -> None:
    module = Double()
    before = dict(vars(module))
    registry = HookRegistry.get_or_create(module)
    registry.register_hook("note", Note("a", []))
    registry.register_hook("one", PlusOne())
    assert module(torch.tensor(2.0)).item() == 5
    registry.remove_hook("one")
    assert module(torch.tensor(2.0)).item() == 4
    registry.remove_hook("note")
    registry.remove_hook("never-there")
    assert module(torch.tensor(2.0)).item() == 4
    assert vars(module).keys() == before.keys() and module.forward.__func__ is Double.forward
    assert not module._forward_hooks and not module._forward_pre_hooks
    assert not module._forward_hooks_always_called and not module._forward_hooks_with_kwargs
    assert not module._forward_pre_hooks_with_kwargs


def test_removing_the_last_hook_restores_a_replaced_forward() -> None:
    """CPU offload replaces `forward` on the instance; that one is the module's own then."""
    module = Double()
    offloaded = lambda x: x * 10  # noqa: E731
    module.forward = offloaded  # type: ignore[method-assign]
    registry = HookRegistry.get_or_create(module)
    registry.register_hook("one", PlusOne())
    assert module(torch.tensor(2.0)).item() == 21
    registry.remove_hook("one")
    assert module.forward is offloaded


def test_post_hooks_are_called_after_a_failure() -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("boom")

    module, log = Fails(), []
    HookRegistry.get_or_create(module).register_hook("a", Note("a", log))
    with pytest.raises(KeyError):
        module(torch.tensor(1.0))
    assert log == ["init a", "pre a", "failed a"]


def test_state_manager_keeps_one_state_per_context() -> None:
    manager = StateManager(dict, (), {"made": True})
    default = manager.get_state()
    assert default == {"made": True} and manager.get_state() is default
    manager.set_context("cond")
    cond = manager.get_state()
    manager.set_context("uncond")
    uncond = manager.get_state()
    assert len({id(default), id(cond), id(uncond)}) == 3
    manager.set_context("cond")
    assert manager.get_state() is cond
    manager.set_context(None)
    assert manager.get_state() is default
    manager.reset()
    assert manager.get_state() is not default
