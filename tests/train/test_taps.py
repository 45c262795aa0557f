"""Weight gradients of several losses from one backward pass, against one backward pass per loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.train.evolution import Evolution
from cmrhpc.train.plain import PlainEvolution
from cmrhpc.train.taps import Taps
from tests.train import small


class Odd(nn.Module):
    """Every kind of use that is tapped, each kind that is not, and weights that are used in both ways or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4 * 6 * 6)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.same = nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
        self.odd_up = nn.ConvTranspose2d(2, 2, 3, stride=2, output_padding=1)
        self.last = nn.Conv2d(2, 1, (3, 1), stride=(1, 2), padding=(1, 0))
        self.tokens = nn.Linear(3, 3)  # along the last axis of a 4-D tensor
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (4, 6, 6))
        x = x + self.wide(self.grouped(self.same(F.leaky_relu(self.norm(self.conv(x)), 0.2))))
        x = F.conv2d(torch.tanh(x), self.scale * self.conv.weight.flip(3), self.conv.bias, padding=1)  # used again
        x = x * self.scale + self.conv.weight.mean()  # and otherwise
        x = self.tokens(x.unflatten(3, (2, 3))).flatten(3)
        return torch.tanh(self.last(self.odd_up(self.up(x))))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["odd", "residual"])
def test_gradients_are_those_of_separate_passes(kind: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    module = (Odd() if kind == "odd" else residual_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))[0]).double()
    with torch.no_grad():
        for parameter in module.parameters():  # also those that start as zero
            parameter.add_(0.3 * torch.randn_like(parameter))
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(module.parameters())
    z, factors = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    plain = module(z)
    slope = torch.randn_like(plain)
    z.requires_grad_()
    taps = Taps(6)
    with taps:
        tapped = module(z)
    assert torch.allclose(tapped, plain, rtol=0, atol=1e-13)
    assert len(taps.taps) > 4
    found = taps.gradients(tapped, z, slope, factors, parameters)
    assert found is not None
    for factor, gradients in zip(factors, found, strict=True):
        upstream = factor.view(6, 1, 1, 1) * slope
        expected = torch.autograd.grad(plain, parameters, upstream, retain_graph=True, materialize_grads=True)
        for gradient, other in zip(gradients, expected, strict=True):
            assert not gradient.requires_grad
            assert torch.allclose(gradient, other, rtol=1e-10, atol=1e-11)


def test_nothing_is_tapped_outside_the_mode() -> None:
    taps = Taps(2)
    with taps:
        pass
    module, z = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    module(z).sum().backward()
    assert not taps.taps
    assert module.weight.grad is not None


class FromConstant(nn.Module):
    """A weight that meets a learned constant and no noise, as in StyleGAN."""

    mixes_samples = False

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 4, 16, 16))
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.style = nn.Linear(5, 4)

    def forward(self, z: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.constant.expand(len(z), -1, -1, -1)))
        return torch.tanh(self.second(x * self.style(z)[:, :, None, None]))


def test_a_weight_that_meets_no_noise_is_trained_as_in_the_plain_step() -> None:
    torch.manual_seed(0)
    g = FromConstant().double()
    d = residual_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))[1].double()
    plain, fast = PlainEvolution(copy.deepcopy(g), copy.deepcopy(d)), Evolution(g, d, workers=1)
    before = g.first.weight.detach().clone()
    draws = small.draws(torch.Generator().manual_seed(1), dtype=torch.float64, mixup=True, passes=1)
    plain.generation(draws)
    fast.generation(draws)
    ours, theirs = fast.generator.state_dict(), plain.parents[0][0].state_dict()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-10), name
    assert not torch.equal(ours["first.weight"], before)
