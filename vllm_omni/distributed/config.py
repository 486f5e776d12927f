"""How many devices share one model, and what each has of it. Knows no tensors."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from vllm_omni.errors import InvalidValueError
from vllm_omni.settings import Settings

NO_LIMIT_S = 24 * 3600.0


class ParallelConfig(Settings):
    """What is split over ranks, each a process with a device of its own. Tokens and layers are not split together."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=64, description="ranks that share every layer's weights")
    cfg_parallel_size: int = Field(default=1, ge=1, le=3, description="ranks that make one guidance branch each")
    ulysses_degree: int = Field(default=1, ge=1, le=64, description="ranks that share the tokens, by attention heads")
    ring_degree: int = Field(default=1, ge=1, le=64, description="ranks that share the tokens, in a ring")
    ulysses_anything: bool = Field(
        default=False, description="with ulysses_degree: any number of tokens, and of heads, on ranks with unlike parts"
    )
    ring_anything: bool = Field(
        default=False, description="with ring_degree: any number of tokens, on ranks with unlike parts"
    )
    rank_timeout_s: float = Field(
        default=60.0, gt=0, le=NO_LIMIT_S, description="how long ranks wait for one that is late"
    )

    @property
    def tokens_split(self) -> int:
        """Ranks that have a part of the tokens each."""
        return self.ulysses_degree * self.ring_degree

    @property
    def ranks(self) -> int:
        return self.tensor_parallel_size * self.cfg_parallel_size * self.tokens_split

    @property
    def unlike(self) -> bool:
        """Whether ranks may have parts of unlike sizes."""
        return self.ulysses_anything or self.ring_anything

    @property
    def lifting(self) -> str | None:
        """The setting that lets the tokens be any number; None if it is on, or there is none."""
        if self.unlike or (self.ulysses_degree > 1) == (self.ring_degree > 1):
            return None
        return "ulysses_anything" if self.ulysses_degree > 1 else "ring_anything"

    @property
    def mesh(self) -> dict[str, int]:
        """How the ranks are arranged, from the outermost dimension: those of one branch stand next to each other."""
        layers = {"tp": self.tensor_parallel_size}
        tokens = {"ring": self.ring_degree, "ulysses": self.ulysses_degree}
        return {"cfg": self.cfg_parallel_size} | (layers if self.tensor_parallel_size > 1 else tokens)

    @model_validator(mode="after")
    def _combinations(self) -> ParallelConfig:
        degree = "ulysses_degree" if self.ulysses_degree > 1 else "ring_degree"
        if self.tensor_parallel_size > 1 and self.tokens_split > 1:
            fix = "cannot be combined with tensor_parallel_size; of these, give one"
            raise InvalidValueError(degree, vars(self)[degree], fix)
        for kind, other in (("ulysses", "ring"), ("ring", "ulysses")):
            own, others = (vars(self)[f"{name}_degree"] for name in (kind, other))
            if vars(self)[f"{kind}_anything"] and (own == 1 or others > 1):
                fix = f"is for a {kind}_degree of more than 1 beside a {other}_degree of 1"
                raise InvalidValueError(f"{kind}_anything", True, fix)
        return self


SIZES = ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree", "ring_degree")


def gathered(values: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments with those that belong to `parallel_config` inside it."""
    own = {name: values[name] for name in ParallelConfig.model_fields if name in values}
    if not own:
        return values
    others = {name: value for name, value in values.items() if name not in own}
    given = others.get("parallel_config") or {}
    if isinstance(given, ParallelConfig):
        given = given.model_dump(exclude_unset=True)
    if twice := next((name for name in own if name in given and given[name] != own[name]), None):
        raise InvalidValueError(twice, own[twice], f"is {given[twice]} in parallel_config; give it once")
    return others | {"parallel_config": {**given, **own}}


def check_combination(parallel: ParallelConfig, engine: Any) -> None:
    """InvalidValueError for engine arguments that cannot be with several ranks."""
    if parallel.ranks == 1:
        return
    name = next(name for name in SIZES if vars(parallel)[name] > 1)
    size = vars(parallel)[name]
    for offload in ("enable_cpu_offload", "enable_layerwise_offload"):
        if vars(engine)[offload]:
            raise InvalidValueError(offload, True, f"cannot be combined with {name}; leave one out")
    for option, device in engine.component_devices.items():  # when it is done is not the same on all ranks
        raise InvalidValueError(option, device, f"cannot be combined with {name}; leave one out")
    if parallel.cfg_parallel_size > 1 and not engine.join_guidance:
        raise InvalidValueError("join_guidance", False, "is what cfg_parallel_size builds on; leave it out")
    if parallel.tensor_parallel_size > 1:
        for other in ("quantization", "lora_modules"):
            if vars(engine)[other]:
                raise InvalidValueError(name, size, f"cannot be combined with {other}; ulysses_degree can")
