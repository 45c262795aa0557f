"""Spectral normalisation of a discriminator (Miyato et al., ICLR 2018): every weight is used as W / sigma(W).

sigma is the largest singular value of W as a matrix (out, rest), from power iteration: sigma = u^T W v. torch's own
version iterates whenever the weight is used in training mode; a generation uses D many times, side by side. Here u
and v stand still while D is used and are moved once after each of D's updates: every pass sees the same D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 15  # from a random u, so that sigma is near at once


class SpectralNorm(nn.Module):
    """The parametrization W -> W / (u^T W v), differentiated with u and v held. Buffers u (out,), v (rest,)."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        matrix = weight.detach().flatten(1)
        u = torch.randn(len(matrix), generator=generator, dtype=matrix.dtype)
        self.register_buffer("u", F.normalize(u, dim=0))
        self.register_buffer("v", F.normalize(matrix.T @ self.u, dim=0))
        for _ in range(FIRST_ITERATIONS):
            self.iterate(weight)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # bfloat16 would miss sigma by a part in 250
            sigma = self.u @ (weight.flatten(1) @ self.v)
        return weight / sigma

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One step of power iteration, in place."""
        matrix = weight.detach().flatten(1)
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))


def add_spectral_norm(module: nn.Module, generator: torch.Generator) -> None:
    """Normalise every convolution and linear layer of `module`, in place."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight, generator))


def spectral_layers(module: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Each normalisation of `module` with the weight that it divides."""
    return [
        (norms[0], norms.original)
        for layer in module.modules()
        for name, norms in getattr(layer, "parametrizations", {}).items()
        if isinstance(norms[0], SpectralNorm)
    ]
