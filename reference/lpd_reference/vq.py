"""LlamaGen's VQ tokenizer (arXiv 2406.06525): images to token indices and back, in PyTorch.

Knows the encoder, the quantizer and the decoder; parameter names and shapes are those of the
released `vq_ds16_c2i.pt`. It does not know what generates the indices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class VQConfig:
    """The tokenizer's architecture; the defaults are the released VQ-16's."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the full resolution down."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and 3x3 convolution, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention of all cells, one head, scale C^-1/2, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # [B, 1, cells, C]: one head whose tokens are the cells.
        query, key, value = (
            convolution(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for convolution in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; attention follows each residual block where there is any."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.res = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(channels_out) for _ in range(blocks * attention))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, residual in enumerate(self.res):
            x = residual(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels),
        AttentionBlock(channels),
        ResidualBlock(channels, channels),
    )


class Encoder(nn.Module):
    """Pixels [B, 3, height, width] to latents [B, z, height / stride, width / stride]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            below = config.channels if i == 0 else widths[i - 1]
            level = Level(below, width, config.num_res_blocks, attention=last)
            if not last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, z, h, w] to pixels [B, 3, h * stride, w * stride]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            below = widths[max(i - 1, 0)]
            level = Level(below, width, config.num_res_blocks + 1, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook: the nearest row by cosine, and back."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def codebook(self) -> Tensor:
        """[codebook_size, codebook_dim], rows L2-normalised as they are used."""
        return F.normalize(self.embedding.weight, dim=-1)

    def forward(self, latent: Tensor) -> Tensor:
        """Indices [B, h * w] of latents [B, codebook_dim, h, w]."""
        unit = F.normalize(latent.flatten(2).transpose(1, 2), dim=-1)
        return (unit @ self.codebook().T).argmax(dim=-1)


class VQTokenizer(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def initialize(self, seed: int) -> VQTokenizer:
        """Draws every weight from `seed`, scaled to keep activations near unit variance."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
            else:
                nn.init.constant_(
                    parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0
                )
        return self

    def encode_latent(self, image: Tensor) -> Tensor:
        """Latents [B, codebook_dim, h, w] before the codebook, of an image [B, 3, H, W]."""
        return self.quant_conv(self.encoder(image))

    def encode(self, image: Tensor) -> Tensor:
        """Token indices [B, h * w] int64, raster order, of an image [B, 3, H, W] in [-1, 1]."""
        return self.quantize(self.encode_latent(image))

    def decode(self, indices: Tensor) -> Tensor:
        """An image [B, 3, H, W], in [-1, 1] up to overshoot, of indices [B, S] of a square grid."""
        grid = math.isqrt(indices.shape[1])
        if grid * grid != indices.shape[1]:
            raise ValueError(f"{indices.shape[1]} indices do not make a square grid")
        rows = self.quantize.codebook()[indices]
        latent = rows.transpose(1, 2).unflatten(2, (grid, grid))
        return self.decoder(self.post_quant_conv(latent))
