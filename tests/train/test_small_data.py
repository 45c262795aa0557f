"""DiffAugment against a loop over samples and pixels, spectral norm against written-out power iteration and torch's own
version, and both in the generation step against the plain one."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.nets.spectral import add_spectral_norm, spectral_layers
from cmrhpc.train.diffaugment import NUMBERS, Views, augment
from cmrhpc.train.evolution import Evolution
from cmrhpc.train.plain import PlainEvolution
from tests.train import small
from tests.train.test_evolution import distance, put_in_step


def slow_augment(image: list, u: list[float]) -> list:
    """One image as nested lists [channel][row][column]: Zhao et al.'s color, translation, cutout, pixel by pixel."""
    channels, height, width = len(image), len(image[0]), len(image[0][0])
    every = list(itertools.product(range(channels), range(height), range(width)))
    x = {(c, i, j): image[c][i][j] + u[0] - 0.5 for c, i, j in every}
    if channels == 3:
        grey = {(i, j): sum(x[c, i, j] for c in range(3)) / 3 for _, i, j in every}
        x = {(c, i, j): grey[i, j] + (x[c, i, j] - grey[i, j]) * 2 * u[1] for c, i, j in every}
    mean = sum(x.values()) / len(x)
    x = {key: mean + (value - mean) * (u[2] + 0.5) for key, value in x.items()}
    most = [int(side / 8 + 0.5) for side in (height, width)]
    shift = [math.floor(u[3 + a] * (2 * most[a] + 1)) - most[a] for a in (0, 1)]
    x = {(c, i, j): x.get((c, i + shift[0], j + shift[1]), 0.0) for c, i, j in every}
    for a, side in ((0, height), (1, width)):
        assert abs(shift[a]) <= side / 8 + 0.5
    size = [int(side / 2 + 0.5) for side in (height, width)]
    centre = [math.floor(u[5 + a] * (side + 1 - size[a] % 2)) for a, side in ((0, height), (1, width))]
    for di, dj in itertools.product(range(size[0]), range(size[1])):
        i = min(max(di + centre[0] - size[0] // 2, 0), height - 1)
        j = min(max(dj + centre[1] - size[1] // 2, 0), width - 1)
        for c in range(channels):
            x[c, i, j] = 0.0
    return [[[x[c, i, j] for j in range(width)] for i in range(height)] for c in range(channels)]


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 9, 12)])
def test_diffaugment_equals_a_loop_over_samples(channels: int, height: int, width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(12, channels, height, width, generator=rng, dtype=torch.float64)
    draw = torch.rand(12, NUMBERS, generator=rng)
    draw[0], draw[1] = 0.0, 1 - 2**-24  # both ends
    found = augment(images, draw)
    slow = [slow_augment(image, u) for image, u in zip(images.tolist(), draw.double().tolist(), strict=True)]
    assert torch.allclose(found, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found[3:5], augment(images[3:5], draw[3:5]))  # no sample knows its neighbours
    assert (found == 0).flatten(1).double().mean(1).min() >= 0.06  # a corner at least is cut out


def test_diffaugment_is_differentiable_twice() -> None:
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(2, 1, 6, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    draw = torch.rand(2, NUMBERS, generator=rng, dtype=torch.float64)

    def nonlinear(x: Tensor) -> Tensor:
        return augment(x, draw).pow(3)

    assert torch.autograd.gradcheck(nonlinear, images)
    assert torch.autograd.gradgradcheck(nonlinear, images)


def test_spectral_norm_equals_written_out_power_iteration() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(2, 3, 2, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    add_spectral_norm(layer, rng)
    ((norm, original),) = spectral_layers(layer)
    assert torch.equal(original.detach(), weight)
    matrix = weight.flatten(1).tolist()
    u = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    def unit(values: list[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in values))
        return [x / length for x in values]

    def times_v(v: list[float]) -> list[float]:
        return [sum(w * x for w, x in zip(row, v, strict=True)) for row in matrix]

    def times_u(u: list[float]) -> list[float]:
        return [sum(matrix[i][j] * u[i] for i in range(3)) for j in range(8)]

    u = unit(u)
    v = unit(times_u(u))
    for _ in range(15 + 4):
        u = unit(times_v(v))
        v = unit(times_u(u))
    for _ in range(4):
        norm.iterate(original)
    sigma = sum(a * b for a, b in zip(u, times_v(v), strict=True))
    assert torch.allclose(layer.weight, weight / sigma, rtol=0, atol=1e-12)
    for _ in range(500):
        norm.iterate(original)
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=1e-9)
    before = layer.weight.detach().clone()
    layer(torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    assert torch.equal(layer.weight, before)  # use does not move u and v


def test_spectral_norm_has_the_value_and_gradient_of_torch_s_own() -> None:
    ours = nn.Linear(5, 4, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    add_spectral_norm(ours, torch.Generator().manual_seed(0))
    nn.utils.parametrizations.spectral_norm(theirs).eval()  # eval: u and v stand still
    ((norm, original),) = spectral_layers(ours)
    norm.u.copy_(theirs.parametrizations.weight[0]._u)  # type: ignore[union-attr, index, operator]
    norm.v.copy_(theirs.parametrizations.weight[0]._v)  # type: ignore[union-attr, index, operator]
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert torch.allclose(original.grad, theirs.parametrizations.weight.original.grad, atol=1e-12)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_a_normalised_discriminator_mixes_no_samples_and_every_layer_is_normalised(kind: str) -> None:
    _, d = pair(kind, torch.float32, spectral=True)
    assert len(spectral_layers(d)) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in d.modules())
    assert not d.mixes_samples
    x = small.images(5)
    assert torch.allclose(d(x)[:2], d(x[:2]), atol=1e-6)
    for norm, weight in spectral_layers(d):
        matrix = weight.detach().flatten(1)
        largest = float(torch.linalg.matrix_norm(matrix, 2))
        assert float(norm.u @ matrix @ norm.v) == pytest.approx(largest, rel=0.05)


def pair(kind: str, dtype: torch.dtype, spectral: bool) -> tuple[nn.Module, nn.Module]:
    rng = torch.Generator().manual_seed(0)
    g: nn.Module
    d: nn.Module
    if kind == "residual":
        g, d = residual_pair(16, 1, 5, 4, rng)
    else:
        g, d = dcgan_pair(16, 1, 5, 4, rng, batch_norm=not spectral)
    g, d = g.to(dtype), d.to(dtype)
    if spectral:
        add_spectral_norm(d, rng)
    return g, d


CASES = [
    # networks, spectral norm, augmentation, mixup, shared noise, survivors, workers
    ("residual", True, True, True, True, 1, 2),
    ("residual", False, True, False, False, 2, 3),
    ("residual", True, False, True, True, 1, 1),
    ("dcgan", False, True, False, True, 1, 2),
    ("dcgan", True, True, False, True, 2, 2),
    ("dcgan", True, False, False, False, 1, 1),
]


@pytest.mark.parametrize(("kind", "spectral", "views", "mixup", "shared", "survivors", "workers"), CASES)
def test_the_fast_step_equals_the_plain_step(
    kind: str, spectral: bool, views: bool, mixup: bool, shared: bool, survivors: int, workers: int
) -> None:
    g, d = pair(kind, torch.float64, spectral)
    settings = {"survivors": survivors, "gamma": 0.3}
    plain = PlainEvolution(copy.deepcopy(g), copy.deepcopy(d), **settings)  # type: ignore[arg-type]
    g, d = g.to(memory_format=torch.channels_last), d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast = Evolution(g, d, workers=workers, **settings)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1)
    for generation in range(4):
        passes = 1 if shared else len(fast.parents) * 3
        steps = 1 + generation % 2
        draws = small.draws(rng, dtype=torch.float64, mixup=mixup, passes=passes, steps=steps)
        if views:
            object.__setattr__(draws, "views", Views.draw(steps, 6, 7, rng, torch.device("cpu")))
        slow, quick = plain.generation(draws), fast.generation(draws)
        for a, b in ((slow.loss_d, quick.loss_d), (slow.loss_g, quick.loss_g), (slow.f_q, quick.f_q)):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)
        assert torch.allclose(slow.f_d, quick.f_d, rtol=0, atol=1e-9)
        assert slow.order.tolist() == quick.order.tolist()
        assert distance(plain, fast) < 1e-6
        for (mine, _), (theirs, _) in zip(
            spectral_layers(plain.discriminator), spectral_layers(fast.discriminator), strict=True
        ):
            assert torch.allclose(mine.u, theirs.u, rtol=0, atol=1e-8)
        put_in_step(plain, fast)


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_spectral_norm_in_fast_mode_keeps_sigma_in_single_precision(kind: str) -> None:
    _, d = pair(kind, torch.float32, spectral=True)
    layer = next(m for m in d.modules() if isinstance(m, nn.Linear))
    exact = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, exact)
