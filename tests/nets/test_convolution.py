"""Convolutions by our own kernels, against PyTorch's in float64."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import mmap
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(compiler):
        pytest.skip(f"{compiler}, with which pip compiles for this Python, is not installed")
    assert convolution.load()[0], convolution.load()[1]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[Any]:
    """How often the kernels ran: by the number of `convolve`, and "weights"."""
    counts: collections.Counter[Any] = collections.Counter()
    convolve, weight = convolution._convolve, convolution.weight_gradients

    def counted_convolve(kind: int, *rest: Any, **more: Any) -> Tensor:
        counts[kind] += 1
        return convolve(kind, *rest, **more)

    def counted_weight(*arguments: Any) -> Tensor:
        counts["weights"] += 1
        return weight(*arguments)

    monkeypatch.setattr(convolution, "_convolve", counted_convolve)
    monkeypatch.setattr(convolution, "weight_gradients", counted_weight)
    return counts


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        (found - wanted).abs().max() <= 2e-5 * wanted.abs().max().clamp(min=1e-3)
    )


def case(number: int) -> tuple[Tensor, Tensor, Tensor | None, dict, bool]:
    """x, weight, bias, stride and padding, transposed: of odd sizes and layouts. Every second one has tiles."""
    draw = random.Random(number)
    torch.manual_seed(number)
    if number % 2:
        kernel = draw.choice([(3, 3), (4, 4)])
        stride, padding = 1 if kernel == (3, 3) else 2, 1
        transposed = kernel == (4, 4) and draw.random() < 0.5
        (maps, channels), sides = (draw.choice([16, 32, 48]) for _ in range(2)), (6, 41)
    else:
        kernel = draw.choice([(3, 3), (4, 4), (1, 1), (1, 3), (5, 2), (6, 6)])
        stride, padding = draw.choice([1, 2, (2, 1), (3,)]), draw.choice([1, 0, 2, (1, 2)])
        transposed = draw.random() < 0.4
        (maps, channels), sides = (draw.choice([16, 17, 24, 32, 48]) for _ in range(2)), (1, 23)
    x = torch.randn(draw.randint(1, 7), channels, draw.randint(*sides), draw.randint(*sides))
    weight = torch.randn(*((channels, maps) if transposed else (maps, channels)), *kernel)
    bias = torch.randn(2 * maps)[:: draw.choice([1, 2])][:maps] if draw.random() < 0.5 else None
    if draw.random() < 0.7:
        x = x.contiguous(memory_format=torch.channels_last)
    if draw.random() < 0.7:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return x, weight, bias, {"stride": stride, "padding": padding}, transposed


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_values_and_gradients_are_those_of_pytorch(first: int, done: collections.Counter[Any]) -> None:
    for number in range(first, first + 100):
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
            with torch.no_grad():
                assert close(call(*leaves, **how), wanted), number
        assert close(found, wanted), number
        for a, b in zip(gradients, torch.autograd.grad(wanted, wide, grad_output.double()), strict=True):
            assert close(a, b), number
    assert all(done[kind] >= 5 for kind in range(4))
    assert done["weights"] >= 50


@pytest.mark.parametrize(
    ("n", "channels", "maps", "size", "kernel", "stride", "transposed"),
    [
        (5, 64, 32, (80, 80), 3, 1, False),
        (16, 32, 64, (20, 20), 3, 1, False),
        (33, 128, 128, (5, 5), 3, 1, False),
        (5, 32, 64, (47, 45), 4, 2, False),
        (3, 64, 32, (21, 40), 4, 2, True),
        (16, 64, 64, (40, 40), 3, 2, False),
    ],
)
def test_sizes_of_real_networks(
    n: int,
    channels: int,
    maps: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    transposed: bool,
    done: collections.Counter[Any],
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*((channels, maps) if transposed else (maps, channels)), kernel, kernel)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (torch.randn(n, channels, *size), weight))
    call = F.conv_transpose2d if transposed else F.conv2d
    wide = [v.double().requires_grad_() for v in (x, weight)]
    wanted = call(*wide, stride=stride, padding=1)
    grad_output = torch.randn(wanted.shape)
    with quick_convolutions(CPU):
        found = call(x.requires_grad_(), weight.requires_grad_(), stride=stride, padding=1)
        gradients = torch.autograd.grad(found, [x, weight], grad_output)
    for a, b in zip(
        [found, *gradients], [wanted, *torch.autograd.grad(wanted, wide, grad_output.double())], strict=True
    ):
        assert close(a, b)
    assert done["weights"] == 1
    assert sum(done[kind] for kind in range(4)) == (0 if (kernel, stride) == (3, 2) else 2)


@pytest.mark.parametrize("of", [0, 1, 2])
def test_one_gradient_alone(of: int) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 16, 9, 9), torch.randn(32, 16, 3, 3), torch.randn(32)]
    leaves[of].requires_grad_()
    with quick_convolutions(CPU):
        (found,) = torch.autograd.grad(F.conv2d(*leaves, padding=1).sin().sum(), leaves[of])
    wide = [leaf.detach().double() for leaf in leaves]
    wide[of].requires_grad_()
    (wanted,) = torch.autograd.grad(F.conv2d(*wide, padding=1).sin().sum(), wide[of])
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_what_they_do_not_take_is_pytorchs() -> None:
    """Its values, and its errors: nothing reaches C that C would read beyond."""
    x, weight = torch.ones(2, 32, 16, 16), torch.ones(32, 32, 3, 3)
    wrong = (
        {"weight": torch.ones(32, 48, 3, 3)},
        {"input": torch.ones(2, 20, 16, 16)},
        {"bias": torch.ones(16)},
        {"bias": torch.ones(32, dtype=torch.float64)},
        {"weight": torch.ones(32, 32, 4, 4), "input": torch.ones(2, 32, 1, 256), "stride": 2},
    )
    for change in wrong:
        arguments = {"input": x, "weight": weight, "padding": 1} | change
        with pytest.raises(RuntimeError):
            F.conv2d(**arguments)
        with pytest.raises(RuntimeError), quick_convolutions(CPU):
            F.conv2d(**arguments)
    assert not suits_weight_gradients(x, weight.to("meta"))
    wanted = F.conv2d(x, weight, torch.full((1,), 0.5).expand(32), padding=1)
    for name in ("default", "bfloat16", "float64"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, name) if name != "default" else before)
        try:
            with quick_convolutions(CPU):
                found = F.conv2d(input=x, weight=weight, bias=torch.full((1,), 0.5).float().expand(32), padding=1)
        finally:
            torch.set_default_dtype(before)
        assert found.dtype == torch.float32
        assert close(found, wanted)


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
        with convolution.without_kernels() if hidden else contextlib.nullcontext():
            outcomes.append(evolution.generation(draws))
        parents.append(evolution.first)  # the gradient, times 1 - beta
    assert outcomes[0].order.tolist() == outcomes[1].order.tolist()
    for name in ("loss_d", "loss_g", "f_q", "f_d"):
        a, b = (getattr(outcome, name) for outcome in outcomes)
        assert torch.allclose(a, b, rtol=0, atol=1e-5 if name != "f_d" else 1e-4)
    assert not torch.equal(*parents)  # they were used
    assert float((parents[0] - parents[1]).abs().max() / parents[1].abs().max()) < 1e-4


def test_kernels_of_another_version_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that was brought up to date and not installed again holds those of its old source."""
    monkeypatch.setattr(convolution, "VERSION", convolution.VERSION + 1)
    assert convolution.load() == (None, "_convolution.abi3.so was compiled from another convolution.c")


