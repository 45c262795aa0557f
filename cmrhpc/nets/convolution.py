"""Convolutions of float32 batches by kernels of our own (convolution.c), on CPUs whose widest vectors are AVX2's.

PyTorch's convolutions come near the peak of such a CPU forward, but its weight gradients reach only half of it to two
thirds: ours take 50 to 80 % of their time. 3x3 convolutions take 60 to 70 % by Winograd's minimal filtering, 4x4 ones
with stride 2 65 to 90 %. All round less than PyTorch's. The kernels are compiled when the package is installed; where
there was no compiler, or on another processor, everything here is PyTorch's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

VERSION = 1  # what convolution_version() answers; raised with every change of convolution.c, so that no old one is used
FEW = 16  # maps below which lanes of the vector units idle
WIDE = 16  # of convolution.c: `convolve` takes multiples of it
SAME, SAME_TURNED, DOWN, UP = range(4)  # what `convolve` of convolution.c can do
# Tiles reach beyond the border of small images, and the transformed kernels take their time.
SMALL = 64  # pixels of an image; or, but for DOWN,
SMALL_BATCH = 800  # pixels of a batch


_hidden = False  # by without_kernels()


def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none or PyTorch's own are quicker."""
    return None if _hidden else _library()


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch's own convolutions meanwhile, in all threads: for comparison."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load()[0] if torch.backends.cpu.get_cpu_capability() == "AVX2" else None


def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, whatever the processor; or None and why they cannot be used."""
    why = "there was no C compiler when cmrhpc was installed"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_convolution{suffix}")
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            version = library.convolution_version()
        except (OSError, AttributeError) as error:  # for another system, or with another OpenMP than torch's
            why = str(error)
            continue
        if version != VERSION:
            why = f"{path.name} was compiled from another convolution.c"
            continue
        pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
        library.convolve.argtypes = [*[pointer] * 4, *[size] * 10, ctypes.c_int, ctypes.c_int]
        library.weight_gradients.argtypes = [*[pointer] * 4, *[size] * 14, ctypes.c_int]
        return library, ""
    return None, why


def quick_convolutions(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While it is on, this thread's F.conv2d and F.conv_transpose2d take the kernels wherever these are quicker.

    device: where the networks compute. Nothing changes for GPUs.
    """
    return contextlib.nullcontext() if device.type != "cpu" or kernels() is None else _QuickConvolutions()


