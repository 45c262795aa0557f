"""Affine augmentation against a slow numpy version, its ranges, and exactness of flips and quarter-turns (M3)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from cmrhpc.study import Compute
from cmrhpc.train.affine import Moves, draw_moves, expand, move
from cmrhpc.train.compute import setup_compute


def still(count: int) -> Moves:
    zero, no = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    two = torch.zeros(count, 2, dtype=torch.float64)
    return Moves(zero, two, two, no, no, torch.zeros(count, dtype=torch.long))


def slow_warp(image: np.ndarray, degrees: float, shift: np.ndarray, magnification: np.ndarray) -> np.ndarray:
    """For every output pixel: undo shift and magnification, rotate back, read bilinearly with the border repeated."""
    height, width = image.shape
    out = np.zeros_like(image)
    angle = math.radians(degrees)
    for i in range(height):
        for j in range(width):
            y = (i - (height - 1) / 2 - shift[0] * height) / (1 + magnification[0])
            x = (j - (width - 1) / 2 - shift[1] * width) / (1 + magnification[1])
            # Anticlockwise on the screen (rows point down): forward (x, y) -> (x cos + y sin, -x sin + y cos).
            source_x = x * math.cos(angle) - y * math.sin(angle) + (width - 1) / 2
            source_y = x * math.sin(angle) + y * math.cos(angle) + (height - 1) / 2
            source_x, source_y = min(max(source_x, 0), width - 1), min(max(source_y, 0), height - 1)
            x0, y0 = min(int(source_x), width - 2), min(int(source_y), height - 2)
            u, v = source_x - x0, source_y - y0
            top = (1 - u) * image[y0, x0] + u * image[y0, x0 + 1]
            bottom = (1 - u) * image[y0 + 1, x0] + u * image[y0 + 1, x0 + 1]
            out[i, j] = (1 - v) * top + v * bottom
    return out


@pytest.mark.parametrize("shape", [(12, 12), (9, 14)])
def test_warp_against_the_slow_version(shape: tuple[int, int]) -> None:
    images = torch.randn(6, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moves = draw_moves(6, True, torch.Generator().manual_seed(1))
    no = torch.zeros(6, dtype=torch.bool)
    moves = dataclasses.replace(moves, flip_rows=no, flip_columns=no, quarter_turns=torch.zeros(6, dtype=torch.long))
    got = move(images, moves).numpy()
    for n in range(6):
        for c in range(2):
            slow = slow_warp(
                images[n, c].numpy(), float(moves.degrees[n]), moves.shift[n].numpy(), moves.magnification[n].numpy()
            )
            assert np.allclose(got[n, c], slow, rtol=0, atol=1e-10)


@pytest.mark.device
def test_fast_mode_moves_no_image_elsewhere(device: str) -> None:
    """A product in TF32 would misplace pixels near the border of 80 by a twentieth of a pixel."""
    if device == "cpu":
        pytest.skip("only CUDA has TF32: pytest -m device --device cuda")
    coarse = torch.randn(6, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(80, 80), mode="bilinear")
    moves = draw_moves(6, True, torch.Generator().manual_seed(1))
    setup_compute(Compute(threads=1, mode="fast"))
    try:
        moved = move(images.to(device), moves).cpu()
    finally:
        setup_compute(Compute(threads=1))
    assert torch.allclose(moved, move(images.double(), moves).float(), atol=1e-4)


def test_flips_and_quarter_turns_are_exact() -> None:
    images = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    base = still(8)
    for turns in range(4):
        for rows in (False, True):
            for columns in (False, True):
                moves = dataclasses.replace(
                    base,
                    flip_rows=torch.full((8,), rows),
                    flip_columns=torch.full((8,), columns),
                    quarter_turns=torch.full((8,), turns),
                )
                expected = images.numpy()
                expected = expected[:, :, ::-1] if rows else expected
                expected = expected[:, :, :, ::-1] if columns else expected
                expected = np.rot90(expected, turns, (2, 3))
                assert np.allclose(move(images, moves).numpy(), expected, rtol=0, atol=1e-6)


def test_ranges() -> None:
    moves = draw_moves(20000, True, torch.Generator().manual_seed(0))
    assert 0 <= moves.degrees.min() < 0.1
    assert 19.9 < moves.degrees.max() <= 20
    for part in (moves.shift, moves.magnification):
        assert part.shape == (20000, 2)
        assert 0 <= part.min() < 1e-4
        assert 0.0199 < part.max() <= 0.02
    assert torch.bincount(moves.quarter_turns).tolist() == pytest.approx([5000] * 4, rel=0.1)
    for flips in (moves.flip_rows, moves.flip_columns):
        assert float(flips.double().mean()) == pytest.approx(0.5, abs=0.02)
    assert set(draw_moves(100, False, torch.Generator().manual_seed(0)).quarter_turns.tolist()) == {0, 2}


def test_expand_keeps_the_originals_first_and_its_range() -> None:
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = expand(images, 4, torch.Generator().manual_seed(1))
    assert out.shape == (20, 1, 16, 16)
    assert torch.equal(out[:5], images)
    assert out.abs().max() <= 1  # border padding and bilinear reading invent no values
    assert torch.equal(out, expand(images, 4, torch.Generator().manual_seed(1)))
    assert not torch.equal(out, expand(images, 4, torch.Generator().manual_seed(2)))
    assert torch.equal(expand(images, 1, torch.Generator()), images)


def test_constant_images_stay_constant() -> None:
    images = torch.full((4, 1, 16, 16), 0.25)
    assert torch.allclose(expand(images, 5, torch.Generator().manual_seed(0)), torch.tensor(0.25), atol=1e-6)


def test_images_that_are_not_square() -> None:
    images = torch.rand(3, 1, 10, 16)
    assert expand(images, 4, torch.Generator().manual_seed(0)).shape == (12, 1, 10, 16)
