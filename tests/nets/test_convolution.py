"""Convolutions by our own kernels, against PyTorch's in float64."""

from __future__ import annotations

import ctypes
import mmap
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmrhpc.nets import convolution
from cmrhpc.nets.convolution import Shape, quick_convolutions, suits_weight_gradients, weight_gradients
from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.study import Compute
from cmrhpc.train.compute import setup_compute
from cmrhpc.train.evolution import Evolution
from tests.train import small

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _needs_kernels() -> Iterator[None]:
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip(f"the kernels are for AVX2, this is {torch.backends.cpu.get_cpu_capability()}")
    if not shutil.which("cc") and not shutil.which("gcc"):
        pytest.skip("no C compiler when cmrhpc was installed: apt install gcc")
    assert convolution.kernels(), "they were not compiled, though there is a compiler"
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        (found - wanted).abs().max() <= 4e-6 * wanted.abs().max().clamp(min=1e-3)
    )


def case(number: int) -> tuple[Tensor, Tensor, Tensor | None, dict, bool] | None:
    """x, weight, bias, stride and padding, transposed: of odd sizes and layouts; None where nothing would come out."""
    draw = random.Random(number)
    torch.manual_seed(number)
    kernel = draw.choice([(3, 3), (3, 3), (4, 4), (4, 4), (1, 1), (1, 3), (5, 2), (6, 6)])
    own = draw.random() < 0.6  # what has tiles
    stride = (1 if kernel == (3, 3) else 2) if own else draw.choice([1, 2, (2, 1), 3])
    padding = 1 if own else draw.choice([1, 0, 2, (1, 2)])
    transposed = draw.random() < 0.4
    maps, channels = (draw.choice([16, 17, 24, 32, 48]) for _ in range(2))
    x = torch.randn(draw.randint(1, 9), channels, draw.randint(1, 23), draw.randint(1, 23))
    weight = torch.randn(*((channels, maps) if transposed else (maps, channels)), *kernel)
    bias = torch.randn(maps) if draw.random() < 0.5 else None
    if draw.random() < 0.7:
        x = x.contiguous(memory_format=torch.channels_last)
    if draw.random() < 0.7:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return x, weight, bias, {"stride": stride, "padding": padding}, transposed


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_values_and_gradients_are_those_of_pytorch(first: int) -> None:
    by_kernels = 0
    for number in range(first, first + 50):
        x, weight, bias, how, transposed = case(number)
        call = F.conv_transpose2d if transposed else F.conv2d
        wide = [v.double().requires_grad_() for v in (x, weight, bias) if v is not None]
        try:
            wanted = call(*wide, **how)
        except RuntimeError:  # the kernel is larger than the image
            continue
        if not wanted.numel():
            continue
        leaves = [v.requires_grad_() for v in (x, weight, bias) if v is not None]
        with quick_convolutions(CPU):
            found = call(*leaves, **how)
            grad_output = torch.randn_like(found)
            gradients = torch.autograd.grad(found, leaves, grad_output)
        by_kernels += type(found.grad_fn).__name__ == "_ConvolutionBackward"
        assert close(found, wanted), number
        for a, b in zip(gradients, torch.autograd.grad(wanted, wide, grad_output.double()), strict=True):
            assert close(a, b), number
    assert by_kernels > 20


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_weight_gradients_of_several_losses(first: int) -> None:
    checked = 0
    for number in range(first, first + 50):
        x, weight, _, how, transposed = case(number)
        call = F.conv_transpose2d if transposed else F.conv2d
        wide = weight.double().requires_grad_()
        try:
            y = call(x.double(), wide, **how)
        except RuntimeError:
            continue
        if not y.numel() or not suits_weight_gradients(x, weight):
            continue
        grad_output, factors = torch.randn(y.shape), torch.randn(3, len(x))
        found = weight_gradients(grad_output, x, weight, Shape(**how, transposed=transposed), factors)
        for gradient, factor in zip(found, factors.double(), strict=True):
            scaled = grad_output.double() * factor.view(-1, 1, 1, 1)
            assert close(gradient, torch.autograd.grad(y, wide, scaled, retain_graph=True)[0]), number
        checked += 1
    assert checked > 20


