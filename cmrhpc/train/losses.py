"""The losses of the papers, from logits, in their symbols (METHODS M4 to M6, M9). D(.) is the sigmoid of a logit.

softplus(l) = -log(1 - D) and softplus(-l) = -log D, which never overflows as log(sigmoid) would.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def minimax(logit: Tensor) -> Tensor:
    """1/2 E[log(1 - D(G(z)))] ([DAE] 3)."""
    return -0.5 * F.softplus(logit).mean()


def heuristic(logit: Tensor) -> Tensor:
    """-1/2 E[log D(G(z))] ([DAE] 4)."""
    return 0.5 * F.softplus(-logit).mean()


def least_squares(logit: Tensor) -> Tensor:
    """E[(D(G(z)) - 1)^2] ([DAE] 5), on the probability, not on the logit."""
    return torch.sigmoid(-logit).square().mean()


MUTATIONS = {"minimax": minimax, "heuristic": heuristic, "least-squares": least_squares}


def real_half(real_logit: Tensor) -> Tensor:
    """BCE(D(x), 1) = -E[log D(x)]."""
    return F.softplus(-real_logit).mean()


def fake_half(fake_logit: Tensor) -> Tensor:
    """BCE(D(G(z)), 0) = -E[log(1 - D(G(z)))]."""
    return F.softplus(fake_logit).mean()


def discriminator_loss(real_logit: Tensor, fake_logit: Tensor) -> Tensor:
    """BCE(D(x), 1) + BCE(D(G(z)), 0) (M6 without mixup, [DAE] 10-11). Also what F_d differentiates ([DAE] 8)."""
    return real_half(real_logit) + fake_half(fake_logit)


def class_loss(class_logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the auxiliary class head (ACGAN); class logits (N, classes), label (N,)."""
    return F.cross_entropy(class_logits, label)


def mixup(real: Tensor, fake: Tensor, lam: Tensor) -> Tensor:
    """lambda x + (1 - lambda) G(z), one lambda (N,) per sample (M6, [DAE] 9)."""
    lam = lam.view(-1, *[1] * (real.dim() - 1))
    return lam * real + (1 - lam) * fake


def beta(alpha: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Beta(alpha, alpha) numbers by inversion, since torch's own sampler takes no generator."""
    from scipy.special import betaincinv

    uniform = torch.rand(shape, generator=rng, dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy())).float()


def mixup_loss(mixed_logit: Tensor, lam: Tensor) -> Tensor:
    """BCE(D(x~), lambda) (M6, [DAE] 12)."""
    return F.binary_cross_entropy_with_logits(mixed_logit, lam)


def label_entropy(lam: Tensor) -> Tensor:
    """Mean entropy of the labels lambda: what `mixup_loss` is of a D that knows them all, and no D has less."""
    return (torch.special.entr(lam) + torch.special.entr(1 - lam)).mean()


def quality_fitness(fake_logit: Tensor) -> Tensor:
    """F_q = E[D(G(z))] ([DAE] 7), in [0, 1]."""
    return torch.sigmoid(fake_logit).mean()


def diversity_fitness(gradient: Tensor) -> Tensor:
    """F_d = -log ||grad_D|| ([DAE] 8) from the whole gradient of `discriminator_loss`, as one vector (P,).

    A gradient that vanishes or underflows counts as the smallest number of its format: F_d is never +inf.
    """
    norm = torch.linalg.vector_norm(gradient)
    return -torch.log(norm.clamp(min=torch.finfo(norm.dtype).tiny))


def r1_penalty(real_logit: Tensor, real: Tensor) -> Tensor:
    """1/2 E[||grad_x logit||^2] on real images (Mescheder et al. 2018); needs a graph from `real` to the logit."""
    (gradient,) = torch.autograd.grad(real_logit.sum(), real, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def refiner_adversarial(logits: Tensor) -> Tensor:
    """-log(1 - D(R(x))), the mean over samples and positions ([SIM] 3, first term).

    logits (N, 2, h, w), class 1 = refined: the refiner wants its images to be taken for class 0, real.
    """
    return F.softplus(_refined(logits)).mean()


def refiner_self(refined: Tensor, synthetic: Tensor) -> Tensor:
    """|| R(x) - x ||_1 as the mean over pixels ([SIM] 3, second term, psi = identity), without its lambda."""
    return (refined - synthetic).abs().mean()


def refiner_discriminator_loss(refined_logits: Tensor, real_logits: Tensor) -> Tensor:
    """-log D(refined) - log(1 - D(real)), each the mean over samples and positions ([SIM] 2)."""
    return F.softplus(-_refined(refined_logits)).mean() + F.softplus(_refined(real_logits)).mean()


def _refined(logits: Tensor) -> Tensor:
    """(N, 2, h, w) -> (N, h, w), the logit of class 1; cross-entropy over maps adds in no fixed order on GPUs."""
    return logits[:, 1] - logits[:, 0]
