"""Kernel distance between two sets of images: unbiased MMD^2 with the cubic polynomial kernel of KID.

KID (Binkowski, Sutherland, Arbel and Gretton, ICLR 2018, section 4) takes the features of a network trained on
photographs, whose weights are a download. Here the features are those of one fixed random convolution, the same for
every study, written out in numpy: it needs no weights, no torch, and few dozen images are enough, because the unbiased
estimate has no bias in the sample size. Its values compare with each other and not with published KID. The estimate
of two sets of one kind scatters about 0 and may be negative.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cmrhpc.errors import BadInput

FEATURES = "fixed random convolution"
SEED = 20210  # of the filters; part of the definition, so never changed
FILTERS = 32
DETAIL = 4.0  # weight of the zero-mean half of the first filters; images hold little power there
GRID = 4  # features are averaged over GRID x GRID parts of the image
SCALES = (1, 2)  # the image as it is, and halved
DEGREE = 3


@lru_cache(maxsize=4)
def _filters(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """First layer (25*channels, FILTERS) and second layer (9*FILTERS, FILTERS), columns of length 1.

    The second half of the first layer loses its mean over the 5 x 5 window and is weighted by DETAIL: without that,
    brightness decides alone and a blurred set passes for a sharp one.
    """
    rng = np.random.default_rng(SEED)
    first, second = (rng.standard_normal((rows, FILTERS)) for rows in (25 * channels, 9 * FILTERS))
    first /= np.linalg.norm(first, axis=0)
    second /= np.linalg.norm(second, axis=0)
    windows = first.reshape(25, channels, FILTERS)
    windows[..., FILTERS // 2 :] -= windows[..., FILTERS // 2 :].mean(0)
    windows[..., FILTERS // 2 :] *= DETAIL
    return windows.reshape(25 * channels, FILTERS).astype(np.float32), second.astype(np.float32)


def _convolve(maps: np.ndarray, filters: np.ndarray, size: int) -> np.ndarray:
    """Strided (2) convolution of maps (N, H, W, C) with filters (size*size*C, F), border repeated, then ReLU."""
    reach = size // 2
    padded = np.pad(maps, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::2, ::2]
    flat = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1)
    return np.maximum(flat @ filters, 0)


def _pool(maps: np.ndarray) -> np.ndarray:
    """Mean of maps (N, H, W, C) over GRID x GRID parts, which overlap where they must -> (N, GRID*GRID*C)."""
    rows, columns = ([(i * n // GRID, -(-(i + 1) * n // GRID)) for i in range(GRID)] for n in maps.shape[1:3])
    parts = [maps[:, top:bottom, left:right].mean((1, 2)) for top, bottom in rows for left, right in columns]
    return np.concatenate(parts, axis=1)


def features(images: np.ndarray, chunk: int = 64) -> np.ndarray:
    """Features (N, 2 * 2 * 16 * FILTERS) float32 of images (N, C, H, W) in [-1, 1], C 1 or 3, H and W at least 16.

    Per scale: convolution 5 x 5 stride 2, ReLU, convolution 3 x 3 stride 2, ReLU; the means of both layers over
    4 x 4 parts of the image. Raises BadInput for another shape or values that are not finite.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 16 or not len(images):
        raise BadInput(f"no kernel distance for images of shape {images.shape}", "", "give (N, C, H, W), 16 px or more")
    if not np.isfinite(images).all():
        raise BadInput("images with values that are not finite", "kernel distance", "compute their shard again")
    first, second = _filters(images.shape[1])
    found = []
    for start in range(0, len(images), chunk):
        maps = images[start : start + chunk].transpose(0, 2, 3, 1)
        parts = []
        for scale in SCALES:
            height, width = (n // scale * scale for n in maps.shape[1:3])
            halved = maps[:, :height, :width].reshape(len(maps), height // scale, scale, width // scale, scale, -1)
            low = _convolve(halved.mean((2, 4)), first, 5)
            high = _convolve(low, second, 3)
            parts += [_pool(low), _pool(high)]
        found.append(np.concatenate(parts, axis=1))
    return np.concatenate(found)


def turned(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Square images (N, C, H, H), each in one of its 8 exact orientations (METHODS M3), drawn independently."""
    found = np.empty_like(images)
    for i, orientation in enumerate(rng.integers(8, size=len(images))):
        image = np.rot90(images[i], orientation % 4, (1, 2))
        found[i] = image[:, :, ::-1] if orientation >= 4 else image
    return found


def feature_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 of features (M, D) and (N, D), kernel k(x, y) = (x . y / D + 1)^3; NaN below two rows.

    mean of k(a, a') over pairs + mean of k(b, b') over pairs - 2 mean of k(a, b). A side may be (R, M, D), R draws of
    the same images: a pair of its own side is then of one draw, so that no image meets itself.
    """
    a, b = (np.asarray(x, float)[None] if np.ndim(x) == 2 else np.asarray(x, float) for x in (a, b))
    if min(a.shape[1], b.shape[1]) < 2:
        return float("nan")
    width = a.shape[2]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / width + 1) ** DEGREE

    def within(draws: np.ndarray) -> float:
        n = draws.shape[1]
        kernels = [kernel(x, x) for x in draws]
        return float(np.mean([(k.sum() - np.trace(k)) / (n * (n - 1)) for k in kernels]))

    return within(a) + within(b) - 2 * float(kernel(np.concatenate(a), np.concatenate(b)).mean())