def test_they_can_be_differentiated_twice() -> None:
    """As the R1 penalty asks for."""
    torch.manual_seed(0)
    weight = torch.randn(32, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(2, 16, 9, 9).requires_grad_()

    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(torch.tanh(F.conv2d(x, weight, padding=1)), weight.transpose(0, 1), padding=1)
        (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad((gradient**2).mean(), weight)[0]

    with quick_convolutions(CPU):
        found = penalty(x, weight)
    wanted = penalty(x.double().detach().requires_grad_(), weight.double().detach().requires_grad_())
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    layout = torch.channels_last
    x, up = (torch.randn(7, c, 22, 18).contiguous(memory_format=layout) for c in (48, 32))
    same, wide = torch.randn(32, 48, 3, 3), torch.randn(32, 48, 4, 4)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with quick_convolutions(CPU):
            for call, image, weight, how in (
                (F.conv2d, x, same, {"padding": 1}),
                (F.conv2d, x, wide, {"padding": 1, "stride": 2}),
                (F.conv_transpose2d, up, wide, {"padding": 1, "stride": 2}),
            ):
                leaves = [image.clone(memory_format=torch.preserve_format), weight.contiguous(memory_format=layout)]
                y = call(*[leaf.requires_grad_() for leaf in leaves], **how)
                found.append((threads, y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)))
    for kind in range(3):
        alone, *others = found[kind::3]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(alone[1:], other[1:], strict=True))


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_a_generation_is_that_of_pytorchs_convolutions(kind: str) -> None:
    setup_compute(Compute(threads=1))
    outcomes, parents = [], []
    for hidden in (False, True):
        rng = torch.Generator().manual_seed(0)
        g, d = residual_pair(32, 1, 5, 16, rng) if kind == "residual" else dcgan_pair(32, 1, 5, 16, rng)
        g, d = (network.to(memory_format=torch.channels_last) for network in (g, d))  # type: ignore[call-overload]
        evolution = Evolution(g, d, gamma=0.3, workers=2)
        draws = small.draws(torch.Generator().manual_seed(1), dtype=torch.float32, mixup=False, passes=1, size=32)
        with convolution.without_kernels() if hidden else quick_convolutions(torch.device("meta")):
            outcomes.append(evolution.generation(draws))
        parents.append(evolution.first)  # the gradient, times 1 - beta
    assert outcomes[0].order.tolist() == outcomes[1].order.tolist()
    for name in ("loss_d", "loss_g", "f_q", "f_d"):
        a, b = (getattr(outcome, name) for outcome in outcomes)
        assert torch.allclose(a, b, rtol=0, atol=1e-5 if name != "f_d" else 1e-4)
    assert not torch.equal(*parents)  # they were used
    assert float((parents[0] - parents[1]).abs().max() / parents[1].abs().max()) < 1e-4


def test_kernels_of_another_interface_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that was brought up to date and not installed again holds those of its old source."""
    monkeypatch.setattr(convolution, "INTERFACE", convolution.INTERFACE + 1)
    assert convolution._library.__wrapped__() is None


def guarded(shape: tuple[int, ...], end: bool) -> Tensor:
    """A channels-last tensor that ends, or begins, where memory must not be touched."""
    page, n = mmap.PAGESIZE, 4 * torch.Size(shape).numel()
    size = -(-n // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (address, address + page + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0) == 0
    offset = page + (size - n if end else 0)
    count, maps, height, width = shape
    flat = torch.frombuffer(memory, dtype=torch.float32, count=n // 4, offset=offset)
    return flat.view(count, height, width, maps).permute(0, 3, 1, 2)


@pytest.mark.parametrize("end", [False, True])
def test_nothing_outside_of_the_arguments_is_touched(end: bool) -> None:
    """In a process of its own: it dies otherwise."""
    command = [sys.executable, "-c", f"from tests.nets.test_convolution import touch; touch({end})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def touch(end: bool) -> None:
    for size, stride, transposed in ((3, 1, False), (4, 2, False), (4, 2, True), (5, 2, False), (3, 2, True)):
        for n, channels, maps, height, width in (
            (1, 16, 32, 8, 9),
            (3, 16, 16, 11, 8),
            (5, 48, 16, 9, 21),
            (2, 17, 22, 9, 9),
        ):
            x = guarded((n, channels, height, width), end).normal_()
            weight = guarded(
                (channels, maps, size, size) if transposed else (maps, channels, size, size), end
            ).normal_()
            call = F.conv_transpose2d if transposed else F.conv2d
            with quick_convolutions(CPU):
                y = call(x.requires_grad_(), weight.requires_grad_(), stride=stride, padding=1)
                torch.autograd.grad(y, [x, weight], guarded(tuple(y.shape), end).normal_())
    print("done")
