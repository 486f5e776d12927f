"""What a tiny pipeline with random weights is made of: a family of models, its parts, and its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from closeness import ROUNDINGS
from PIL import Image

TEXT = 32
NEGATIVE = {"pooled_prompt_embeds": "negative_pooled_prompt_embeds"}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL: dict[str, Any] = {"height": 32, "width": 32}
WAN = HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 64, "num_layers": 3}
CLIP = {"text_encoder_2": None, "tokenizer_2": None}
TOKENS = {"prompt_embeds": (1, 8, TEXT)}
POOLED = TOKENS | {"pooled_prompt_embeds": (1, TEXT)}
MASK = {"prompt_attention_mask": (1, 8)}
VIDEO = SMALL | {"num_frames": 5}
TRUE_CFG = "true_cfg_scale"


@dataclass(frozen=True)
class Family:
    """`build` makes the pipeline; `embeds` are the shapes of a prompt's tensors, negated where `negative` is."""

    name: str
    build: Callable[[], Any]
    embeds: dict[str, tuple[int, ...]]
    masks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mask_type: torch.dtype = torch.long
    negative: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    guidance: str | None = "guidance_scale"
    listed: bool = False  # a prompt's embeddings are a list of (tokens, channels)
    fixed_length: bool = False  # the model takes prompts of one length alone
    steps_aside: bool = False  # something is added between the blocks: the cache must compute every step
    output: str = "latent"  # the output_type that tests compare
    why: str = ""  # the reason, where nothing that was found says it
    roundings: float = ROUNDINGS  # how far a mixed batch may be from each request alone
    more: Callable[[dict[str, Any], torch.Generator], dict[str, Any]] = lambda given, generator: {}

    def guided(self, scale: float) -> dict[str, float]:
        return {self.guidance: scale} if self.guidance else {}

    def prompt(self, i: int) -> dict[str, Any]:
        """Conditioning `i`; number 2 is shorter: masked where the model has masks, otherwise fewer tokens."""
        generator = torch.Generator().manual_seed(1000 + i)
        short = i == 2 and not self.fixed_length
        given: dict[str, Any] = {}
        for name, shape in self.embeds.items():
            value = torch.randn(shape, generator=generator)
            given[name] = value[..., :-2, :] if short and not self.masks and value.ndim > 2 else value
        for name, shape in self.masks.items():
            given[name] = torch.ones(shape, dtype=self.mask_type)
            given[name][:, -2:] = not short
        for name in ("prompt_embeds",) if self.listed else ():
            given[name] = list(given[name])
        if self.negative:
            opposite = {
                n: ([-e for e in v] if isinstance(v, list) else -v) if n in self.embeds else v for n, v in given.items()
            }
            given |= {NEGATIVE.get(n, f"negative_{n}"): v for n, v in opposite.items()}
        return given | self.more(given, generator)


def random_model(kind: type, sizes: dict[str, Any], seed: int = 0, std: float = 0.2) -> Any:
    """Weights as the model draws them, but none that are zero or left undefined."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**sizes).eval()
        for parameter in model.parameters():  # layers that begin at zero would hide what the blocks do
            if not parameter.any() or not torch.isfinite(parameter).all():
                torch.nn.init.normal_(parameter, std=std)
    return model


def assembled(
    pipeline: type, transformer: type, sizes: dict[str, Any], scheduler: Any = None, std: float = 0.2, **parts: Any
) -> Any:
    """The pipeline around a random transformer; of the parts those that it takes, without text encoder and VAE."""
    given = {
        "transformer": random_model(transformer, sizes, std=std),
        "scheduler": scheduler or d.FlowMatchEulerDiscreteScheduler(),
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        **parts,
    }
    taken = inspect.signature(pipeline).parameters
    made = pipeline(**{name: part for name, part in given.items() if name in taken})
    made.set_progress_bar_config(disable=True)
    return made


def picture(generator: torch.Generator, size: int = 32) -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def edited(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"image": picture(generator)}


def of_length(family: Family, i: int, positive: int, negative: int) -> dict[str, Any]:
    """Conditioning `i` with the first tokens alone, of the prompt and of the negative prompt."""

    def cut(name: str, value: Any) -> Any:
        length = negative if name.startswith("negative") else positive
        if isinstance(value, list) and all(isinstance(entry, torch.Tensor) for entry in value):
            return [entry[:length] for entry in value]
        if "mask" in name and isinstance(value, torch.Tensor) and value.ndim == 2:
            return value[:, :length]
        return value[..., :length, :] if isinstance(value, torch.Tensor) and value.ndim > 2 else value

    given = {name: cut(name, value) for name, value in family.prompt(i).items()}
    return given | family.more(given, torch.Generator().manual_seed(i))
