"""The SimGAN pair (METHODS M9; [SIM] Table 1, Figs 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SimResidual(nn.Module):
    """x + conv 3x3(PReLU(conv 3x3(x))): PReLU inside, no activation after the sum ([SIM] Fig. 4)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.prelu(self.conv1(x)))


class SimRefiner(nn.Module):
    """Conv 3x3 stride 1 -> 5 residual blocks -> conv 1x1 -> tanh; images (N, C, H, W) in [-1, 1] -> the same shape."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(SimResidual(width) for _ in range(5)))
        self.conv_out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv_out(self.blocks(self.conv_in(x))))


class SimDiscriminator(nn.Module):
    """Conv 3x3 s2, conv 3x3 s2, max pool 3x3 s1, 2 residual blocks, conv 1x1, conv 1x1, softmax at every position.

    Images (N, C, H, W) -> logits (N, 2, H/4, W/4): class 0 real, class 1 refined ([SIM] 2). The softmax is in the loss.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.prelu1 = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.prelu2 = nn.PReLU(2 * width)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.blocks = nn.Sequential(*(SimResidual(2 * width) for _ in range(2)))
        self.conv3 = nn.Conv2d(2 * width, width, 1)
        self.prelu3 = nn.PReLU(width)
        self.conv4 = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu1(self.conv1(x))
        x = self.pool(self.prelu2(self.conv2(x)))
        return self.conv4(self.prelu3(self.conv3(self.blocks(x))))


def simgan_pair(channels: int, width: int, generator: torch.Generator) -> tuple[SimRefiner, SimDiscriminator]:
    """R and D with seeded initial weights: He normal, except that R starts near the identity (ours).

    Its first features carry the image, the blocks add little to them, and the last convolution reads them: refinement
    then begins at the synthetic image instead of having to find its way back to it with plain SGD.
    """
    r, d = SimRefiner(channels, width), SimDiscriminator(channels, width)
    for module in [*r.modules(), *d.modules()]:
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.normal_(0.0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                assert module.bias is not None
                module.bias.zero_()
    own = torch.eye(channels)
    with torch.no_grad():
        r.conv_in.weight[:channels] = 0.0
        r.conv_in.weight[:channels, :, 1, 1] = own
        for block in r.blocks:
            assert isinstance(block, SimResidual)
            block.conv2.weight *= 0.1
        r.conv_out.weight *= 0.1
        r.conv_out.weight[:, :channels, 0, 0] = 1.2 * own  # tanh flattens the ends: 1.2 is nearest over [-1, 1]
    return r, d
