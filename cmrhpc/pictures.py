"""Sample grids as PNG bytes (Pillow, no torch)."""

from __future__ import annotations

import io

import numpy as np

PAD = 2  # white pixels between images


def grid_array(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay images (N, C, H, W), float in [-1, 1], C = 1 or 3, out row by row; returns (H', W', 3) uint8."""
    images = np.asarray(images)
    count, channels, height, width = images.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + PAD) + PAD, columns * (width + PAD) + PAD, 3), 255, np.uint8)
    pixels = (np.clip(np.nan_to_num(images), -1, 1) * 127.5 + 127.5).round().astype(np.uint8)
    for i, image in enumerate(pixels):
        top, left = PAD + (i // columns) * (height + PAD), PAD + (i % columns) * (width + PAD)
        colour = np.repeat(image, 3, axis=0) if channels == 1 else image
        sheet[top : top + height, left : left + width] = colour.transpose(1, 2, 0)
    return sheet


def png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 as PNG bytes without metadata: same pixels, same bytes."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=False)
    return stream.getvalue()


def grid(images: np.ndarray, columns: int = 8, scale: int = 1) -> bytes:
    """PNG bytes of a sample grid; `scale` repeats each pixel. Input as for `grid_array`."""
    sheet = grid_array(images, columns)
    if scale > 1:
        sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    return png(sheet)
