"""Geometry and intensity of the region of interest (METHODS M1): where it lies, its pixels, its normalisation.

Resampling is linear. Cubic splines keep edges sharper, but overshoot at the borders of blood, lung and fat and so make
T1 values that no tissue of the image has; linear interpolation stays between its neighbours, and at equal spacing it
returns the pixels themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Region:
    """A square of `size` pixels in a source image: output pixel i lies at source index start + i * step.

    start, step: (row, column) in source pixels. spacing: mm per output pixel, NaN where the source has none.
    """

    start: tuple[float, float]
    step: tuple[float, float]
    size: int
    spacing: float

    def indices(self, axis: int) -> np.ndarray:
        """Source index of each output pixel, float64 (size,)."""
        return self.start[axis] + np.arange(self.size) * self.step[axis]


def centred(centre: tuple[float, float], source_mm: tuple[float, float], spacing_mm: float, size: int) -> Region:
    """The region around a source index, on the grid of the resampled image.

    The whole image resampled to `spacing_mm` has its pixel (0, 0) where the source has it. The region is a whole-pixel
    crop of that grid, so that at equal spacing it holds source pixels unchanged.
    """
    start, step = [], []
    for at, mm in zip(centre, source_mm, strict=True):
        ratio = spacing_mm / mm
        origin = math.ceil(at / ratio - size / 2 - 1e-6)  # in pixels of the resampled image; halves go to the lower
        start.append(origin * ratio)
        step.append(ratio)
    return Region((start[0], start[1]), (step[0], step[1]), size, spacing_mm)


def whole(shape: tuple[int, int], source_mm: tuple[float, float] | None, size: int) -> Region:
    """The region that holds the whole image: its longer side fills the square, its proportions are kept.

    Without spacing the pixels count as square.
    """
    mm = source_mm or (1.0, 1.0)
    pitch = max(shape[0] * mm[0], shape[1] * mm[1]) / size
    start, step = [], []
    for count, each in zip(shape, mm, strict=True):
        margin = (size * pitch - count * each) / 2
        start.append((0.5 * pitch - margin) / each - 0.5)
        step.append(pitch / each)
    return Region((start[0], start[1]), (step[0], step[1]), size, pitch if source_mm else math.nan)


def linear(image: np.ndarray, region: Region) -> np.ndarray:
    """Pixels of the region, linearly interpolated: image (R, C, channels) -> float64 (size, size, channels).

    Outside the image its border is repeated. Where the image shrinks by more than a quarter it is smoothed first (a
    Gaussian of half of sqrt(step^2 - 1) source pixels), because skipped pixels would alias.
    """
    from scipy.ndimage import gaussian_filter1d

    out = np.asarray(image, np.float64)
    for axis in (0, 1):
        step = region.step[axis]
        if step > 1.25:
            out = gaussian_filter1d(out, 0.5 * math.sqrt(step * step - 1), axis=axis, mode="nearest")
        at = np.clip(region.indices(axis), 0, out.shape[axis] - 1)
        low = np.floor(at).astype(np.int64)
        high = np.minimum(low + 1, out.shape[axis] - 1)
        weight = (at - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        out = np.take(out, low, axis) * (1 - weight) + np.take(out, high, axis) * weight
    return out


def nearest(mask: np.ndarray, region: Region) -> np.ndarray:
    """Pixels of the region from the nearest source pixel: mask (R, C) -> (size, size); zero outside the image."""
    at = [np.floor(region.indices(axis) + 0.5).astype(np.int64) for axis in (0, 1)]
    inside = [(i >= 0) & (i < n) for i, n in zip(at, mask.shape, strict=True)]
    rows, columns = (np.clip(i, 0, n - 1) for i, n in zip(at, mask.shape, strict=True))
    out: np.ndarray = mask[np.ix_(rows, columns)] * np.outer(inside[0], inside[1])
    return out


def share_outside(shape: tuple[int, int], region: Region) -> float:
    """The share of the region's pixels that lie outside the image, where its border is repeated."""
    inside = 1.0
    for axis, count in enumerate(shape):
        at = region.indices(axis)
        inside *= float(((at >= -0.5) & (at <= count - 0.5)).mean())
    return 1.0 - inside


def mask_kept(mask: np.ndarray, region: Region) -> tuple[int, int]:
    """(source mask pixels inside the region, all source mask pixels)."""
    inside = np.ones(mask.shape, bool)
    for axis, count in enumerate(mask.shape):
        at = (np.arange(count) - region.start[axis]) / region.step[axis]  # in pixels of the region
        kept = (at >= -0.5) & (at <= region.size - 0.5)
        inside &= kept[:, None] if axis == 0 else kept[None, :]
    return int((mask & inside).sum()), int(mask.sum())


def to_unit(values: np.ndarray, window: tuple[float, float]) -> tuple[np.ndarray, float, float]:
    """Map window -> [-1, 1] linearly and clip; also the shares of values clipped below and above."""
    low, high = window
    scaled = (values - low) * (2.0 / (high - low)) - 1.0
    return np.clip(scaled, -1.0, 1.0), float((values < low).mean()), float((values > high).mean())


def from_unit(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """The raw values (ms for a T1 map) that `to_unit` maps to `values`, where nothing was clipped."""
    low, high = window
    out: np.ndarray = low + (np.asarray(values, np.float64) + 1.0) * ((high - low) / 2.0)
    return out
