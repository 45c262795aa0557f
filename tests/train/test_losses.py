"""Losses, fitness, mixup and latent against slow numpy float64 versions written from the formulas (M4 to M7, M9)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.train import losses
from cmrhpc.train.gan import diversity
from cmrhpc.train.latent import Latent
from cmrhpc.train.losses import beta

LOGITS = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
OTHERS = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_minimax() -> None:
    slow = 0.5 * mean([math.log(1 - sigmoid(l)) for l in LOGITS.tolist()])
    assert float(losses.minimax(LOGITS)) == pytest.approx(slow, abs=1e-12)


def test_heuristic() -> None:
    slow = -0.5 * mean([math.log(sigmoid(l)) for l in LOGITS.tolist()])
    assert float(losses.heuristic(LOGITS)) == pytest.approx(slow, abs=1e-12)


def test_least_squares_is_on_probabilities() -> None:
    slow = mean([(sigmoid(l) - 1) ** 2 for l in LOGITS.tolist()])
    assert float(losses.least_squares(LOGITS)) == pytest.approx(slow, abs=1e-12)
    assert float(losses.least_squares(torch.tensor([50.0]))) == pytest.approx(
        0, abs=1e-12
    )  # raw logits would give 2401


@pytest.mark.parametrize("loss", [*losses.MUTATIONS.values(), losses.real_half, losses.fake_half])
def test_losses_stay_finite_at_extreme_logits(loss) -> None:  # type: ignore[no-untyped-def]
    logit = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    value = loss(logit)
    (slope,) = torch.autograd.grad(value, logit)
    assert torch.isfinite(value)
    assert torch.isfinite(slope).all()


def test_discriminator_loss() -> None:
    real = [-math.log(sigmoid(l)) for l in LOGITS.tolist()]
    fake = [-math.log(1 - sigmoid(l)) for l in OTHERS.tolist()]
    assert float(losses.discriminator_loss(LOGITS, OTHERS)) == pytest.approx(mean(real) + mean(fake), abs=1e-12)


def test_mixup_takes_one_lambda_per_sample() -> None:
    rng = np.random.default_rng(0)
    real, fake, lam = rng.normal(size=(3, 2, 4, 4)), rng.normal(size=(3, 2, 4, 4)), rng.random(3)
    got = losses.mixup(torch.from_numpy(real), torch.from_numpy(fake), torch.from_numpy(lam)).numpy()
    for n in range(3):
        assert np.allclose(got[n], lam[n] * real[n] + (1 - lam[n]) * fake[n], rtol=0, atol=1e-15)


def test_mixup_loss() -> None:
    lam = np.random.default_rng(0).random(11)
    slow = mean(
        [
            -(w * math.log(sigmoid(l)) + (1 - w) * math.log(1 - sigmoid(l)))
            for w, l in zip(lam, LOGITS.tolist(), strict=True)
        ]
    )
    assert float(losses.mixup_loss(LOGITS, torch.from_numpy(lam))) == pytest.approx(slow, abs=1e-12)


def test_no_d_has_less_than_the_entropy_of_the_labels() -> None:
    lam = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lam[0], lam[1] = 0, 1
    slow = mean([-sum(w * math.log(w) for w in (x, 1 - x) if w) for x in lam.tolist()])
    assert float(losses.label_entropy(lam)) == pytest.approx(slow, abs=1e-12)
    assert float(losses.mixup_loss(torch.logit(lam, eps=1e-12), lam)) == pytest.approx(slow, abs=1e-9)


def test_fitness() -> None:
    assert float(losses.quality_fitness(LOGITS)) == pytest.approx(
        mean([sigmoid(l) for l in LOGITS.tolist()]), abs=1e-12
    )
    g = np.random.default_rng(0).normal(size=50)
    slow = -math.log(math.sqrt(sum(x * x for x in g)))
    assert float(losses.diversity_fitness(torch.from_numpy(g))) == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diversity_fitness_of_a_gradient_that_vanishes_is_finite_and_the_highest(dtype: torch.dtype) -> None:
    gone = losses.diversity_fitness(torch.zeros(5, dtype=dtype))
    assert torch.isfinite(gone)
    assert gone > losses.diversity_fitness(torch.full((5,), 1e-15, dtype=dtype))


def test_diversity_fitness_is_of_the_gradient_of_the_unmixed_loss() -> None:
    """F_d by finite differences of -E[log D(x)] - E[log(1 - D(G(z)))] at D's weights."""
    _, d = residual_pair(16, 1, 4, 4, torch.Generator().manual_seed(0))
    d.double()
    real, fake = (torch.randn(3, 1, 16, 16, dtype=torch.float64) for _ in range(2))

    def loss() -> float:
        with torch.no_grad():
            terms = (
                [-math.log(sigmoid(l)) for l in d(real).tolist()],
                [-math.log(1 - sigmoid(l)) for l in d(fake).tolist()],
            )
        return mean(terms[0]) + mean(terms[1])

    gradient = torch.autograd.grad(losses.discriminator_loss(d(real), d(fake)), list(d.parameters()))
    for parameter, slope in zip(d.parameters(), gradient, strict=True):
        flat, h = parameter.data.view(-1), 1e-6
        at = int(slope.abs().argmax())
        old = float(flat[at])
        flat[at] = old + h
        up = loss()
        flat[at] = old - h
        down = loss()
        flat[at] = old
        assert (up - down) / (2 * h) == pytest.approx(float(slope.view(-1)[at]), rel=1e-4, abs=1e-8)


