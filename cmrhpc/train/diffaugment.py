"""Differentiable augmentation of everything that D sees (Zhao et al., NeurIPS 2020, policy color, translation, cutout).

D judges T(x) and T(G(z)) and never a plain image; G's gradient flows through T. Real images need not be enlarged, and
since fakes are treated alike, G does not learn to make augmented images. Every sample has its own draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmrhpc.train.compute import sent

NUMBERS = (
    7  # per sample: brightness, saturation, contrast, shift of rows and columns, centre of the cut, rows and columns
)
SHIFT = 0.125  # of the side: the largest translation
CUT = 0.5  # of the side: the square that is cut out


@dataclass(frozen=True)
class Views:
    """The draws of one generation, uniform in [0, 1). T = D steps, B = batch, E = scoring batch, U = NUMBERS."""

    real: Tensor  # (T, B, U) also of mixed images
    fake: Tensor  # (T, B, U)
    training: Tensor  # (B, U) the same for all offspring
    scoring_real: Tensor  # (E, U)
    scoring_fake: Tensor  # (E, U) the same for all offspring

    @staticmethod
    def draw(steps: int, batch: int, scoring: int, rng: torch.Generator, device: torch.device) -> Views:
        def some(*shape: int) -> Tensor:
            return sent(torch.rand(*shape, NUMBERS, generator=rng), device)

        return Views(some(steps, batch), some(steps, batch), some(batch), some(scoring), some(scoring))


def augment(images: Tensor, draw: Tensor) -> Tensor:
    """T(images): (N, C, H, W) with draw (N, NUMBERS) in [0, 1) -> the same shape. Differentiable twice in the images.

    Brightness adds -0.5 to 0.5; saturation times 0 to 2 about the mean of the channels, which leaves one channel as it
    is; contrast times 0.5 to 1.5 about the mean of the image; translation by at most an eighth of the side; a square of
    half the side, its centre anywhere, is cut out. What is uncovered or cut is 0.
    """
    height, width = images.shape[2:]
    brightness, saturation, contrast = (draw[:, i].to(images.dtype).view(-1, 1, 1, 1) for i in range(3))
    x = images + (brightness - 0.5)
    if x.shape[1] > 1:
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * (2 * saturation)
    centre = x.mean((1, 2, 3), keepdim=True)
    x = centre + (x - centre) * (contrast + 0.5)
    # Products with matrices of zeros and ones move pixels exactly, and their gradients need no scattered additions.
    # Fast mode on a GPU rounds the pixels in them to TF32, which is finer than the bfloat16 that D rounds them to.
    rows, columns = _moved(draw[:, 3], height, x.dtype), _moved(draw[:, 4], width, x.dtype)
    x = rows[:, None] @ x @ columns[:, None].transpose(2, 3)
    kept = 1 - _inside(draw[:, 5], height, x.dtype)[:, :, None] * _inside(draw[:, 6], width, x.dtype)[:, None, :]
    return x * kept[:, None]


def _moved(draw: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """(N, side, side) with a one where output pixel i shows input pixel i + shift; shift -s to s, s = side / 8."""
    most = int(side * SHIFT + 0.5)
    shift = (draw * (2 * most + 1)).floor().long() - most
    at = torch.arange(side, device=draw.device)
    return (at[None, :] == at[:, None] + shift[:, None, None]).to(dtype)


def _inside(draw: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """(N, side) with ones in the interval of half the side around a centre that may be any pixel."""
    length = int(side * CUT + 0.5)
    first = (draw * (side + 1 - length % 2)).floor().long() - length // 2
    at = torch.arange(side, device=draw.device)
    return ((at >= first[:, None]) & (at < first[:, None] + length)).to(dtype)
