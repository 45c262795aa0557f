"""Region and intensity against slow versions in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cmrhpc.data import region as geometry


def slow_linear(image: np.ndarray, start: tuple[float, float], step: tuple[float, float], size: int) -> np.ndarray:
    """Bilinear interpolation pixel by pixel; outside the image its border."""
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y = min(max(start[0] + i * step[0], 0.0), image.shape[0] - 1.0)
            x = min(max(start[1] + j * step[1], 0.0), image.shape[1] - 1.0)
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
            fy, fx = y - y0, x - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
            low = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
            out[i, j] = top * (1 - fy) + low * fy
    return out


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(1000, 200, (31, 23))


def test_equal_spacing_returns_the_pixels_themselves(image: np.ndarray) -> None:
    place = geometry.centred((15.0, 11.0), (1.172, 1.172), 1.172, 8)
    assert np.array_equal(geometry.linear(image[..., None], place)[..., 0], image[11:19, 7:15])
    even = geometry.centred((14.5, 10.5), (1.2, 1.2), 1.2, 8)  # the exact middle between pixels
    assert np.array_equal(geometry.linear(image[..., None], even)[..., 0], image[11:19, 7:15])


def test_rows_and_columns_have_their_own_spacing(image: np.ndarray) -> None:
    """Rows are 2 mm apart, columns 1 mm: a region of 1 mm pixels takes every row half and every column whole."""
    place = geometry.centred((15.0, 11.0), (2.0, 1.0), 1.0, 8)
    assert place.step == (0.5, 1.0)
    assert place.start == (13.0, 7.0)  # row 15 is 30 mm: pixel 30 of the resampled image, the region starts at 26
    expected = slow_linear(image, (13.0, 7.0), (0.5, 1.0), 8)
    np.testing.assert_allclose(geometry.linear(image[..., None], place)[..., 0], expected, atol=1e-10)
    np.testing.assert_allclose(expected[2], image[14, 7:15])  # a whole source row
    np.testing.assert_allclose(expected[1], (image[13, 7:15] + image[14, 7:15]) / 2)


@pytest.mark.parametrize("centre", [(15.2, 11.7), (0.0, 22.0), (30.0, 3.0)])
@pytest.mark.parametrize("spacing", [(1.172, 1.406), (1.25, 1.25), (1.0, 2.3)])
def test_linear_and_nearest_agree_with_loops(
    image: np.ndarray, centre: tuple[float, float], spacing: tuple[float, float]
) -> None:
    place = geometry.centred(centre, spacing, 1.172, 12)
    fast = geometry.linear(image[..., None], place)[..., 0]
    np.testing.assert_allclose(fast, slow_linear(image, place.start, place.step, 12), atol=1e-9)
    mask = (image > 1000).astype(np.uint8)
    slow = np.zeros((12, 12), np.uint8)
    for i in range(12):
        for j in range(12):
            y = math.floor(place.start[0] + i * place.step[0] + 0.5)
            x = math.floor(place.start[1] + j * place.step[1] + 0.5)
            if 0 <= y < 31 and 0 <= x < 23:
                slow[i, j] = mask[y, x]
    assert np.array_equal(geometry.nearest(mask, place), slow)


def test_the_centre_of_the_region_is_within_half_a_pixel() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        centre, spacing = rng.uniform(0, 200, 2), rng.uniform(0.5, 2.5, 2)
        size = int(rng.integers(16, 90))
        place = geometry.centred((centre[0], centre[1]), (spacing[0], spacing[1]), 1.172, size)
        for axis in (0, 1):
            middle = place.indices(axis).mean()  # source index
            assert abs(middle - centre[axis]) * spacing[axis] <= 1.172 / 2 + 1e-9


def test_the_whole_image_keeps_its_proportions() -> None:
    place = geometry.whole((50, 100), (2.0, 0.5), 25)  # 100 mm x 50 mm
    assert place.spacing == 4.0
    assert place.step == (2.0, 8.0)
    rows, columns = place.indices(0), place.indices(1)
    np.testing.assert_allclose([rows[0], rows[-1]], [0.5, 48.5])  # the rows fill the square edge to edge
    inside = (columns >= -0.5) & (columns <= 99.5)
    assert inside.sum() in (12, 13)  # half of the square is margin
    np.testing.assert_allclose(columns.mean(), 49.5)
    same = geometry.whole((64, 64), None, 64)
    assert same.start == (0.0, 0.0)
    assert same.step == (1.0, 1.0)
    assert math.isnan(same.spacing)


def test_shrinking_averages_instead_of_skipping() -> None:
    board = (np.indices((120, 120)).sum(axis=0) % 2).astype(float)
    place = geometry.whole((120, 120), None, 30)
    small = geometry.linear(board[..., None], place)
    assert abs(small.mean() - 0.5) < 1e-3
    assert small[1:-1, 1:-1].std() < 1e-6
    flat = geometry.linear(np.full((120, 120, 1), 7.0), place)
    np.testing.assert_allclose(flat, 7.0, atol=1e-12)
    up = geometry.centred((60, 60), (1.25, 1.25), 1.172, 16)
    assert up.step[0] < 1.25  # what M1 asks of T1 maps is never smoothed
    np.testing.assert_allclose(
        geometry.linear(board[..., None], up)[..., 0], slow_linear(board, up.start, up.step, 16), atol=1e-12
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_shrinking_smooths_along_either_axis(axis: int) -> None:
    stripes = (np.indices((120, 120))[axis] % 2).astype(float)
    small = geometry.linear(stripes[..., None], geometry.whole((120, 120), None, 24))  # every fifth pixel: 0, 1, 0, 1
    np.testing.assert_allclose(small[2:-2, 2:-2], 0.5, atol=1e-4)


def test_share_outside_and_mask_kept() -> None:
    place = geometry.Region((-4.0, 2.0), (1.0, 1.0), 8, 1.0)
    assert geometry.share_outside((20, 20), place) == 0.5
    assert geometry.share_outside((4, 5), place) == pytest.approx(1 - 0.5 * 3 / 8)
    mask = np.zeros((20, 20), bool)
    mask[2:6, 8:12] = True  # rows 2, 3 and columns 8, 9 are inside
    assert geometry.mask_kept(mask, place) == (4, 16)


def test_window_maps_linearly_clips_and_counts() -> None:
    values = np.array([[200.0, 300.0, 1050.0, 1800.0, 5000.0]])
    scaled, below, above = geometry.to_unit(values, (300.0, 1800.0))
    np.testing.assert_allclose(scaled, [[-1, -1, 0, 1, 1]])
    assert (below, above) == (0.2, 0.2)
    np.testing.assert_allclose(geometry.from_unit(scaled, (300.0, 1800.0)), [[300, 300, 1050, 1800, 1800]])
