"""Train the text-to-image model in the box: a small FLUX that draws a few hundred emoji.

Four stages, each resumable: ``vae`` (a 4-channel autoencoder), ``flow`` (transformer and text encoders together,
rectified flow), ``export`` (an ordinary diffusers ``FluxPipeline`` folder) and ``evaluate`` (does the picture of a
caption look most like the caption's own training picture?). Data: the npm package ``emoji-datasource-google`` (MIT;
artwork: Noto Emoji, Apache-2.0). On two CPU cores the whole thing takes about two hours.

    python tools/train_demo_model.py all --work build/demo-model
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
MODEL_DIR = REPO / "vllm_omni" / "assets" / "demo"
DATA_PACKAGE = "emoji-datasource-google@16.0.0"
SIZE = 64  # pixels
TEXT_TOKENS = 16
QUOTAS = {
    "Animals & Nature": 70,
    "Food & Drink": 60,
    "Travel & Places": 30,
    "Activities": 20,
    "Smileys & Emotion": 12,
    "Objects": 8,
}
FIRST = {
    "red apple", "banana", "strawberry", "watermelon", "pineapple", "carrot", "hamburger", "doughnut", "slice of pizza",
    "birthday cake", "cat face", "dog face", "penguin", "octopus", "frog face", "panda face", "butterfly", "sunflower",
    "cactus", "mushroom", "rocket", "rainbow", "sailboat", "balloon", "soccer ball", "grinning face",
    "smiling face with sunglasses", "red heart", "guitar", "umbrella", "snowman", "christmas tree",
}  # fmt: skip
MIN_RMSE = 0.16  # pictures nearer to one already chosen than this are left out
PREFIXES = ["", "", "", "", "a ", "A ", "the ", "an emoji of a ", "a picture of a ", "A picture of a "]


# --------------------------------------------------------------------------------------------------------- data
def fetch_data(work: Path) -> Path:
    """The unpacked npm package, downloaded once."""
    root = work / "emoji" / "package"
    if not root.exists():
        work.mkdir(parents=True, exist_ok=True)
        archive = subprocess.check_output(["npm", "pack", "--silent", DATA_PACKAGE], cwd=work, text=True).split()[-1]
        with tarfile.open(work / archive) as tar:
            tar.extractall(work / "emoji", filter="data")
    return root


def read_picture(path: Path) -> torch.Tensor:
    """RGB on white, (3, 64, 64) in [-1, 1]."""
    rgba = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(rgba.resize((SIZE, SIZE), Image.Resampling.LANCZOS) if rgba.size != (SIZE, SIZE) else rgba)
    return torch.from_numpy(np.array(canvas.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def load_data(work: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions and pictures of the chosen set, and the pictures of every emoji (for the autoencoder)."""
    root = fetch_data(work)
    entries = [e for e in json.loads((root / "emoji.json").read_text()) if e["has_img_google"]]
    entries.sort(key=lambda e: e["sort_order"])
    random.Random(0).shuffle(entries)
    entries.sort(key=lambda e: e["name"].lower() not in FIRST)
    captions: list[str] = []
    chosen: list[torch.Tensor] = []
    everything: list[torch.Tensor] = []
    left = dict(QUOTAS)
    for entry in entries:
        if entry["category"] in ("Flags", "Component"):
            continue
        picture = read_picture(root / "img" / "google" / "64" / entry["image"])
        everything.append(picture)
        name = entry["name"].lower()
        if left.get(entry["category"], 0) == 0 or len(name.split()) > 5 or "clock face" in name:
            continue
        if chosen and ((torch.stack(chosen) - picture) / 2).pow(2).mean((1, 2, 3)).sqrt().min() < MIN_RMSE:
            continue
        left[entry["category"]] -= 1
        captions.append(name)
        chosen.append(picture)
    return captions, torch.stack(chosen), torch.stack(everything)


