"""Affine augmentation (METHODS M3; [DAE] 4.1): flips, quarter-turns, small rotation, translation and magnification.

No noise and no cropping; what moves in from outside repeats the border.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_DEGREES = 20.0
MAX_SHIFT = 0.02  # of the image's side
MAX_MAGNIFICATION = 0.02


@dataclass(frozen=True)
class Moves:
    """One random move per image, all (N,) on the CPU: first the small warp, then the exact flips and quarter-turns."""

    degrees: Tensor  # [0, 20], anticlockwise
    shift: Tensor  # (N, 2) row, column, [0, 0.02] of the side
    magnification: Tensor  # (N, 2) row, column, [0, 0.02]: 0.02 shows everything 2 % larger
    flip_rows: Tensor  # bool: upside down
    flip_columns: Tensor  # bool: left and right exchanged
    quarter_turns: Tensor  # 0 to 3 times 90 degrees; 0 or 2 for images that are not square


def draw_moves(count: int, square: bool, generator: torch.Generator) -> Moves:
    """Random moves from an explicit CPU generator; signs come from the flips that follow the warp."""
    numbers = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    bits = torch.randint(2, (count, 2), generator=generator).bool()
    turns = torch.randint(4, (count,), generator=generator)
    return Moves(
        degrees=numbers[:, 0] * MAX_DEGREES,
        shift=numbers[:, 1:3] * MAX_SHIFT,
        magnification=numbers[:, 3:5] * MAX_MAGNIFICATION,
        flip_rows=bits[:, 0],
        flip_columns=bits[:, 1],
        quarter_turns=turns if square else turns // 2 * 2,
    )


def warp_matrices(moves: Moves, height: int, width: int) -> Tensor:
    """(N, 2, 3) float64 for `affine_grid`: from output to input positions in units of half a side, (x, y) order.

    Forward, a point p = (row, column) in pixels from the centre goes to magnify(rotate(p)) + shift; this inverts it.
    """
    angle = moves.degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    grow_y, grow_x = (1 + moves.magnification).unbind(1)
    shift_y, shift_x = 2 * moves.shift.unbind(1)[0], 2 * moves.shift.unbind(1)[1]
    aspect = height / width
    # Output x, y in half sides; to pixels, undo shift and magnification, rotate back, to half sides of the input.
    xx, xy = cos / grow_x, -sin * aspect / grow_y
    yx, yy = sin / aspect / grow_x, cos / grow_y
    x0, y0 = -(xx * shift_x + xy * shift_y), -(yx * shift_x + yy * shift_y)
    return torch.stack([torch.stack([xx, xy, x0], 1), torch.stack([yx, yy, y0], 1)], 1)


def move(images: Tensor, moves: Moves) -> Tensor:
    """Apply one move per image: (N, C, H, W) -> the same shape, on the images' device, bilinear, border repeated."""
    height, width = images.shape[2:]
    # On the CPU: it is a matrix product, which fast mode on a GPU would round to TF32, by tenths of a pixel.
    matrices = warp_matrices(moves, height, width).to(images.dtype)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False).to(images.device)
    out = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    out = torch.where(_per_image(moves.flip_rows, out), out.flip(2), out)
    out = torch.where(_per_image(moves.flip_columns, out), out.flip(3), out)
    for turns in (1, 2, 3):
        if bool((moves.quarter_turns == turns).any()):
            turned = torch.rot90(out, turns, (2, 3))
            out = torch.where(_per_image(moves.quarter_turns == turns, out), turned, out)
    return out


def _per_image(flags: Tensor, images: Tensor) -> Tensor:
    return flags.to(images.device).view(-1, 1, 1, 1)


def expand(images: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) -> (factor * N, C, H, W): the images themselves, then factor - 1 moved copies of all of them."""
    n, _, height, width = images.shape
    copies = [move(images, draw_moves(n, height == width, generator)) for _ in range(factor - 1)]
    return torch.cat([images, *copies])
