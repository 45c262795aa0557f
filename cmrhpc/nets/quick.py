"""Layers that compute the same as PyTorch's, in the form that a CPU does quickly. Elsewhere they are PyTorch's own.

The numbers are of 64 images on one core: a 3x3 convolution from 16 maps to one at 80 x 80 took 18 ms forward and
18 ms for its weights' gradient, in blocks 8 and 6 ms; GroupNorm's backward in bfloat16 took 20 ms channels-last and
3 ms by way of the other layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 1024  # pixels from which PyTorch's channels-last GroupNorm takes its quick forward path
BLOCK_MAPS = 16  # a convolution to fewer maps leaves lanes of the vector units idle


def as_autocast(x: Tensor, *weights: Tensor | None) -> list[Any]:
    """All in the format that autocast would give a convolution; what is None stays so."""
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        return [None if t is None else t.to(kind) for t in (x, *weights)]
    return [x, *weights]


def block_size(maps: int, height: int, width: int) -> int:
    """Side of the blocks of pixels that make up about BLOCK_MAPS maps: 1, 2 or 4, and a divisor of the image."""
    for side in (4, 2):
        if maps * side**2 <= BLOCK_MAPS and height % side == 0 and width % side == 0:
            return side
    return 1


class FewMapsConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 to very few maps (an image).

    The maps of a block of 4 x 4 pixels are computed as 16 maps of one 6 x 6 convolution with stride 4 and then put in
    their places. (N, C, H, W) -> (N, maps, H, W).
    """

    def __init__(self, channels_in: int, maps: int):
        super().__init__(channels_in, maps, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        side = block_size(self.out_channels, *x.shape[2:])
        if x.device.type != "cpu" or side == 1:
            return super().forward(x)
        x, weight = as_autocast(x, self.weight)
        assert self.bias is not None
        return _InBlocks.apply(x, weight, side) + self.bias.to(x.dtype).view(-1, 1, 1)


class FewMapsConvTranspose2d(nn.ConvTranspose2d):
    """A 4x4 transposed convolution with stride 2 and padding 1 to very few maps, in blocks in the same way.

    (N, C, H, W) -> (N, maps, 2H, 2W).
    """

    def __init__(self, channels_in: int, maps: int):
        super().__init__(channels_in, maps, 4, stride=2, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        side = block_size(self.out_channels, 2 * x.shape[2], 2 * x.shape[3])
        if x.device.type != "cpu" or side != 4 or output_size is not None:
            return super().forward(x, output_size)
        x, weight = as_autocast(x, self.weight)
        assert self.bias is not None
        return _TransposedInBlocks.apply(x, weight) + self.bias.to(x.dtype).view(-1, 1, 1)


def _gradient(grad_output: Tensor, x: Tensor, weight: Tensor, stride: int, transposed: bool, mask: list[bool]) -> Any:
    """Gradients at x and weight by PyTorch's own convolution."""
    maps = weight.shape[1 if transposed else 0]
    return torch.ops.aten.convolution_backward(
        grad_output, x, weight, [maps], [stride, stride], [1, 1], [1, 1], transposed, [0, 0], 1, mask
    )


class _InBlocks(torch.autograd.Function):
    """x, weight (maps, C, 3, 3), side -> the 3x3 convolution with padding 1, without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, side: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.side = side
        # Pixel (a, b) of a block sees the block's own window of side + 2, shifted by (a, b).
        shifts = [(b, side - 1 - b, a, side - 1 - a) for a in range(side) for b in range(side)]
        kernel = torch.stack([F.pad(weight, shift) for shift in shifts], dim=1).flatten(0, 1)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(F.conv2d(x, kernel, None, side, 1), side)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        side, grad_x, grad_weight = ctx.side, None, None
        if ctx.needs_input_grad[0]:
            grad_x = _gradient(grad_output, x, weight, 1, False, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            maps, channels = weight.shape[:2]
            kernel = weight.new_empty(maps * side**2, channels, side + 2, side + 2)
            kernel = kernel.contiguous(memory_format=torch.channels_last)
            blocks = F.pixel_unshuffle(grad_output, side).contiguous(memory_format=torch.channels_last)
            whole = _gradient(blocks, x, kernel, side, False, [False, True, False])[1]
            whole = whole.unflatten(0, (maps, side, side)).to(torch.promote_types(whole.dtype, torch.float32))
            windows = [whole[:, a, b, :, a : a + 3, b : b + 3] for a in range(side) for b in range(side)]
            grad_weight = torch.stack(windows).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


# Output row 4p + e of a block sees input row 2p - 1 + t through tap e + 3 - 2t, where there is such a tap.
_TAPS = torch.tensor([[tap if 0 <= (tap := e + 3 - 2 * t) < 4 else 4 for t in range(4)] for e in range(4)])


class _TransposedInBlocks(torch.autograd.Function):
    """x, weight (C, maps, 4, 4) -> the transposed convolution with stride 2 and padding 1, without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        padded = F.pad(weight, (0, 1, 0, 1))  # tap 4 is nothing
        kernel = padded[:, :, _TAPS[:, None, :, None], _TAPS[None, :, None, :]]  # (C, maps, e, f, t, u)
        kernel = kernel.flatten(1, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(F.conv2d(x, kernel, None, 2, 1), 4)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        x, weight = ctx.saved_tensors
        return _gradient(grad_output, x, weight, 2, True, mask)[:2]


def upsample_bilinear(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), bilinear. PyTorch's own, except in deterministic mode on GPUs, where its gradient
    is a slow sorted scatter-add."""
    if x.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return doubled(doubled(x, 2), 3)
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


def doubled(x: Tensor, dim: int) -> Tensor:
    """Linear upsampling by 2 along one dimension, by slices and sums alone: each output lies a quarter of the way from
    a pixel to its neighbour (to itself at the border)."""
    size = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)
    return torch.stack([torch.lerp(x, before, 0.25), torch.lerp(x, after, 0.25)], dim + 1).flatten(dim, dim + 1)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, which in bfloat16 channels-last is slow for small images, and its backward for all: there it goes by
    way of the other layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        if not torch.is_grad_enabled() and x.shape[2] * x.shape[3] >= LARGE:
            return super().forward(x)
        return _ToLayout.apply(super().forward(_ToLayout.apply(x, torch.contiguous_format)), torch.channels_last)


class _ToLayout(torch.autograd.Function):
    """The same tensor in another memory format; its gradient comes back in the format that the tensor had."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.back = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output.contiguous(memory_format=ctx.back), None
