"""The latent: a mixture of K Gaussians whose means are drawn once (METHODS M7; [DAE] Algorithm 1, step 2)."""

from __future__ import annotations

import torch
from torch import Tensor


class Latent:
    """means (K, dim), scales (K,): component k is N(means[k], scales[k]^2 I). K = 1 is the standard normal.

    Means are uniform in [-1, 1] per axis and scales 1, so that at 100 axes neighbouring means lie about 8 scales
    apart. Both are kept with the weights.
    """

    def __init__(self, means: Tensor, scales: Tensor):
        self.means, self.scales = means, scales

    @staticmethod
    def draw(components: int, dim: int, generator: torch.Generator) -> Latent:
        means = torch.rand(components, dim, generator=generator) * 2 - 1
        return Latent(means if components > 1 else torch.zeros(1, dim), torch.ones(components))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise (count, dim) on the CPU: draw k uniformly, then z from component k."""
        k = torch.randint(len(self.means), (count,), generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means[k] + self.scales[k, None] * z
