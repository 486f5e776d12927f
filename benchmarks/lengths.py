"""What padding prompts to a common length gives: requests with prompts of several lengths, with it and without.

Random weights, guidance on, all requests at once. Without padding a forward holds texts of one length alone. Beside it
what prompts that all have their mean length would give, which no padding can exceed by much: where the processor is
busy with a few rows already, more rows in a forward gain nothing. Prints seconds and full forwards of each, and how far
a picture is from that of the request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import arguments, begin, interleaved, last_line, paired_ratio, table

TOKENS, WIDTH = (9, 12, 17, 21, 26, 31, 38, 44), 64
FAR = (8, 400)


def qwen() -> Any:
    """A Qwen-Image of ten million parameters."""
    import diffusers as d

    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 12, "attention_head_dim": 32}
    sizes |= {"num_attention_heads": 8, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 12, 12)}
    torch.manual_seed(0)
    model = d.QwenImageTransformer2DModel(**sizes).eval()
    euler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return d.QwenImagePipeline(euler, None, None, None, model)


def z_image() -> Any:
    """A Z-Image of ten million parameters."""
    import diffusers as d

    sizes = {"in_channels": 4, "dim": 256, "n_layers": 10, "n_refiner_layers": 1, "n_heads": 8, "n_kv_heads": 8}
    sizes |= {"cap_feat_dim": WIDTH, "axes_dims": [8, 12, 12], "axes_lens": [512, 64, 64]}
    torch.manual_seed(0)
    model = d.ZImageTransformer2DModel(**sizes).eval()
    return d.ZImagePipeline(d.FlowMatchEulerDiscreteScheduler(), None, None, None, model)


def flux2() -> Any:
    """A FLUX.2 klein of ten million parameters; its latents are packed by its VAE's statistics."""
    import diffusers as d

    sizes = {"in_channels": 16, "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 32}
    sizes |= {"num_attention_heads": 8, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 8, 8, 8)}
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    ends |= {"latent_channels": 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
    torch.manual_seed(0)
    model = d.Flux2Transformer2DModel(**sizes, guidance_embeds=False).eval()
    vae = d.AutoencoderKLFlux2(**ends).eval()
    euler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return d.Flux2KleinPipeline(scheduler=euler, vae=vae, text_encoder=None, tokenizer=None, transformer=model)


def chroma() -> Any:
    """A Chroma of ten million parameters."""
    import diffusers as d

    sizes = {"in_channels": 16, "num_layers": 4, "num_single_layers": 6, "attention_head_dim": 32}
    sizes |= {"num_attention_heads": 8, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 12, 12)}
    sizes |= {"approximator_num_channels": 16, "approximator_hidden_dim": 64, "approximator_layers": 1}
    torch.manual_seed(0)
    model = d.ChromaTransformer2DModel(**sizes).eval()
    return d.ChromaPipeline(d.FlowMatchEulerDiscreteScheduler(), None, None, None, model)


