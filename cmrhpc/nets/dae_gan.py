"""The DAE-GAN pair (METHODS M8; [DAE] Table 1, Figs 3 and 5).

Widths and strides are not printed in the paper. Ours halve the width whenever the resolution doubles and do little
work at full resolution. Neither network mixes the samples of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmrhpc.nets.blocks import SLOPE, DownBlock, SelfAttention, UpBlock, initialise
from cmrhpc.nets.quick import FewMapsConv2d
from cmrhpc.study import start_and_ups


class ResidualGenerator(nn.Module):
    """Noise -> linear -> residual, residual -> self-attention -> residual, residual -> conv 3x3, tanh.

    z (N, latent_dim) -> images (N, channels, size, size) in [-1, 1]. Widths 8c, 4c, 2c, c, c/2 with c =
    `base_channels`. A size of start * 2^u upsamples in the last u of the four blocks.
    """

    mixes_samples = False

    def __init__(self, image_size: int, channels: int, latent_dim: int, base_channels: int):
        super().__init__()
        c = base_channels
        self.start, ups = start_and_ups(image_size)
        widths = [8 * c, 4 * c, 2 * c, c, max(4, c // 2)]
        self.linear = nn.Linear(latent_dim, widths[0] * self.start**2)
        self.block1 = UpBlock(widths[0], widths[1], up=ups >= 4)
        self.block2 = UpBlock(widths[1], widths[2], up=ups >= 3)
        self.attention = SelfAttention(widths[2])
        self.block3 = UpBlock(widths[2], widths[3], up=ups >= 2)
        self.block4 = UpBlock(widths[3], widths[4], up=ups >= 1)
        self.conv = FewMapsConv2d(widths[4], channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, self.start, self.start))
        x = self.block2(self.block1(x))
        x = self.block4(self.block3(self.attention(x)))
        return torch.tanh(self.conv(F.leaky_relu(x, SLOPE, inplace=True)))


class ResidualDiscriminator(nn.Module):
    """Conv 3x3 -> residual -> self-attention -> residual x3 -> linear: images (N, channels, size, size) -> logits (N,).

    The first convolution has stride 2; the first u - 1 residual blocks halve the resolution again. No norm.
    """

    mixes_samples = False

    def __init__(self, image_size: int, channels: int, base_channels: int):
        super().__init__()
        c = base_channels
        start, ups = start_and_ups(image_size)
        widths = [c, 2 * c, 4 * c, 4 * c, 4 * c]
        self.conv = nn.Conv2d(channels, widths[0], 3, stride=2, padding=1)
        self.block1 = DownBlock(widths[0], widths[1], down=ups >= 2)
        self.attention = SelfAttention(widths[1])
        self.block2 = DownBlock(widths[1], widths[2], down=ups >= 3)
        self.block3 = DownBlock(widths[2], widths[3], down=ups >= 4)
        self.block4 = DownBlock(widths[3], widths[4], down=False)
        self.linear = nn.Linear(widths[4] * start**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.block1(self.conv(x)))
        x = self.block4(self.block3(self.block2(x)))
        return self.linear(F.leaky_relu(x, SLOPE).flatten(1))[:, 0]


def residual_pair(
    image_size: int, channels: int, latent_dim: int, base_channels: int, generator: torch.Generator
) -> tuple[ResidualGenerator, ResidualDiscriminator]:
    """G and D with seeded initial weights. Raises BadInput for an image size that does not fit."""
    g = ResidualGenerator(image_size, channels, latent_dim, base_channels)
    d = ResidualDiscriminator(image_size, channels, base_channels)
    initialise(g, generator)
    initialise(d, generator)
    return g, d
