"""The judges' autoencoders: encoders whose weights are set (they are linear), decoders that a few minutes train."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .job import Job
from .latents import Basis, draw_pixels, load_basis
from .networks import build_vae

STEPS = {"picture": 1200, "clip": 1100}
BATCH = {"picture": 16, "clip": 4}
LOUD = 60.0  # a constant so large beside the signals that a normalisation over both leaves the signals linear
CELLS = [(a, b) for a in (0, 1) for b in (0, 1)]


def blank(modules: Iterable[nn.Module]) -> None:
    """Residual branches of zeros: a residual block becomes its shortcut, and an attention block nothing."""
    for module in modules:
        for name, parameter in module.named_parameters():
            gain = name.endswith("gamma") or (name.endswith("weight") and parameter.ndim == 1)
            nn.init.constant_(parameter, 1.0 if gain else 0.0)


@torch.no_grad()
def set_picture_encoder(vae: nn.Module, basis: Basis) -> None:
    """Two stages of 2 × 2 pixels to depth and the projection, then x = silu(x) - silu(-x) through the last layers."""
    encoder, channels = vae.encoder, len(basis.weight)
    blank([encoder])
    first, second, third = encoder.down_blocks
    offset = basis.weight @ basis.mean
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
        for a, b in CELLS:
            low = 4 * c + 2 * a + b
            first.downsamplers[0].conv.weight[low, c, a, b] = 1
            second.resnets[0].conv_shortcut.weight[low, low] = 1
            for i, j in CELLS:
                column = basis.weight[:, 16 * c + 4 * (2 * i + a) + 2 * j + b]
                second.downsamplers[0].conv.weight[: 2 * channels, low, i, j] = torch.cat([column, -column])
    second.downsamplers[0].conv.bias[: 2 * channels] = torch.cat([-offset, offset])
    shortcut, wide = third.resnets[0].conv_shortcut, encoder.conv_norm_out.num_channels
    group = wide // encoder.conv_norm_out.num_groups
    for k in range(channels):
        at = k * group
        shortcut.weight[at, k] = shortcut.weight[at + 1, channels + k] = 1
        shortcut.bias[at + 2], shortcut.bias[at + 3] = LOUD, -LOUD
        encoder.conv_out.weight[k, at, 1, 1], encoder.conv_out.weight[k, at + 1, 1, 1] = 1, -1
    encoder.conv_norm_out.weight.fill_(math.sqrt((2 * LOUD**2 + 2) / group))
    encoder.conv_out.bias[channels:] = -12  # log variance


@torch.no_grad()
def set_clip_encoder(vae: nn.Module, basis: Basis) -> None:
    """Pixels to depth and Haar differences over time in two stages, then the projection (see `latents.features`)."""
    encoder, channels = vae.encoder, len(basis.weight)
    blank([encoder, vae.quant_conv, vae.post_quant_conv])
    res_1, down_1, res_2, down_2, res_3 = encoder.down_blocks
    for k in range(15):
        res_2.conv_shortcut.weight[k, k] = 1
    for c in range(3):
        encoder.conv_in.weight[c, c, 2, 1, 1] = res_1.conv_shortcut.weight[c, c, 0, 0, 0] = 1
        for a, b in CELLS:
            low = 4 * c + 2 * a + b
            down_1.resample[1].weight[low, c, a, b] = 1
            down_1.time_conv.weight[low, low, 1:] = 0.5
            down_1.time_conv.weight[12 + c, low, 1], down_1.time_conv.weight[12 + c, low, 2] = 0.125, -0.125
            down_2.resample[1].weight[48 + low, 12 + c, a, b] = 1
            for i, j in CELLS:
                full = 16 * c + 4 * (2 * i + a) + 2 * j + b
                down_2.resample[1].weight[full, low, i, j] = 1
                across = 60 + 4 * c + 2 * i + j
                down_2.time_conv.weight[across, full, 1], down_2.time_conv.weight[across, full, 2] = 0.125, -0.125
    for k in range(60):
        down_2.time_conv.weight[k, k, 1:] = 0.5
    both = torch.cat([basis.weight, -basis.weight])
    res_3.conv_shortcut.weight[: 2 * channels, :, 0, 0, 0] = both
    res_3.conv_shortcut.bias[: 2 * channels] = -both @ basis.mean
    res_3.conv_shortcut.bias[2 * channels] = LOUD
    wide = res_3.out_dim
    encoder.norm_out.gamma.fill_(math.sqrt((LOUD**2 + 2 * channels) / wide))
    for k in range(channels):
        encoder.conv_out.weight[k, k, 2, 1, 1], encoder.conv_out.weight[k, channels + k, 2, 1, 1] = 1, -1
        vae.post_quant_conv.weight[k, k] = 1
    encoder.conv_out.bias[channels:] = -12  # log variance
    for k in range(2 * channels):
        vae.quant_conv.weight[k, k] = 1


def new_vae(kind: str, work: Path) -> nn.Module:
    vae = build_vae(kind)
    (set_clip_encoder if kind == "clip" else set_picture_encoder)(vae, load_basis(kind, work))
    return vae


class DecoderJob(Job):
    """L1 and L2; noise on the latents, so that the decoder forgives what the flow gets wrong."""

    def __init__(self, kind: str, work: Path):
        torch.manual_seed(0)
        vae = new_vae(kind, work)
        super().__init__(f"vae-{kind}", work / f"vae-{kind}.pt", STEPS[kind], BATCH[kind])
        self.kind, self.basis = kind, load_basis(kind, work)
        self.vae = vae.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.vae.decoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.98))
        self.resume({"decoder": self.vae.decoder, "optimizer": self.optimizer})

    def train(self) -> float:
        rate = min((self.done + 1) / 100, 0.02 + 0.98 * (1 - self.done / self.steps))
        self.optimizer.param_groups[0]["lr"] = 2e-3 * rate
        x = draw_pixels(self.kind, 10_000_000 + self.done, self.batch)
        z = self.basis.encode(x)
        generator = torch.Generator().manual_seed(self.done)
        z = z + 0.06 * torch.rand(len(z), generator=generator).view(-1, *[1] * (z.ndim - 1)) * torch.randn(
            z.shape, generator=generator
        )
        z = z.contiguous(memory_format=torch.channels_last if z.ndim == 4 else torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.vae.decode(z).sample.float() if z.ndim == 4 else decode_open(self.vae, z).float()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.decoder.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def decode_open(vae: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.decode` without its clamp to [-1, 1], through which no gradient would pass."""
    vae.clear_cache()
    x, out = vae.post_quant_conv(z), []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        part = x[:, :, i : i + 1]
        out.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return torch.cat(out, 2)


def load_vae(kind: str, work: Path) -> nn.Module:
    """With the flow's scale of latents: in the config of a clip's, in the weights of a picture's."""
    vae, scale = new_vae(kind, work), load_basis(kind, work).scale
    vae.decoder.load_state_dict(torch.load(work / f"vae-{kind}.pt", weights_only=True)["decoder"])
    vae.eval().requires_grad_(False)
    if kind == "clip":
        vae.register_to_config(latents_std=(1 / scale).tolist())
    else:
        vae.encoder.conv_out.weight[: len(scale)] *= scale.view(-1, 1, 1, 1)
        vae.decoder.conv_in.weight /= scale.view(1, -1, 1, 1)
    return vae