# ------------------------------------------------------------------------------------------------------- models
def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_tokenizers(captions: list[str]):
    """A CLIP (BPE) and a T5 (Unigram) tokenizer that know the captions' words and every printable character."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5TokenizerFast

    texts = captions + [p + "x" for p in PREFIXES]
    # CLIP: bytes, bytes at the end of a word, then merges.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1536, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokens = letters + [c + "</w>" for c in letters]
    tokens += [*sorted(set(learnt["vocab"]) - set(tokens)), "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    clip = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=32, pad_token="<|endoftext|>"
    )
    # T5: whole words as single pieces, characters for everything else.
    lower = {w for t in texts for w in [*t.split(), *t.replace("-", " ").split()]}
    words = sorted(lower | {w.capitalize() for w in lower})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + w, -6.0) for w in words] + [(chr(c), -9.0) for c in range(33, 127)]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)
    return clip, t5


def build_text_encoders(clip_tokenizer, t5_tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            projection_dim=128,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )
    return clip, t5


def build_transformer():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


# ----------------------------------------------------------------------------------------------------- training
def lr_at(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train_vae(work: Path, steps: int, batch: int = 16) -> None:
    """L1 with a small KL term; noise on the latents, so that the decoder forgives what the flow gets wrong."""
    done = work / "vae.safetensors"
    if done.exists():
        return
    _, chosen, everything = load_data(work)
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.98))
    bar = tqdm(range(steps), desc="vae", mininterval=10)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, 2e-3)
        index = torch.randint(len(chosen), (batch // 2,)), torch.randint(len(everything), (batch // 2,))
        x = torch.cat([chosen[index[0]], everything[index[1]]]).to(memory_format=torch.channels_last)
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z + 0.08 * z.std().detach() * torch.randn_like(z)).sample
        loss = F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 1e-4 * (z.pow(2).mean() - 1).clamp_min(0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", mse_db=f"{-10 * math.log10(((y - x) / 2).pow(2).mean()):.1f}")
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, done)


@torch.inference_mode()
def encode_latents(work: Path, pictures: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Normalised latents (n, 64 tokens, 16), and the scaling and shift that normalise them."""
    from diffusers import FluxPipeline

    vae = build_vae()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    z = torch.cat([vae.encode(p).latent_dist.mode() for p in pictures.split(32)])
    shift, scaling = z.mean().item(), 1 / z.std().item()
    z = (z - shift) * scaling
    return FluxPipeline._pack_latents(z, len(z), *z.shape[1:]), scaling, shift


