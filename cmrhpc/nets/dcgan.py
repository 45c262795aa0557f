"""The DCGAN pair (baselines DCGAN, ACGAN and Evolutionary GAN): batch norm in both, 1.3 M + 0.7 M parameters at 80.

With `n_classes` > 0 the pair is conditional (ACGAN): a class embedding joins the noise, and the discriminator has an
auxiliary class head.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmrhpc.nets.blocks import SLOPE
from cmrhpc.nets.quick import FewMapsConvTranspose2d
from cmrhpc.study import start_and_ups

EMBEDDING = 32  # width of a class embedding
EMBEDDING_STD = 0.1  # its initial scale: at 1 the class outweighs the noise for good, and each class becomes one image


class DCGenerator(nn.Module):
    """Linear, then one transposed convolution 4x4 stride 2 per doubling, batch norm and ReLU between, tanh.

    z (N, latent_dim) [, label (N,)] -> images (N, channels, size, size) in [-1, 1]. Widths 8c, 4c, 2c, c.
    """

    mixes_samples = True

    def __init__(self, image_size: int, channels: int, latent_dim: int, base_channels: int, n_classes: int = 0):
        super().__init__()
        self.start, ups = start_and_ups(image_size)
        widths = [base_channels * 2**i for i in reversed(range(ups))]
        self.embedding = nn.Embedding(n_classes, EMBEDDING) if n_classes else None
        self.linear = nn.Linear(latent_dim + (EMBEDDING if n_classes else 0), widths[0] * self.start**2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        convs: list[nn.Module] = [
            nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        ]
        self.convs = nn.ModuleList([*convs, FewMapsConvTranspose2d(widths[-1], channels)])

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(label)], dim=1)
        x = self.linear(z).unflatten(1, (-1, self.start, self.start))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(F.relu(norm(x)))
        return torch.tanh(x)


class DCDiscriminator(nn.Module):
    """One convolution 4x4 stride 2 per halving, batch norm after all but the first, leaky ReLU, linear.

    Images (N, channels, size, size) -> logits (N,), or with `n_classes` (logits (N,), class logits (N, n_classes)).
    Without `batch_norm` it mixes no samples; spectral norm takes its place then, since batch norm would undo the scale.
    """

    def __init__(self, image_size: int, channels: int, base_channels: int, n_classes: int = 0, batch_norm: bool = True):
        super().__init__()
        self.mixes_samples = batch_norm
        start, ups = start_and_ups(image_size)
        widths = [channels, *(base_channels * 2**i for i in range(ups))]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1, bias=i == 0 or not batch_norm)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(width) if i and batch_norm else nn.Identity() for i, width in enumerate(widths[1:])
        )
        self.linear = nn.Linear(widths[-1] * start**2, 1)
        self.head = nn.Linear(widths[-1] * start**2, n_classes) if n_classes else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        x = x.flatten(1)
        logit = self.linear(x)[:, 0]
        return logit if self.head is None else (logit, self.head(x))


def dcgan_pair(
    image_size: int,
    channels: int,
    latent_dim: int,
    base_channels: int,
    generator: torch.Generator,
    n_classes: int = 0,
    batch_norm: bool = True,
) -> tuple[DCGenerator, DCDiscriminator]:
    """G and D with DCGAN's seeded initial weights: normal(0, 0.02), batch-norm scales normal(1, 0.02).

    batch_norm: in D. Raises BadInput for an image size that does not fit.
    """
    g = DCGenerator(image_size, channels, latent_dim, base_channels, n_classes)
    d = DCDiscriminator(image_size, channels, base_channels, n_classes, batch_norm)
    for module in [*g.modules(), *d.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d | nn.Embedding):
            centre = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            std = EMBEDDING_STD if isinstance(module, nn.Embedding) else 0.02
            with torch.no_grad():
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.zero_() if name == "bias" else parameter.normal_(centre, std, generator=generator)
    return g, d
