"""The layers that are only quicker: equal to PyTorch's own, in values and in gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmrhpc.nets.blocks import SLOPE, UpBlock
from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.nets.plain import PLAIN, with_plain_layers
from cmrhpc.nets.quick import FewMapsConv2d, FewMapsConvTranspose2d, GroupNorm, block_size, doubled


def values_and_gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    slope = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], slope)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=1e-11) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("maps", "height", "width", "side"), [(1, 16, 24, 4), (1, 6, 10, 2), (3, 8, 8, 2), (1, 5, 7, 1)]
)
def test_convolution_to_few_maps(maps: int, height: int, width: int, side: int, channels_last: bool) -> None:
    assert block_size(maps, height, width) == side
    torch.manual_seed(0)
    quick, plain = FewMapsConv2d(5, maps).double(), nn.Conv2d(5, maps, 3, padding=1).double()
    plain.load_state_dict(quick.state_dict())
    x = torch.randn(2, 5, height, width, dtype=torch.float64)
    if channels_last:
        quick, x = quick.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert same(values_and_gradients(quick, x), values_and_gradients(plain, x))


@pytest.mark.parametrize(("maps", "height", "width"), [(1, 8, 6), (1, 5, 8), (3, 4, 4)])
def test_transposed_convolution_to_few_maps(maps: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    quick = FewMapsConvTranspose2d(5, maps).double()
    plain = nn.ConvTranspose2d(5, maps, 4, stride=2, padding=1).double()
    plain.load_state_dict(quick.state_dict())
    x = torch.randn(2, 5, height, width, dtype=torch.float64)
    assert same(values_and_gradients(quick, x), values_and_gradients(plain, x))


@pytest.mark.parametrize("make", [lambda: FewMapsConv2d(5, 1), lambda: FewMapsConvTranspose2d(5, 1)])
def test_autocast_reaches_them(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 5, 8, 8)
    exact = values_and_gradients(module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = values_and_gradients(module, x)
    assert fast[0].dtype == torch.bfloat16
    for a, b in zip(exact, fast, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()
    assert all(g.dtype == torch.float32 for g in fast[1:])


def test_group_norm_in_bfloat16_channels_last() -> None:
    torch.manual_seed(0)
    quick, plain = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    with torch.no_grad():
        for a, b in zip(quick.parameters(), plain.parameters(), strict=True):
            b.copy_(a.normal_())
    x = torch.randn(3, 8, 6, 6)
    exact = values_and_gradients(plain, x)
    fast = values_and_gradients(quick, x.bfloat16().contiguous(memory_format=torch.channels_last))
    assert fast[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(exact, fast, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("channels_out", [4, 8])
def test_up_block_is_its_formula(channels_out: int, up: bool) -> None:
    """Written out: no operation in place, every bias where it belongs."""
    torch.manual_seed(0)
    block = UpBlock(8, channels_out, up).double()

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = copy.deepcopy(block)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b = self.block
            h = F.leaky_relu(F.group_norm(x, b.norm1.num_groups, b.norm1.weight, b.norm1.bias), SLOPE)
            h = F.conv2d(h, b.conv1.weight, b.conv1.bias, padding=1)
            h = F.leaky_relu(F.group_norm(h, b.norm2.num_groups, b.norm2.weight, b.norm2.bias), SLOPE)
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if up else h
            h = F.conv2d(h, b.conv2.weight, b.conv2.bias, padding=1)
            skip = b.skip(x)
            return h + (F.interpolate(skip, scale_factor=2.0, mode="bilinear") if up else skip)

    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert same(values_and_gradients(block, x), values_and_gradients(Written(), x))


@pytest.mark.parametrize("make", [residual_pair, dcgan_pair])
def test_networks_of_pytorchs_own_layers_compute_the_same(make) -> None:  # type: ignore[no-untyped-def]
    g, d = (network.double() for network in make(16, 1, 6, 8, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for name, parameter in [*g.named_parameters(), *d.named_parameters()]:
            if name.endswith("gamma"):
                parameter.fill_(0.7)  # attention starts as the identity
    z, x = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 1, 16, 16, dtype=torch.float64)
    for ours, given in ((g, z), (d, x)):
        plain = with_plain_layers(ours)
        assert not any(type(module) in PLAIN for module in plain.modules())
        assert [n for n, _ in plain.named_parameters()] == [n for n, _ in ours.named_parameters()]
        assert same(values_and_gradients(ours, given), values_and_gradients(plain, given))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (6, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_upsampling_by_slices_is_bilinear(height: int, width: int, channels_last: bool) -> None:
    class Slices(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled(doubled(x, 2), 3)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, height, width, dtype=torch.float64).contiguous(memory_format=layout)
    plain = nn.Upsample(scale_factor=2.0, mode="bilinear")
    assert same(values_and_gradients(Slices(), x), values_and_gradients(plain, x))