def load_tokenizers(work: Path, captions: list[str]):
    """Built once and kept with the checkpoints: the BPE trainer breaks ties differently in every process."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder = work / "tokenizers"
    if not folder.exists():
        clip, t5 = build_tokenizers(captions)
        clip.save_pretrained(folder / "clip")
        t5.save_pretrained(folder / "t5")
    return CLIPTokenizer.from_pretrained(folder / "clip"), T5TokenizerFast.from_pretrained(folder / "t5")


class Flow(torch.nn.Module):
    """Transformer and text encoders: what the flow stage trains, and what its checkpoints hold."""

    def __init__(self, work: Path, captions: list[str]):
        super().__init__()
        self.tokenizer, self.tokenizer_2 = load_tokenizers(work, captions)
        self.text_encoder, self.text_encoder_2 = build_text_encoders(self.tokenizer, self.tokenizer_2)
        self.transformer = build_transformer()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
        pooled = self.text_encoder(ids).pooler_output
        ids = self.tokenizer_2(
            texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        words = self.text_encoder_2(ids)[0]
        side = int(math.sqrt(x.shape[1]))
        img_ids = torch.zeros(side, side, 3)
        img_ids[..., 1] = torch.arange(side)[:, None]
        img_ids[..., 2] = torch.arange(side)[None]
        return self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=words,
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            img_ids=img_ids.reshape(-1, 3),
            return_dict=False,
        )[0]


def augment(caption: str) -> str:
    """10 % of captions are dropped; the others come bare, with an article, or with a capital letter."""
    if random.random() < 0.1:
        return ""
    text = random.choice(PREFIXES) + caption
    return text[0].upper() + text[1:] if random.random() < 0.2 else text


def train_flow(work: Path, steps: int, batch: int = 32, peak: float = 1e-3) -> None:
    """Rectified flow on latents: x_sigma = (1 - sigma) x0 + sigma noise, target noise - x0; logit-normal sigma."""
    captions, pictures, _ = load_data(work)
    latents, _, _ = encode_latents(work, pictures)
    torch.manual_seed(1)
    random.seed(1)
    flow = Flow(work, captions)
    ema = copy.deepcopy(flow).requires_grad_(False)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    start, file = 0, work / "flow.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        flow.load_state_dict(state["flow"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        torch.manual_seed(1000 + start)
        random.seed(1000 + start)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="flow", mininterval=10)
    running = None
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, peak)
        index = torch.randint(len(latents), (batch,))
        texts = [augment(captions[i]) for i in index.tolist()]
        x0, noise = latents[index], torch.randn(batch, *latents.shape[1:])
        sigma = torch.sigmoid(0.3 + 1.1 * torch.randn(batch))
        guidance = 1 + 4 * torch.rand(batch)
        x = torch.lerp(x0, noise, sigma[:, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = flow(x, sigma, guidance, texts)
        loss = F.mse_loss(velocity.float(), noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(flow.parameters()), 1 - decay)
        if step % 20 == 0:
            running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"flow": flow.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)


# ------------------------------------------------------------------------------------------------------- export
def export(work: Path, target: Path) -> None:
    """Write the diffusers folder: half-precision safetensors, and the defaults a user of the model wants."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    captions, pictures, _ = load_data(work)
    _, scaling, shift = encode_latents(work, pictures)
    vae = build_vae()
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    flow = Flow(work, captions)
    state = torch.load(work / "flow.pt", weights_only=True)
    flow.load_state_dict(state["ema"])
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=flow.text_encoder,
        tokenizer=flow.tokenizer,
        text_encoder_2=flow.text_encoder_2,
        tokenizer_2=flow.tokenizer_2,
        transformer=flow.transformer,
    )
    shutil.rmtree(target, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)
    defaults = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": TEXT_TOKENS,
    }
    (target / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")
    (target / "captions.txt").write_text("\n".join(captions) + "\n")
    (target / "NOTICE").write_text(
        "Trained by tools/train_demo_model.py on pictures of the npm package emoji-datasource-google (MIT licence,\n"
        "copyright Cal Henderson). The artwork is Noto Emoji, copyright Google LLC, Apache License 2.0.\n"
    )
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {size / 1e6:.1f} MB after {state['step']} steps")


@torch.inference_mode()
def evaluate(work: Path, target: Path, count: int = 100, sheet: Path | None = None) -> None:
    """For how many captions is the picture's nearest training picture (RMSE over pixels) the caption's own?"""
    from diffusers import FluxPipeline

    captions, pictures, _ = load_data(work)
    pipeline = FluxPipeline.from_pretrained(target, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    own = torch.linspace(0, len(captions) - 1, count).round().long()
    images = []
    for part in tqdm(own.split(20), desc="evaluate"):
        images.append(
            pipeline(
                [captions[i] for i in part],
                generator=[torch.Generator("cpu").manual_seed(int(i)) for i in part],
                height=SIZE,
                width=SIZE,
                num_inference_steps=28,
                max_sequence_length=TEXT_TOKENS,
                output_type="pt",
            ).images
        )
    got = torch.cat(images).float() * 2 - 1
    distance = torch.cdist(got.flatten(1), pictures.flatten(1)) / math.sqrt(2 * 2 * got[0].numel())
    right = (distance.argmin(1) == own).sum().item()
    mean = distance[torch.arange(count), own].mean().item()
    if sheet is not None:
        rows = []
        for part in torch.arange(count).split(20):
            rows += [torch.cat(list(got[part]), 2), torch.cat(list(pictures[own[part]]), 2)]
        width = max(r.shape[2] for r in rows)
        board = torch.cat([F.pad(r, (0, width - r.shape[2]), value=1.0) for r in rows], 1)
        Image.fromarray(((board.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(sheet)
    print(json.dumps({"captions": count, "nearest_is_own": right, "mean_rmse_to_own": round(mean, 4)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "flow", "export", "evaluate", "all"])
    parser.add_argument("--work", type=Path, default=REPO / "build" / "demo-model", help="data and checkpoints")
    parser.add_argument("--target", type=Path, default=MODEL_DIR, help="where the model folder goes")
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--flow-steps", type=int, default=4500)
    parser.add_argument("--count", type=int, default=100, help="captions to evaluate")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    if args.stage in ("vae", "all"):
        train_vae(args.work, args.vae_steps)
    if args.stage in ("flow", "all"):
        train_flow(args.work, args.flow_steps)
    if args.stage in ("export", "all"):
        export(args.work, args.target)
    if args.stage in ("evaluate", "all"):
        evaluate(args.work, args.target, args.count, sheet=args.work / "evaluate.png")
    print(f"{args.stage}: {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
