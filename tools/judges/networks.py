"""The judges' networks: ordinary diffusers and transformers classes in small sizes, and how the training calls them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from train_demo_model import load_tokenizers

from .scenes import vocabulary

TEXT_TOKENS = 10
WIDTH = 128  # of text encoders
SIDE, FRAMES = 32, 17
LATENTS = {"images": (8, 8, 8), "joint": (8, 8, 8), "video": (16, 5, 8, 8)}  # of latents
GATE = {"images": 0.4, "joint": 0.7, "video": 0.7}
VAE_OF = {"images": "picture", "joint": "picture", "video": "clip"}


def build_vae(kind: str) -> nn.Module:
    from diffusers import AutoencoderKL, AutoencoderKLWan

    if kind == "clip":
        return AutoencoderKLWan(
            base_dim=12,
            decoder_base_dim=8,
            z_dim=16,
            dim_mult=[3, 6, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_config(tokenizer, layers: int, width: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=32,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_arguments(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def start_open(transformer: nn.Module, gate: float) -> None:
    """Weights of unit gain and residual gates that start open, at `gate`: a short training has no time to open them."""
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in transformer.named_modules():
        leaf = name.rsplit(".", 2)[-2:]
        if leaf[-1] == "linear" and leaf[0].startswith("norm"):  # adaptive normalisation: shift, scale, gate in turn
            parts = module.out_features // module.in_features
            nn.init.zeros_(module.weight)
            for part in range(2, parts, 3):
                module.bias[part * module.in_features : (part + 1) * module.in_features] = gate
        if name.endswith("time_proj") and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
    for name, parameter in transformer.named_parameters():
        if name.startswith("blocks.") and name.endswith("scale_shift_table"):
            parameter.zero_()
            parameter[:, 2::3] = gate
    nn.init.zeros_(transformer.proj_out.weight)


class Judge(nn.Module):
    """Transformer and text encoders: what the flow stage trains, and what its checkpoints hold."""

    name: str

    def __init__(self, work: Path):
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = load_tokenizers(work / self.name, vocabulary(self.name))
        self.clip_tokenizer.model_max_length = self.t5_tokenizer.model_max_length = TEXT_TOKENS
        self.build()
        start_open(self.transformer, GATE[self.name])

    def build(self) -> None:
        raise NotImplementedError

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """d x / d sigma of latents as the VAE has them (normalised)."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        raise NotImplementedError

    @staticmethod
    def ids(tokenizer, texts: list[str]):
        return tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")


class Images(Judge):
    """FLUX: 4 double and 16 single blocks."""

    name = "images"

    def build(self) -> None:
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextModel, T5Config, T5EncoderModel

        self.text_encoder = CLIPTextModel(clip_config(self.clip_tokenizer, 1, 64))
        self.text_encoder_2 = T5EncoderModel(T5Config(**t5_arguments(self.t5_tokenizer)))
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=32,
            num_layers=4,
            num_single_layers=16,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=64,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )

    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, texts: list[str]) -> torch.Tensor:
        from diffusers import FluxPipeline

        n, channels, height, width = x.shape
        out = self.transformer(
            hidden_states=FluxPipeline._pack_latents(x, n, channels, height, width),
            timestep=sigma,
            pooled_projections=self.text_encoder(self.ids(self.clip_tokenizer, texts).input_ids).pooler_output,
            encoder_hidden_states=self.text_encoder_2(self.ids(self.t5_tokenizer, texts).input_ids)[0],
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x.device, torch.float32),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(out, height, width, 1)


class Joint(Judge):
    """Stable Diffusion 3: six joint blocks, three text encoders."""

    name = "joint"

    def build(self) -> None:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

        self.text_encoder = CLIPTextModelWithProjection(clip_config(self.clip_tokenizer, 2, 64))
        self.text_encoder_2 = CLIPTextModelWithProjection(clip_config(self.clip_tokenizer, 1, 64))
        self.text_encoder_3 = T5EncoderModel(T5Config(**t5_arguments(self.t5_tokenizer)))
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=WIDTH,
            caption_projection_dim=160,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, texts: list[str]) -> torch.Tensor:
        ids = self.ids(self.clip_tokenizer, texts).input_ids
        clips = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        words = torch.cat([c.hidden_states[-2] for c in clips], -1)
        words = torch.cat([words, self.text_encoder_3(self.ids(self.t5_tokenizer, texts).input_ids)[0]], 1)
        return self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=words,
            pooled_projections=torch.cat([c.text_embeds for c in clips], -1),
            return_dict=False,
        )[0]


class Video(Judge):
    """Wan: six blocks over 5 frames of 8 × 8 latents."""

    name = "video"

    def build(self) -> None:
        from diffusers import WanTransformer3DModel
        from transformers import UMT5Config, UMT5EncoderModel

        self.text_encoder = UMT5EncoderModel(UMT5Config(**t5_arguments(self.t5_tokenizer)))
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=5,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=WIDTH,
            freq_dim=128,
            ffn_dim=480,
            num_layers=6,
            rope_max_seq_len=32,
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, texts: list[str]) -> torch.Tensor:
        tokens = self.ids(self.t5_tokenizer, texts)
        words = self.text_encoder(tokens.input_ids, tokens.attention_mask)[0] * tokens.attention_mask[..., None]
        return self.transformer(hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=words, return_dict=False)[
            0
        ]


JUDGES: dict[str, type[Judge]] = {"images": Images, "video": Video, "joint": Joint}
