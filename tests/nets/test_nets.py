"""The networks against the layer lists of METHODS M8 and M9, their sizes, seeds, and what they say of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmrhpc.errors import BadInput
from cmrhpc.nets.blocks import SelfAttention, UpBlock, UpConv2d
from cmrhpc.nets.classifiers import build_classifier
from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.nets.simgan import SimResidual, simgan_pair
from cmrhpc.study import start_and_ups


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def order_of_calls(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the direct children in the order in which the forward pass calls them."""
    called: list[str] = []
    hooks = [
        child.register_forward_hook(lambda m, i, o, name=name: called.append(name))
        for name, child in module.named_children()
    ]
    module(x)
    for hook in hooks:
        hook.remove()
    return called


@pytest.mark.parametrize(("size", "expected"), [(80, (5, 4)), (40, (5, 3)), (64, (4, 4)), (96, (6, 4)), (72, (9, 3))])
def test_start_and_ups(size: int, expected: tuple[int, int]) -> None:
    assert start_and_ups(size) == expected


@pytest.mark.parametrize("size", [7, 17, 50, 81, 100, 513])
def test_sizes_that_do_not_fit_name_their_neighbours(size: int) -> None:
    with pytest.raises(BadInput) as error:
        start_and_ups(size)
    near = [int(word) for word in error.value.mend.rpartition(":")[2].split(",")]
    assert near == sorted(near)
    assert len(near) == 4
    for other in near:
        start, ups = start_and_ups(other)
        assert start * 2**ups == other


@pytest.mark.parametrize(("size", "channels"), [(80, 1), (40, 1), (64, 3), (24, 1)])
def test_residual_pair_is_m8(size: int, channels: int) -> None:
    g, d = residual_pair(size, channels, 12, 8, rng())
    z = torch.randn(3, 12, generator=rng(1))
    assert order_of_calls(g, z) == ["linear", "block1", "block2", "attention", "block3", "block4", "conv"]
    images = g(z)
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert order_of_calls(d, images) == ["conv", "block1", "attention", "block2", "block3", "block4", "linear"]
    assert d(images).shape == (3,)
    kernels = {m.kernel_size for net in (g, d) for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert kernels == {(3, 3), (1, 1)}  # 1x1 on skip paths and in attention only
    ones = [n for net in (g, d) for n, m in net.named_modules() if getattr(m, "kernel_size", 0) == (1, 1)]
    assert all("skip" in n or "attention" in n for n in ones)
    ups = [m.up for m in g.modules() if isinstance(m, UpBlock)]
    assert ups == sorted(ups)
    assert sum(ups) == start_and_ups(size)[1]


def test_the_last_convolution_of_a_residual_block_starts_half_as_wide() -> None:
    for net in residual_pair(80, 1, 100, 32, rng()):
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 5000:
                spread = float(layer.weight.detach().std())
                he = (2 / layer.weight[0].numel()) ** 0.5
                wanted = 0.5 if name.endswith("conv2") else 1.0
                assert abs(spread / he - wanted) < 0.05, name


def test_residual_pair_sizes_at_80() -> None:
    g, d = residual_pair(80, 1, 100, 32, rng())
    assert 1.0e6 < sum(p.numel() for p in g.parameters()) < 1.6e6
    assert 0.5e6 < sum(p.numel() for p in d.parameters()) < 1.0e6


def test_upsampling_convolution_is_nearest_then_3x3() -> None:
    conv = UpConv2d(3, 5).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=rng())
    slow = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)
    assert torch.allclose(conv(x), slow, rtol=0, atol=1e-12)


def test_self_attention_against_its_formula() -> None:
    layer = SelfAttention(16).double()
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64, generator=rng())
    got = layer(x)
    pooled = F.avg_pool2d(x, 2)
    weights = {name: getattr(layer, name).weight[:, :, 0, 0] for name in ("query", "key_value", "out")}
    for n in range(2):
        values = pooled[n].flatten(1)  # (C, positions)
        k, v = (weights["key_value"] @ values).chunk(2)
        for i in range(4):
            for j in range(6):
                q = weights["query"] @ x[n, :, i, j]
                score = torch.stack([q @ k[:, p] / layer.width**0.5 for p in range(values.shape[1])]).softmax(0)
                expected = x[n, :, i, j] + 0.7 * (weights["out"] @ (v @ score))
                assert torch.allclose(got[n, :, i, j], expected, rtol=0, atol=1e-12)


def test_self_attention_starts_as_identity() -> None:
    layer = SelfAttention(16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("make", [residual_pair, dcgan_pair])
def test_networks_say_truly_whether_they_mix_samples(make) -> None:  # type: ignore[no-untyped-def]
    g, d = make(16, 1, 6, 4, rng())
    for net, x in ((g, torch.randn(4, 6)), (d, torch.randn(4, 1, 16, 16))):
        net.double().train()
        x = x.double().requires_grad_()
        out = net(x)
        (slope,) = torch.autograd.grad(out[0].sum(), x)
        reaches_others = bool(slope[1:].abs().max() > 0)
        assert reaches_others == net.mixes_samples


def test_dcgan_pair_sizes_at_80() -> None:
    g, d = dcgan_pair(80, 1, 100, 32, rng())
    assert sum(p.numel() for p in g.parameters()) == pytest.approx(1.3e6, rel=0.05)
    assert sum(p.numel() for p in d.parameters()) == pytest.approx(0.7e6, rel=0.05)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in g.modules()) == 4
    assert sum(isinstance(m, nn.BatchNorm2d) for m in d.modules()) == 3


