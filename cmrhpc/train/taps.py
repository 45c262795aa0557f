"""Gradients of several losses at a network's weights from one backward pass through its activations.

Where a network does not mix the samples of a batch, and the losses' gradients at its output differ by a factor per
sample only, they differ by the same factors at every activation. So the activations' gradients are computed once, and
each loss costs its weight gradients alone. `Taps` is a mode: while it is on, convolutions, linear layers and group
norms whose first axis is the batch keep what their weight gradients need. Weights that are used in any other way get
their gradients by the usual way, and both are added, so that the sum is right for every module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cmrhpc.nets.convolution import Shape, convolve, input_gradient, suits_weight_gradients, weight_gradients
from cmrhpc.nets.quick import as_autocast

LARGE = 64  # positions of an image from which weight gradients of each sample alone are worth their sums
TABLE = 2**26  # numbers that these may take at most: 256 MiB


@dataclass
class _Tap:
    """One use of weights: (x, gradient at the result) -> weight gradients for factors (M, N), first axis M."""

    weights: list[Tensor]  # with their history: a weight may itself be computed from parameters
    gradients: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    kept: tuple[Tensor, Tensor] | None = None


class Taps(TorchFunctionMode):
    """Use: `with taps: y = network(x)`, x requiring a gradient; then `gradients`, once. batch: N."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.taps: list[_Tap] = []
        self.open = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        x = args[0] if args else None
        if rule and isinstance(x, Tensor) and x.requires_grad and x.shape[0] == self.batch:
            made = rule(self, *args, **(kwargs or {}))
            if made is not None:
                return made
        return func(*args, **(kwargs or {}))

    def gradients(
        self, y: Tensor, x: Tensor, grad_output: Tensor, factors: Tensor, parameters: Sequence[Tensor]
    ) -> list[list[Tensor]] | None:
        """Gradients at `parameters` for each output gradient factors[m] * grad_output; factors (M, N).

        None if a tapped layer's input does not depend on x (a learned constant).
        """
        torch.autograd.grad(y, x, grad_output, retain_graph=True)
        self.open = False  # a later pass through the taps carries other gradients
        if any(tap.kept is None for tap in self.taps):
            return None
        weights: list[Tensor] = []
        of_weights: list[Tensor] = []
        for tap in self.taps:
            assert tap.kept is not None
            weights += tap.weights
            with torch.no_grad():
                of_weights += tap.gradients(*tap.kept, factors)
            tap.kept = None
        found = []
        for m, factor in enumerate(factors):
            more: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
            tapped = torch.autograd.grad(weights, parameters, [gradient[m] for gradient in of_weights], **more)
            scaled = grad_output * factor.to(grad_output.dtype).view(-1, *[1] * (grad_output.dim() - 1))
            others = torch.autograd.grad(y, parameters, scaled, **more)
            found.append([_sum(a, b, p) for a, b, p in zip(tapped, others, parameters, strict=True)])
        return found


def _sum(a: Tensor | None, b: Tensor | None, parameter: Tensor) -> Tensor:
    if a is None or b is None:
        left = a if b is None else b
        return torch.zeros_like(parameter) if left is None else left
    return a + b


class _Tapped(torch.autograd.Function):
    """The operation with its gradient at x alone; what the weights need goes to the tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Taps, tap: _Tap, run: Callable[[Tensor], Any], back: Callable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rest = taps, tap, back
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        taps, tap, back = ctx.rest
        if taps.open:
            tap.kept = (x, grad_output)
        return back(x, grad_output), None, None, None, None


def _apply(taps: Taps, x: Tensor, tap: _Tap, run: Callable, back: Callable) -> Tensor:
    taps.taps.append(tap)
    return _Tapped.apply(x, taps, tap, run, back)


def _convolution(
    taps: Taps, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, transposed: bool
) -> Tensor | None:
    if isinstance(padding, str) or x.dim() != 4 or not weight.requires_grad:
        return None
    x, weight, bias = as_autocast(x, weight, bias)
    shape = Shape(stride, padding, transposed)
    plain, plain_bias = weight.detach(), None if bias is None else bias.detach()

    def gradients(x: Tensor, grad_output: Tensor, factors: Tensor) -> list[Tensor]:
        factors = factors.to(x.dtype)
        if suits_weight_gradients(x, plain):
            found = weight_gradients(grad_output, x, plain, shape, factors)
        else:
            found = _weight_gradients(grad_output, x, plain, shape, factors)
        return [found] if bias is None else [found, factors @ grad_output.sum((2, 3))]

    tap = _Tap([weight] if bias is None else [weight, bias], gradients)
    return _apply(
        taps, x, tap, lambda x: convolve(x, plain, plain_bias, shape), lambda x, g: input_gradient(g, x, plain, shape)
    )


def _weight_gradients(grad_output: Tensor, x: Tensor, weight: Tensor, shape: Shape, factors: Tensor) -> Tensor:
    """(M, *weight.shape) by PyTorch's convolutions: every sample's own gradients once and then their sums with the
    factors; or, where images are so small that these sums would take longer, or so many that they would fill the
    memory, all samples' gradients per loss."""

    def one(grad_output: Tensor, x: Tensor) -> Tensor:
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(grad_output, x, weight, None, *shape.fixed, mask)[1]

    positions = min(x[0, 0].numel(), grad_output[0, 0].numel())
    if x.device.type == "cpu" and positions >= LARGE and len(x) * weight.numel() <= TABLE:
        table = x.new_empty(len(x), weight.numel())
        for row, x_one, grad_one in zip(table, x.split(1), grad_output.split(1), strict=True):
            row.view(_last(weight).shape).copy_(_last(one(grad_one, x_one)))
        return (factors @ table).view(-1, *_last(weight).shape).movedim(4, 2)
    scales = factors[:, :, None, None, None]
    if x.numel() < grad_output.numel():
        return torch.stack([one(grad_output, x * scale) for scale in scales])
    return torch.stack([one(grad_output * scale, x) for scale in scales])