def test_refiner_losses() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(4, 2, 3, 5))
    other = rng.normal(size=(4, 2, 3, 5))
    p_refined = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    p_other = np.exp(other[:, 1]) / np.exp(other).sum(1)
    adversarial = losses.refiner_adversarial(torch.from_numpy(logits))
    assert float(adversarial) == pytest.approx(float(-np.log(1 - p_refined).mean()), abs=1e-12)
    both = losses.refiner_discriminator_loss(torch.from_numpy(logits), torch.from_numpy(other))
    assert float(both) == pytest.approx(float(-np.log(p_refined).mean() - np.log(1 - p_other).mean()), abs=1e-12)
    a, b = rng.normal(size=(2, 1, 4, 4)), rng.normal(size=(2, 1, 4, 4))
    assert float(losses.refiner_self(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(
        float(np.abs(a - b).mean()), abs=1e-12
    )


def test_r1_penalty_of_a_linear_logit() -> None:
    w = torch.randn(5, dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert float(losses.r1_penalty(x @ w, x)) == pytest.approx(0.5 * float(w @ w), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_mixup_weights_follow_beta(alpha: float) -> None:
    numbers = beta(alpha, (4000,), torch.Generator().manual_seed(1)).double().numpy()
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    assert stats.kstest(numbers, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert np.array_equal(numbers, beta(alpha, (4000,), torch.Generator().manual_seed(1)).double().numpy())


def test_latent_of_one_component_is_standard_normal() -> None:
    latent = Latent.draw(1, 6, torch.Generator().manual_seed(0))
    z = latent.sample(5000, torch.Generator().manual_seed(1)).double().numpy()
    assert not latent.means.any()
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-3


def test_latent_mixture_draws_every_component_equally() -> None:
    latent = Latent.draw(4, 50, torch.Generator().manual_seed(0))
    assert latent.means.abs().max() <= 1
    z = latent.sample(4000, torch.Generator().manual_seed(1))
    nearest = torch.cdist(z, latent.means).argmin(1)
    counts = torch.bincount(nearest, minlength=4).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    for k in range(4):
        own = z[nearest == k]
        assert torch.allclose(own.mean(0), latent.means[k], atol=0.2)
        assert torch.allclose(own.std(0), latent.scales[k].expand(50), atol=0.1)


def test_diversity_is_the_mean_pairwise_distance() -> None:
    x = np.random.default_rng(0).normal(size=(5, 1, 3, 3))
    pairs = [np.sqrt(((x[i] - x[j]) ** 2).sum()) for i in range(5) for j in range(i)]
    assert diversity(torch.from_numpy(x)) == pytest.approx(np.mean(pairs), abs=1e-12)