def test_conditional_dcgan_uses_its_label() -> None:
    g, d = dcgan_pair(32, 1, 10, 4, rng(), n_classes=3)
    z = torch.randn(2, 10)
    g.eval()
    one, two = g(z, torch.tensor([0, 0])), g(z, torch.tensor([1, 1]))
    assert not torch.equal(one, two)
    logit, classes = d(one)
    assert logit.shape == (2,)
    assert classes.shape == (2, 3)


def test_noise_decides_a_new_conditional_dcgan_and_its_label_little() -> None:
    g, _ = dcgan_pair(32, 1, 100, 32, rng(), n_classes=2)
    images = g(torch.randn(256, 100, generator=rng()), torch.arange(256) % 2).flatten(1)
    between = (images[::2].mean(0) - images[1::2].mean(0)).square().sum() / 4
    assert between < 0.03 * images.var(0).sum()


def test_simgan_refiner_is_m9() -> None:
    r, _ = simgan_pair(1, 8, rng())
    x = torch.rand(2, 1, 20, 24) * 2 - 1
    assert order_of_calls(r, x) == ["conv_in", "blocks", "conv_out"]
    assert r(x).shape == x.shape
    assert r(x).abs().max() <= 1
    assert r.conv_in.kernel_size == (3, 3)
    assert r.conv_in.stride == (1, 1)
    assert r.conv_out.kernel_size == (1, 1)
    assert len(r.blocks) == 5
    for block in r.blocks:
        assert isinstance(block, SimResidual)
        kinds = [type(layer) for layer in block.children()]
        assert kinds == [nn.Conv2d, nn.PReLU, nn.Conv2d]
        assert block.conv1.kernel_size == block.conv2.kernel_size == (3, 3)
    # No activation after the sum: the output is free to have either sign.
    block = r.blocks[0]
    h = torch.randn(1, 8, 5, 5)
    assert torch.equal(block(h), h + block.conv2(block.prelu(block.conv1(h))))


def test_a_new_refiner_leaves_the_image_nearly_as_it_is() -> None:
    """With blocks at full width the mean difference would be 0.7 to 1.2."""
    x = torch.nn.functional.interpolate(
        torch.randn(4, 1, 4, 4, generator=rng(3)), size=(20, 20), mode="bilinear"
    ).tanh()
    for seed in range(5):
        r, _ = simgan_pair(1, 64, rng(seed))
        with torch.no_grad():
            assert (r(x) - x).abs().mean() < 0.4


def test_simgan_discriminator_is_m9() -> None:
    _, d = simgan_pair(1, 8, rng())
    x = torch.rand(2, 1, 40, 40)
    layers = [name for name in order_of_calls(d, x) if not name.startswith("prelu")]
    assert layers == ["conv1", "conv2", "pool", "blocks", "conv3", "conv4"]
    assert (d.conv1.kernel_size, d.conv1.stride) == ((3, 3), (2, 2))
    assert (d.conv2.kernel_size, d.conv2.stride) == ((3, 3), (2, 2))
    assert (d.pool.kernel_size, d.pool.stride) == (3, 1)
    assert len(d.blocks) == 2
    assert d.conv3.kernel_size == d.conv4.kernel_size == (1, 1)
    assert not any(isinstance(m, nn.Linear) for m in d.modules())
    assert d(x).shape == (2, 2, 10, 10)


@pytest.mark.parametrize("make", [residual_pair, dcgan_pair])
def test_weights_follow_the_seed_alone(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    first = make(16, 1, 6, 4, rng(5))
    torch.manual_seed(2)
    again, other = make(16, 1, 6, 4, rng(5)), make(16, 1, 6, 4, rng(6))
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
        assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


@pytest.mark.parametrize("network", ["resnet50", "xception"])
@pytest.mark.parametrize("channels", [1, 3])
def test_classifiers(network: str, channels: int) -> None:
    state = torch.get_rng_state()
    model = build_classifier(network, channels, 4, seed=3).eval()
    again = build_classifier(network, channels, 4, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        assert model(torch.zeros(1, channels, 40, 40)).shape == (1, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("network", ["resnet50", "xception"])
def test_local_weights_of_a_colour_network_serve_grey_images(network: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import save_file

    colour = build_classifier(network, 3, 10, seed=1).eval()
    save_file(colour.state_dict(), tmp_path / "w.safetensors")
    grey = build_classifier(network, 1, 2, seed=2, weights=str(tmp_path / "w.safetensors")).eval()
    x = torch.rand(1, 1, 40, 40)
    conv = colour.conv1(x.expand(1, 3, 40, 40))
    assert torch.allclose(grey.conv1(x), conv, atol=1e-5)
    assert grey.fc.out_features == 2
    other = "xception" if network == "resnet50" else "resnet50"
    with pytest.raises(BadInput, match="not those of"):
        build_classifier(other, 1, 2, seed=2, weights=str(tmp_path / "w.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot read"):
        build_classifier(network, 1, 2, seed=2, weights=str(tmp_path / "bad.safetensors"))
