"""The contact sheet of a cohort: some images of every class, evenly taken, below the name of their class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cmrhpc import pictures

COLUMNS, ROWS = 12, 3
BANNER = 22  # pixels
COLOURS = [(38, 84, 124), (196, 69, 54), (64, 125, 82), (140, 90, 160), (190, 130, 30), (70, 150, 160), (110, 110, 110)]


class Sheet:
    """Collects up to 36 images per class while a cohort is made; `add` keeps those that are wanted."""

    def __init__(self, labels: np.ndarray, classes: Sequence[str]):
        self.classes = list(classes)
        self.counts = [int((labels == index).sum()) for index in range(len(classes))]
        self.wanted: dict[int, int] = {}  # row -> class
        for index in range(len(classes)):
            own = np.flatnonzero(labels == index)
            at = np.linspace(0, len(own) - 1, min(len(own), COLUMNS * ROWS)).round().astype(int)
            self.wanted |= {int(own[i]): index for i in at}
        self.images: dict[int, list[np.ndarray]] = {index: [] for index in range(len(classes))}

    def add(self, row: int, image: np.ndarray) -> None:
        """Keep image (C, H, W) float in [-1, 1] if its row is on the sheet."""
        if row in self.wanted:
            self.images[self.wanted[row]].append(np.array(image, np.float32))

    def png(self) -> bytes:
        """PNG bytes: per class a coloured banner with name and count, then its images in up to three rows."""
        parts = []
        for index, name in enumerate(self.classes):
            if self.images[index]:
                stack = np.stack(self.images[index])
                scale = max(1, 96 // stack.shape[-1])
                grid = pictures.grid_array(stack.repeat(scale, 2).repeat(scale, 3), COLUMNS)
                title = f"{name}: {len(stack)} of {self.counts[index]} images"
                parts.append((title, COLOURS[index % len(COLOURS)], grid))
        width = max(grid.shape[1] for _, _, grid in parts)
        sheet = [_block(title, colour, grid, width) for title, colour, grid in parts]
        return pictures.png(np.concatenate(sheet))


def _block(title: str, colour: tuple[int, int, int], grid: np.ndarray, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    shown = "".join(c if c.isprintable() else "?" for c in title)
    banner = Image.new("RGB", (width, BANNER), colour)
    ImageDraw.Draw(banner).text((6, 3), shown[:120], fill="white", font=ImageFont.load_default(14))
    block = np.full((BANNER + grid.shape[0], width, 3), 255, np.uint8)
    block[:BANNER] = np.asarray(banner)
    block[BANNER:, : grid.shape[1]] = grid
    return block