def qwen_prompt(tokens: int, i: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(i)
    given: dict[str, Any] = {}
    for name, length in (("prompt_embeds", tokens), ("negative_prompt_embeds", max(4, tokens // 2))):
        given |= {
            name: torch.randn(1, length, WIDTH, generator=generator),
            f"{name}_mask": torch.ones(1, length).long(),
        }
    return given


def z_prompt(tokens: int, i: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(i)
    return {
        "prompt_embeds": [torch.randn(tokens, WIDTH, generator=generator)],
        "negative_prompt_embeds": [torch.randn(max(4, tokens // 2), WIDTH, generator=generator)],
    }


def flux2_prompt(tokens: int, i: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(i)
    lengths = {"prompt_embeds": tokens, "negative_prompt_embeds": max(4, tokens // 2)}
    return {name: torch.randn(1, length, WIDTH, generator=generator) for name, length in lengths.items()}


def chroma_prompt(tokens: int, i: int) -> dict[str, Any]:
    given = flux2_prompt(tokens, i)
    masks = {"prompt_attention_mask": "prompt_embeds", "negative_prompt_attention_mask": "negative_prompt_embeds"}
    return given | {name: torch.ones(given[of].shape[:2], dtype=torch.bool) for name, of in masks.items()}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int, int], dict[str, Any]], str]] = {
    "Qwen-Image-like": (qwen, qwen_prompt, "true_cfg_scale"),
    "Z-Image-like": (z_image, z_prompt, "guidance_scale"),
    "FLUX.2-like": (flux2, flux2_prompt, "guidance_scale"),
    "Chroma-like": (chroma, chroma_prompt, "guidance_scale"),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", type=int, default=128, help="of a picture, in pixels (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    machine = begin(options)
    figures = {}
    for name in options.models:
        build, prompt, guidance = MODELS[name]
        for kind, lengths in (("close", TOKENS), ("far apart", FAR)):
            figures[f"{name}, {kind}"] = case = measure(options, build, prompt, guidance, lengths)
            print(f"{name}, {kind}: {case['ratio']:.2f}, with equal lengths {case['equal']:.2f}", flush=True)
    headers = [
        "model, lengths",
        "throughput, of that without padding",
        "equal lengths",
        "forwards",
        "without padding",
        "away from alone",
    ]
    rows = [
        [name, f["ratio"], f["equal"], f["forwards"], f["forwards_apart"], f"{f['away']:.1e}"]
        for name, f in figures.items()
    ]
    table(headers, rows)
    last_line({"benchmark": "lengths", **machine, "requests": options.requests, "side": options.side, "cases": figures})


def measure(
    options: Any, build: Callable[[], Any], prompt: Callable[[int, int], Any], guidance: str, lengths: tuple[int, ...]
) -> dict[str, float]:
    """Ratios of throughputs, forwards of each, and the largest distance to a request alone, of its largest latent."""
    from vllm_omni import Omni
    from vllm_omni import OmniDiffusionSamplingParams as Params
    from vllm_omni.diffusion.worker import batching

    mixed = [prompt(lengths[i % len(lengths)], i) for i in range(options.requests)]
    equal = [prompt(round(sum(lengths) / len(lengths)), i) for i in range(options.requests)]
    common = {"num_inference_steps": options.steps, "output_type": "latent", guidance: 3.0}
    params = [Params(seed=i, **common) for i in range(options.requests)]
    counts: dict[str, int] = {}
    made: dict[str, Any] = {}
    own = batching._text_shape
    shapes = {"padded": own, "apart": lambda text, value, latents: of_one_length(value), "equal": own}
    config = {"max_num_seqs": options.requests, "defaults": {"height": options.side, "width": options.side}}
    with Omni.from_pipe(build(), **config) as omni:
        forwards = omni.engine.worker.runner.forwards

        def run(kind: str) -> None:
            batching._text_shape = shapes[kind]
            before = sum(forwards.values())
            made[kind] = omni.generate(equal if kind == "equal" else mixed, params, use_tqdm=False)
            counts[kind] = sum(forwards.values()) - before

        jobs: dict[str, Callable[[], None]] = {kind: partial(run, kind) for kind in shapes}
        timed = interleaved(jobs, options.repeats)
        batching._text_shape = own
        away = 0.0
        for i in range(0, options.requests, 7):
            alone = omni.generate(mixed[i], params[i], use_tqdm=False)[0]
            distance = (made["padded"][i].latents - alone.latents).abs().max() / alone.latents.abs().max()
            away = max(away, float(distance))
    ratio, limit = (paired_ratio(timed["apart"], timed[kind]) for kind in ("padded", "equal"))
    return {
        "ratio": ratio,
        "equal": limit,
        "forwards": counts["padded"],
        "forwards_apart": counts["apart"],
        "away": away,
    }


def of_one_length(value: Any) -> Any:
    """What must agree of a text if nothing is padded: its very shape."""
    return value.shape if isinstance(value, torch.Tensor) else tuple(entry.shape for entry in value or ())


if __name__ == "__main__":
    main()