def test_every_change_of_the_kernels_has_a_version() -> None:
    """When this fails: raise the version in convolution.c and convolution.py, and write both down here."""
    source = Path(convolution.__file__).with_name("convolution.c").read_bytes()
    assert (convolution.VERSION, hashlib.sha256(source).hexdigest()[:16]) == (1, "f1062e63567782f5")


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
    """Every function with all its arguments, also those that it writes, at the edge of what it may touch."""
    library = convolution.kernels()
    assert library
    sizes = ((1, 16, 32, 8, 9), (3, 16, 16, 11, 8), (5, 48, 16, 9, 21), (2, 17, 22, 9, 9))
    for kernel, stride in ((3, 1), (4, 2), (5, 2), (3, 2)):
        for n, channels, maps, height, width in sizes:
            y_size = [(side + 2 - kernel) // stride + 1 for side in (height, width)]
            x, y = guarded((n, channels, height, width), end).normal_(), guarded((n, maps, *y_size), end).normal_()
            weight, bias = guarded((maps, channels, kernel, kernel), end).normal_(), guarded((1, maps, 1, 1), end)
            factors, found = guarded((2, n, 1, 1), end).normal_(), guarded((2 * maps, channels, kernel, kernel), end)
            shape = (maps, *y_size, channels, height, width, kernel, kernel, stride, stride, 1, 1)
            pointers = [t.data_ptr() for t in (y, x, factors, found)]
            assert library.weight_gradients(*pointers, 2, n, *shape, 2) == 0
            if channels % 16 or maps % 16 or (kernel, stride) not in ((3, 1), (4, 2)):
                continue
            there, back = (0, 1) if kernel == 3 else (2, 3)
            steps = (kernel * kernel * channels, 1, channels)
            pointers = [t.data_ptr() for t in (x, weight, bias, y)]
            assert library.convolve(*pointers, *x.shape, *y.shape[1:], *steps, there, 2) == 0
            steps = (1, kernel * kernel * channels, channels)
            pointers = [y.data_ptr(), weight.data_ptr(), None, x.data_ptr()]
            assert library.convolve(*pointers, *y.shape, *x.shape[1:], *steps, back, 2) == 0
    print("done")
