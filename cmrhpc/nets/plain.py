"""The networks written with PyTorch's own layers alone: the baseline of `cmrhpc bench` and a reference for the tests.

Same parameters, same function: only what is a trick of computing is taken out. Upsampling and
its 3x3 convolution are two steps, convolutions to one map are ordinary ones, attention is written as in its paper.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmrhpc.nets.blocks import SLOPE, SelfAttention, UpBlock
from cmrhpc.nets.quick import FewMapsConv2d, FewMapsConvTranspose2d, GroupNorm

Network = TypeVar("Network", bound=nn.Module)


class PlainUpBlock(UpBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(x), SLOPE, inplace=True))
        h = F.leaky_relu(self.norm2(h), SLOPE, inplace=True)
        skip = self.skip(x)
        if self.up:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            skip = F.interpolate(skip, scale_factor=2.0, mode="bilinear")
        return F.conv2d(h, self.conv2.weight, self.conv2.bias, padding=1).add_(skip)


class PlainSelfAttention(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        pooled = F.avg_pool2d(x, 2) if height % 2 == 0 and width % 2 == 0 else x
        q = self.query(x).flatten(2)  # (N, d, positions)
        k, v = self.key_value(pooled).flatten(2).chunk(2, dim=1)
        attention = torch.softmax(q.transpose(1, 2) @ k * self.width**-0.5, dim=2)
        attended = (v @ attention.transpose(1, 2)).unflatten(2, (height, width))
        return x + self.gamma * self.out(attended)


class PlainConv2d(FewMapsConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, x)


class PlainConvTranspose2d(FewMapsConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return nn.ConvTranspose2d.forward(self, x, output_size)


class PlainGroupNorm(GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.GroupNorm.forward(self, x)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    UpBlock: PlainUpBlock,
    SelfAttention: PlainSelfAttention,
    FewMapsConv2d: PlainConv2d,
    FewMapsConvTranspose2d: PlainConvTranspose2d,
    GroupNorm: PlainGroupNorm,
}


def with_plain_layers(network: Network) -> Network:
    """A copy that computes the same from the same parameters with PyTorch's own layers."""
    network = copy.deepcopy(network)
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network
