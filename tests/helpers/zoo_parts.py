"""Small parts for the pipelines of the zoo: VAEs, text encoders, tokenizers that are made on the spot."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import diffusers as d
import numpy as np
import torch
from family import TEXT, random_model

WORDS = [
    "a",
    "the",
    "of",
    "and",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "song",
    "drum",
    "piano",
    "slow",
    "fast",
    "bright",
    "dark",
    "over",
    "under",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def sentence(generator: torch.Generator, words: int = 6) -> str:
    """A prompt that every tokenizer here knows word by word."""
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (words,), generator=generator))


def spoken(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The prompt of a pipeline that takes no embeddings."""
    return {"prompt": sentence(generator)}


def words_tokenizer(length: int = 16, special: tuple[str, ...] = (), template: str | None = None) -> Any:
    """A tokenizer of whole words; `special` tokens on top of the usual four, `template` for chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *special, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
    )
    made.chat_template = template
    return made


def t5(width: int = TEXT, vocabulary: int = 64) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32, "d_model": width, "vocab_size": vocabulary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5EncoderModel(T5Config(**sizes)).eval()


def kl_vae(**sizes: Any) -> Any:
    """An image VAE of four channels that halves each side."""
    small = {
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return random_model(d.AutoencoderKL, small | sizes)


def wan_vae(kind: type = d.AutoencoderKLWan, channels: int = 4, **sizes: Any) -> Any:
    """A video VAE that makes one latent of 8 by 8 pixels and four frames."""
    small = {"base_dim": 4, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    small |= {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return random_model(kind, small | sizes)


def flux2_vae(channels: int = 4) -> Any:
    small = {"latent_channels": channels, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    small |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return random_model(d.AutoencoderKLFlux2, small)


qwen_vae = functools.partial(wan_vae, d.AutoencoderKLQwenImage)


CHAT = (
    "{% for m in messages %}{{ m['role'] }} "
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} {% endfor %}"
)


def language_model(layers: int = 2, width: int = TEXT, vocabulary: int = 64) -> Any:
    """A causal model whose hidden states are read, such as Qwen's."""
    from transformers import Qwen2Config, Qwen2Model

    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 512}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2Model(Qwen2Config(**sizes)).eval()


class Processor:
    """In the place of a processor for text and pictures, of which these pipelines use the text's half."""

    def __init__(self) -> None:
        self.tokenizer = words_tokenizer(special=("<|image_pad|>",), template=CHAT)

    def __call__(self, text: list[str], images: Any = None, **given: Any) -> Any:
        return self.tokenizer(text, **given)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **given: Any) -> Any:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return [self.tokenizer(text)["input_ids"]] if tokenize else text


def vision_language() -> Any:
    """A tiny Qwen3-VL: two layers of text, one of eyes."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {"hidden_size": TEXT, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16}
    text["rope_parameters"] = {"mrope_section": [4, 2, 2], "rope_type": "default", "rope_theta": 1e4}
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT}
    eyes |= {"deepstack_visual_indexes": [0]}
    return random_model(
        Qwen3VLForConditionalGeneration, {"config": Qwen3VLConfig(text_config=text, vision_config=eyes)}
    )


def drawn(pipeline: Any, component: str, named: str, std: float = 0.2) -> Any:
    """The pipeline with values for the weights whose name has `named`: those that the model only makes room for."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.components[component].named_parameters():
        if named in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return pipeline


def certain(vae: Any) -> Any:
    """The VAE with encodings that hardly vary: some pipelines sample them without the request's generator."""
    with torch.no_grad():
        half = len(vae.quant_conv.bias) // 2
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = -60
    return vae


class _Transform:
    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, value: Any) -> Any:
        return self.change(value)


def _composed(steps: list[Any]) -> Any:
    return lambda value: functools.reduce(lambda done, step: step(done), steps, value)


def _resized(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size=tuple(size), mode=interpolation)


TRANSFORMS = SimpleNamespace(
    Compose=_composed,
    Lambda=_Transform,
    ToTensor=lambda: _Transform(lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255),
    Normalize=lambda mean, std, inplace: _Transform(lambda image: (image - mean[0]) / std[0]),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    functional=SimpleNamespace(resize=_resized),
)
"""In the place of `torchvision.transforms`, where it is not installed: the six names that diffusers' models use."""


def stand_in(module: str, name: str, value: Any) -> None:
    """Put `value` in the place of what a module of diffusers could not import."""
    vars(sys.modules[module]).setdefault(name, value)