def _last(weight: Tensor) -> Tensor:
    """(O, I, kh, kw) -> (O, kh, kw, I), as it lies in memory in channels-last."""
    return weight.permute(0, 2, 3, 1)


def _conv2d(
    taps: Taps, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:  # fmt: skip
    if groups != 1 or dilation not in (1, (1, 1), [1, 1]):
        return None
    return _convolution(taps, x, weight, bias, stride, padding, False)


def _conv_transpose2d(
    taps: Taps, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor | None:  # fmt: skip
    if groups != 1 or dilation not in (1, (1, 1), [1, 1]) or output_padding not in (0, (0, 0), [0, 0]):
        return None
    return _convolution(taps, x, weight, bias, stride, padding, True)


def _linear(taps: Taps, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if x.dim() != 2 or not weight.requires_grad:
        return None
    x, weight, bias = as_autocast(x, weight, bias)
    plain, plain_bias = weight.detach(), None if bias is None else bias.detach()

    def gradients(x: Tensor, grad_output: Tensor, factors: Tensor) -> list[Tensor]:
        factors = factors.to(x.dtype)
        scaled = factors.unsqueeze(2) * x  # (M, N, in)
        found = [grad_output.t() @ scaled]
        return found if bias is None else [*found, factors @ grad_output]

    tap = _Tap([weight] if bias is None else [weight, bias], gradients)
    return _apply(taps, x, tap, lambda x: F.linear(x, plain, plain_bias), lambda x, grad_output: grad_output @ plain)


def _group_norm(
    taps: Taps, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    if weight is None or bias is None or x.dim() != 4 or not (weight.requires_grad and bias.requires_grad):
        return None
    if x.device.type != "cpu":  # its kernels take one format and one layout; there autocast normalises in float32 too
        x = x.to(weight.dtype).contiguous()
    n, c, height, width = x.shape
    sizes = (n, c, height * width, groups)
    plain, plain_bias = weight.detach(), bias.detach()
    moments: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        y, *moments[:] = torch.ops.aten.native_group_norm(x, plain, plain_bias, *sizes, eps)
        return y

    def back(x: Tensor, grad_output: Tensor) -> Tensor:
        mask = [True, False, False]
        grad_output = grad_output.to(x.dtype).contiguous(memory_format=_layout(x))
        return torch.ops.aten.native_group_norm_backward(grad_output, x, *moments, plain, *sizes, mask)[0]

    def gradients(x: Tensor, grad_output: Tensor, factors: Tensor) -> list[Tensor]:
        """Of every sample and channel first, then the factors: weight's sums grad_output times normalised x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, scale = (m.to(wide).repeat_interleave(c // groups, dim=1) for m in moments)  # (N, C)
        sums = grad_output.sum((2, 3), dtype=wide)
        products = (grad_output.to(wide) * x).sum((2, 3))
        factors = factors.to(wide)
        found = factors @ ((products - mean * sums) * scale), factors @ sums
        return [f.to(weight.dtype) for f in found]

    return _apply(taps, x, _Tap([weight, bias], gradients), run, back)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.conv2d: _conv2d,
    F.conv_transpose2d: _conv_transpose2d,
    F.linear: _linear,
    F.group_norm: _group_norm,
}