class Shape:
    """How a convolution moves over its input: stride and padding (2 numbers each), and whether it is transposed."""

    def __init__(self, stride: Any, padding: Any, transposed: bool):
        self.stride, self.padding = _pair(stride), _pair(padding)
        self.transposed = transposed
        self.fixed = (self.stride, self.padding, [1, 1], transposed, [0, 0], 1)

    def kind(self, weight: Tensor, gradient: bool) -> int | None:
        """What `convolve` of convolution.c calls this convolution, or its gradient at the input; None: it has none."""
        size, still = tuple(weight.shape[2:]), self.padding == [1, 1]
        if size == (3, 3) and self.stride == [1, 1] and still and not self.transposed:
            return SAME_TURNED if gradient else SAME
        if size == (4, 4) and self.stride == [2, 2] and still:
            return UP if self.transposed != gradient else DOWN
        return None


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    return values * 2 if len(values) == 1 else values


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """(N, I, H, W) -> (N, O, H', W')."""
    kind = shape.kind(weight, gradient=False)
    maps = weight.shape[1 if shape.transposed else 0]
    fits = bias is None or (bias.dtype == x.dtype and bias.device == x.device and bias.shape == (maps,))
    if kind is None or not fits or not _suits_kind(kind, x, weight, maps_first=not shape.transposed):
        return torch.convolution(x, weight, bias, *shape.fixed)
    double, half = [2 * size for size in x.shape[2:]], [size // 2 for size in x.shape[2:]]
    sizes = double if kind == UP else half if kind == DOWN else x.shape[2:]
    return _convolve(kind, x, weight, bias, sizes, maps_first=not shape.transposed)


def input_gradient(grad_output: Tensor, x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """Gradient at x (N, I, H, W) for grad_output (N, O, H', W')."""
    kind = shape.kind(weight, gradient=True)
    if kind is not None and _suits_kind(kind, grad_output, weight, maps_first=shape.transposed):
        return _convolve(kind, grad_output, weight, None, x.shape[2:], maps_first=shape.transposed)
    mask = [True, False, False]
    return torch.ops.aten.convolution_backward(grad_output, x, weight, None, *shape.fixed, mask)[0]


def weight_gradient(grad_output: Tensor, x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """Gradient at weight for grad_output (N, O, H', W') and x (N, I, H, W)."""
    if suits_weight_gradients(x, weight):
        return weight_gradients(grad_output, x, weight, shape, None)[0]
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(grad_output, x, weight, None, *shape.fixed, mask)[1]


def suits_weight_gradients(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can compute this convolution's weight gradients and are quicker."""
    return _suits(x, weight) and min(weight.shape[:2]) >= FEW


def weight_gradients(grad_output: Tensor, x: Tensor, weight: Tensor, shape: Shape, factors: Tensor | None) -> Tensor:
    """Gradients (M, *weight.shape) for the output gradients factors[m] * grad_output, factors (M, N); without factors
    for grad_output alone, M = 1. Only where suits_weight_gradients()."""
    library = kernels()
    assert library is not None
    # A transposed convolution is the gradient of a convolution from its output to its input.
    outer, inner = (x, grad_output) if shape.transposed else (grad_output, x)
    outer, inner = _channels_last(outer), _channels_last(inner)
    losses = 1 if factors is None else len(factors)
    found = x.new_empty(losses, weight.shape[0], *weight.shape[2:], weight.shape[1])
    if factors is not None:
        factors = factors.contiguous()
    sizes = (losses, len(x), *outer.shape[1:], *inner.shape[1:], *weight.shape[2:], *shape.stride, *shape.padding)
    pointers = (outer.data_ptr(), inner.data_ptr(), None if factors is None else factors.data_ptr(), found.data_ptr())
    _check(library.weight_gradients(*pointers, *sizes, torch.get_num_threads()))
    return found.movedim(4, 2)


def _convolve(
    kind: int, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], maps_first: bool
) -> Tensor:
    """(N, channels, H, W) -> (N, maps, *sizes). weight (maps, channels, ..) if maps_first, else turned round."""
    library = kernels()
    assert library is not None
    x, weight = _channels_last(x), _channels_last(weight)
    maps, taps, second = weight.shape[0 if maps_first else 1], weight[0, 0].numel(), weight.shape[1]
    y = torch.empty((len(x), maps, *sizes), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    steps = (taps * second, 1, second) if maps_first else (1, taps * second, second)
    pointers = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    _check(library.convolve(*pointers, *x.shape, *y.shape[1:], *steps, kind, torch.get_num_threads()))
    return y


def _check(result: int) -> None:
    if result == -1:
        raise MemoryError("no memory for a convolution")
    assert result == 0


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if kernels() is None or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (x, weight)):
        return False
    layout = torch.channels_last
    return len(x) > 0 and (x.is_contiguous(memory_format=layout) or weight.is_contiguous(memory_format=layout))


def _suits_kind(kind: int, x: Tensor, weight: Tensor, maps_first: bool) -> bool:
    positions = x.shape[2] * x.shape[3] // (4 if kind == DOWN else 1)
    large = positions >= SMALL or (kind != DOWN and len(x) * positions >= SMALL_BATCH)
    fits = x.shape[1] == weight.shape[1 if maps_first else 0] and min(x.shape[2:]) > 1
    return fits and large and all(channels % WIDE == 0 for channels in weight.shape[:2]) and _suits(x, weight)


class _Convolution(torch.autograd.Function):
    """x, weight, bias, shape -> the convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        return convolve(x, weight, bias, shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again, which PyTorch's own can be
            mask = [of_x, of_weight, of_bias]
            maps = [grad_output.shape[1]]
            found = torch.ops.aten.convolution_backward(grad_output, x, weight, maps, *ctx.shape.fixed, mask)
            return *found, None
        return (
            input_gradient(grad_output, x, weight, ctx.shape) if of_x else None,
            weight_gradient(grad_output, x, weight, ctx.shape) if of_weight else None,
            grad_output.sum((0, 2, 3)) if of_bias else None,
            None,
        )


class _QuickConvolutions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        made = rule(*args, **(kwargs or {})) if rule else None
        return func(*args, **(kwargs or {})) if made is None else made


def _conv2d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:  # fmt: skip
    if isinstance(padding, str) or groups != 1 or _pair(dilation) != [1, 1]:
        return None
    return _convolution(input, weight, bias, Shape(stride, padding, False))


def _conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor | None:  # fmt: skip
    if groups != 1 or _pair(dilation) != [1, 1] or _pair(output_padding) != [0, 0]:
        return None
    return _convolution(input, weight, bias, Shape(stride, padding, True))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor | None:
    """None, for PyTorch's own, where the kernels do not suit, and for tensors that only stand for others."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if x.dim() != 4 or torch.is_autocast_enabled("cpu") or any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return None
    if weight[0, 0].numel() == 1 or not suits_weight_gradients(x, weight):  # PyTorch's 1x1 are as quick
        return None
    if not torch.is_grad_enabled():
        return convolve(x, weight, bias, shape) if shape.kind(weight, gradient=False) is not None else None
    return _Convolution.apply(x, weight, bias, shape)


_RULES: dict[Any, Callable[..., Tensor | None]] = {F.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d}
