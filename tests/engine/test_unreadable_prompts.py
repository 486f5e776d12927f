"""A prompt that a tokenizer cannot read ends its own request; a processor may stand in the tokenizer's place."""

from __future__ import annotations

import asyncio
from typing import Any

import diffusers as d
import pytest
import torch
from families import FAMILIES, TEXT
from paths import DEMO
from pipelines import DEFAULTS, save_tiny_flux
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast, ProcessorMixin

from vllm_omni import AsyncOmni, Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.errors import InvalidValueError, OmniError

PARAMS = Params(num_inference_steps=2, seed=1, height=32, width=32)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With text encoders; its first tokenizer cannot read "poison"."""
    made = d.FluxPipeline.from_pretrained(
        save_tiny_flux(tmp_path_factory.mktemp("flux")), image_encoder=None, feature_extractor=None
    )
    made.set_progress_bar_config(disable=True)

    class Choosy(type(made.tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            if "poison" in str(text):
                raise TypeError("TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]")
            return super().__call__(text, *args, **kwargs)

    made.tokenizer.__class__ = Choosy
    return made


BAD = [("\ud83c", InvalidValueError), ("half \udcff", InvalidValueError), ("poison", TypeError)]


@pytest.mark.parametrize(("bad", "error"), BAD, ids=["surrogate", "half", "tokenizer"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_one_unreadable_prompt_costs_nobody_else_a_picture(pipe: Any, bad: str, error: type, field: str) -> None:
    wrong = {"prompt": "blue moon", "negative_prompt": "grey"} | {field: bad}
    params = PARAMS.model_copy(update={"true_cfg_scale": 2.0})
    with Omni.from_pipe(pipe, defaults=DEFAULTS) as omni:
        outputs = omni.generate(["red apple", wrong, "penguin"], params, use_tqdm=False)
        assert [output.ok for output in outputs] == [True, False, True]
        assert isinstance(outputs[1].error, error)
        assert not omni.engine.has_unfinished_requests()


@pytest.mark.parametrize("bad", [bad for bad, _ in BAD], ids=["surrogate", "half", "tokenizer"])
def test_a_serving_engine_goes_on(pipe: Any, bad: str) -> None:
    async def main() -> list[Any]:
        async def one(prompt: str) -> Any:
            return [output async for output in omni.generate(prompt, PARAMS)][-1]

        async with AsyncOmni.from_pipe(pipe, defaults=DEFAULTS) as omni:
            first = await asyncio.wait_for(asyncio.gather(one("red apple"), one(bad), return_exceptions=True), 60)
            return [*first, await asyncio.wait_for(one("penguin"), 60)]

    good, failed, later = asyncio.run(main())
    assert good.ok and later.ok
    assert isinstance(failed, OmniError | TypeError) or not failed.ok


class Processor(ProcessorMixin):
    """Called as FLUX.2's is: pictures come first, and a bare text is taken for one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        if images is not None:
            raise TypeError(f"not a valid image: {images!r}")
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        texts = [" ".join(part["text"] for message in one for part in message["content"]) for one in messages]
        for name in ("tokenize", "return_dict", "add_generation_prompt"):
            kwargs.pop(name, None)
        return self(text=texts, **kwargs | {"padding": kwargs.get("padding", True)})


def test_a_processor_in_the_tokenizers_place() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO / "tokenizer_2")
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer) + 64,
        "hidden_size": TEXT,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"intermediate_size": 37, "image_size": 30, "patch_size": 6, "num_channels": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
        ).eval()
    base = next(family for family in FAMILIES if family.name == "FLUX.2").build()
    parts = {name: base.components[name] for name in ("scheduler", "vae", "transformer")}
    pipe = d.Flux2Pipeline(text_encoder=encoder, tokenizer=Processor(tokenizer), **parts)
    pipe.set_progress_bar_config(disable=True)
    layers = {"text_encoder_out_layers": (1, 2, 3)}
    prompts = ["red apple", "penguin"]
    plain = [
        pipe(
            prompt=prompt,
            **layers,
            height=32,
            width=32,
            num_inference_steps=3,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
        ).images
        for i, prompt in enumerate(prompts)
    ]
    given = {"height": 32, "width": 32, "max_sequence_length": 32, "extra_args": layers, "output_type": "latent"}
    with Omni.from_pipe(pipe) as omni:
        params = [Params(num_inference_steps=3, seed=i, **given) for i in range(2)]
        outputs = omni.generate(prompts, params, use_tqdm=False)
    for output, wanted in zip(outputs, plain, strict=True):
        assert output.ok, output.error
        assert (output.latents - wanted).norm() < 1e-4 * wanted.norm()
        assert output.metrics["text_tokens"] > 0
