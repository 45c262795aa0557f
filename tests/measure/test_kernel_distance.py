"""The kernel distance against a slow float64 version, and in the order that eyes would give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from cmrhpc.errors import BadInput
from cmrhpc.measure import kernel_distance as kd


def rings(n: int, seed: int, size: int = 40, channels: int = 1) -> np.ndarray:
    """Bright rings of varying place and width on a textured ground, (n, channels, size, size) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    images = []
    for _ in range(n):
        radius = np.hypot(y - rng.normal(0, 0.04), x - rng.normal(0, 0.04))
        ring = np.exp(-(((radius - rng.normal(0.25, 0.02)) / 0.06) ** 2))
        images.append(np.tanh(1.6 * ring - 0.8 + 0.15 * rng.normal(size=(size, size))))
    return np.repeat(np.array(images, np.float32)[:, None], channels, axis=1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return kd.feature_distance(kd.features(a), kd.features(b))


def slow_features(image: np.ndarray) -> np.ndarray:
    """One image (C, H, W), loops over every window, float64."""
    first, second = (f.astype(float) for f in kd._filters(len(image)))
    found = []
    for scale in kd.SCALES:
        c, h, w = image.shape
        small = np.zeros((c, h // scale, w // scale))
        for i in range(h // scale):
            for j in range(w // scale):
                small[:, i, j] = image[:, i * scale : (i + 1) * scale, j * scale : (j + 1) * scale].mean((1, 2))
        layer = small
        for filters, reach in ((first, 2), (second, 1)):
            padded = np.pad(layer, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
            size, height, width = 2 * reach + 1, -(-layer.shape[1] // 2), -(-layer.shape[2] // 2)
            out = np.zeros((kd.FILTERS, height, width))
            for i in range(height):
                for j in range(width):
                    window = padded[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size]
                    out[:, i, j] = np.maximum(window.transpose(1, 2, 0).ravel() @ filters, 0)
            height, width = out.shape[1:]
            for a in range(kd.GRID):
                for b in range(kd.GRID):
                    top, bottom = math.floor(a * height / kd.GRID), math.ceil((a + 1) * height / kd.GRID)
                    left, right = math.floor(b * width / kd.GRID), math.ceil((b + 1) * width / kd.GRID)
                    found.append(out[:, top:bottom, left:right].mean((1, 2)))
            layer = out
    return np.concatenate(found)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 38, 41), (3, 38, 41), (1, 16, 16)])
def test_features_agree_with_the_slow_version(channels: int, height: int, width: int) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, channels, height, width)).astype(np.float32)
    found = kd.features(images)
    assert found.shape == (2, 2 * 2 * kd.GRID**2 * kd.FILTERS)
    np.testing.assert_allclose(found, [slow_features(image) for image in images], atol=2e-5)


def test_distance_is_the_unbiased_estimate_pair_by_pair() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 7)), rng.normal(0.3, 1, (6, 7))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 7 + 1) ** 3

    within_a = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 20
    within_b = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 30
    across = sum(k(x, y) for x in a for y in b) / 30
    assert kd.feature_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, abs=1e-12)
    assert np.isnan(kd.feature_distance(a[:1], b))
    assert np.isnan(kd.feature_distance(np.zeros((1, 0, 1)), b))  # no image of a class in a fold


def test_first_filters_see_brightness_and_detail() -> None:
    first, _ = kd._filters(1)
    detail = first[:, kd.FILTERS // 2 :]
    np.testing.assert_allclose(detail.mean(0), 0, atol=1e-6)
    assert np.abs(first[:, : kd.FILTERS // 2].mean(0)).max() > 0.01


def test_distance_is_about_zero_within_one_kind_and_the_same_every_time() -> None:
    distances = [distance(rings(30, 2 * i), rings(30, 2 * i + 1)) for i in range(12)]
    far = distance(np.zeros((30, 1, 40, 40)), rings(30, 1))
    assert abs(np.mean(distances)) < 0.01 * far
    assert min(distances) < 0 < max(distances)
    assert distance(rings(30, 0), rings(30, 1)) == distances[0]


def test_distance_orders_blur_noise_and_grey() -> None:
    real, held_out = rings(40, 0), rings(40, 1)
    blurred = [ndimage.gaussian_filter(real, (0, 0, s, s)) for s in (1, 2, 4)]
    noise = np.random.default_rng(0).uniform(-1, 1, real.shape)
    order = [distance(x, held_out) for x in (real, *blurred)]
    assert order == sorted(order)
    assert distance(noise, held_out) > order[-1]
    assert distance(0 * real, held_out) > 5 * order[1]


@pytest.mark.parametrize(
    "images",
    [np.zeros((3, 2, 40, 40)), np.zeros((3, 1, 8, 40)), np.zeros((0, 1, 40, 40)), np.full((3, 1, 40, 40), np.nan)],
)
def test_images_of_no_use_are_bad_input(images: np.ndarray) -> None:
    with pytest.raises(BadInput):
        kd.features(images)


def test_every_orientation_comes_up_and_draws_of_one_image_never_meet() -> None:
    image = np.arange(16.0).reshape(1, 1, 4, 4)
    found = kd.turned(np.repeat(image, 200, axis=0), np.random.default_rng(0))
    expected = [np.rot90(side, turns) for side in (image[0, 0], image[0, 0].T) for turns in range(4)]
    assert {x.tobytes() for x in found[:, 0]} == {x.tobytes() for x in expected}
    # Two draws of three images each: pairs of one side are taken within a draw.
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 7)), rng.normal(size=(4, 7))
    apart = [kd.feature_distance(draw, b) for draw in a]
    assert kd.feature_distance(a, b) == pytest.approx(np.mean(apart), abs=1e-12)
