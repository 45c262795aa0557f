"""Blocks that the networks share: residual blocks, self-attention, the upsampling convolution, image sizes.

Nothing here mixes the samples of a batch: normalisation is per sample (GroupNorm), so that one image's gradient does
not depend on its neighbours in the batch. A network says so in its attribute `mixes_samples`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmrhpc.nets.quick import GroupNorm, upsample_bilinear

SLOPE = 0.2  # of every leaky ReLU


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 8 groups that divide the channels."""
    return GroupNorm(math.gcd(8, channels), channels)


class UpConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2 followed by a 3x3 convolution, computed as one transposed convolution.

    Each output pixel of the pair sees a 2x2 neighbourhood of the small image only, so summing the kernel's taps that
    fall on the same pixel gives a 4x4 transposed kernel: the same result with 4 instead of 9 products per output
    and without the large intermediate image. (N, C, H, W) -> (N, out, 2H, 2W).
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        return F.conv_transpose2d(x, summed_taps(self.weight), self.bias if bias else None, stride=2, padding=1)


def summed_taps(weight: Tensor) -> Tensor:
    """The 4x4 transposed kernel (in, out, 4, 4) that acts as nearest upsampling and then `weight` (out, in, 3, 3).

    One matrix product, whose result lies in channels-last as convolutions there want it: padding and adding took as
    long as half of the convolution itself.
    """
    channels_out, channels_in = weight.shape[:2]
    with torch.autocast(weight.device.type, enabled=False):
        taps = weight.permute(1, 2, 3, 0).reshape(channels_in, 9, channels_out)
        summed = torch.matmul(_tap_sums(weight.device, weight.dtype), taps)
    return summed.view(channels_in, 4, 4, channels_out).permute(0, 3, 1, 2)


@functools.cache
def _tap_sums(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(16, 9): which taps of the 3x3 kernel each tap of the 4x4 transposed one is the sum of."""
    with torch.inference_mode(False):  # whoever asks first, trainings use it later
        along = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        return torch.kron(along, along).to(device, dtype)


class UpBlock(nn.Module):
    """Generator's residual block: twice (norm, leaky ReLU, conv 3x3), the second convolution upsampling, + skip.

    The wide convolution (in -> out), both norms and both activations work at the low resolution. The skip path is a
    1x1 convolution and bilinear upsampling: nearest-neighbour skips leave the blocks of every level in the image.
    """

    def __init__(self, channels_in: int, channels_out: int, up: bool):
        super().__init__()
        self.up = up
        self.norm1, self.norm2 = group_norm(channels_in), group_norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = UpConv2d(channels_out, channels_out) if up else nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(x), SLOPE, inplace=True))
        h = F.leaky_relu(self.norm2(h), SLOPE, inplace=True)
        if not self.up:
            return self.conv2(h).add_(self.skip(x))
        # The upsampled bias is the bias: as part of the small image it costs next to nothing.
        bias = self.conv2.bias
        assert bias is not None
        if isinstance(self.skip, nn.Conv2d):
            skip = F.conv2d(x, self.skip.weight, bias if self.skip.bias is None else bias + self.skip.bias)
        else:
            skip = x + bias.to(x.dtype).view(-1, 1, 1)
        return self.conv2(h, bias=False).add_(upsample_bilinear(skip))


class DownBlock(nn.Module):
    """Discriminator's residual block: leaky ReLU, conv 3x3 [stride 2], leaky ReLU, conv 3x3 (in -> out), + skip.

    No norm. The stride sits in the first convolution, so that the wide one works at the low resolution.
    """

    def __init__(self, channels_in: int, channels_out: int, down: bool):
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, stride=2 if down else 1, padding=1)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, SLOPE)), SLOPE, inplace=True))
        return h.add_(self.skip(F.avg_pool2d(x, 2) if self.down else x))


class SelfAttention(nn.Module):
    """Self-attention over positions (SAGAN; [DAE] ref. 28): x + gamma * out(softmax(q k^T / sqrt d) v), gamma from 0.

    Keys and values are averaged over 2x2 positions, which quarters the attention matrix.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.width = max(8, channels // 4)
        self.query = nn.Conv2d(channels, self.width, 1, bias=False)
        self.key_value = nn.Conv2d(channels, 2 * self.width, 1, bias=False)
        self.out = nn.Conv2d(self.width, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        pooled = F.avg_pool2d(x, 2) if height % 2 == 0 and width % 2 == 0 else x
        # (N, H*W, d): no copy in channels-last. Scaled before the product, which is much larger.
        q = self.query(x).permute(0, 2, 3, 1).flatten(1, 2) * self.width**-0.5
        k, v = self.key_value(pooled).permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=2)
        # Written out: at this size faster than the fused kernels on CPUs, and differentiable twice.
        attention = torch.softmax(q @ k.transpose(1, 2), dim=2)
        attended = (attention @ v).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        # gamma goes into the small weight instead of the large result.
        return x + F.conv2d(attended, self.gamma * self.out.weight)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Seeded initial weights: He normal for convolutions and linear layers, biases 0.

    The last convolution of every residual block starts small, so that a block begins close to its skip path; this
    stands in for the normalisation that the discriminator does without.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            std = math.sqrt(2 / fan_in) * (0.5 if name.endswith("conv2") else 1.0)
            with torch.no_grad():
                layer.weight.normal_(0.0, std, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
