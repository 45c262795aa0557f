"""Small raw folders for the tests of ingest."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from cmrhpc.study import Data


def picture(seed: int, shape: tuple[int, int] = (40, 30)) -> np.ndarray:
    """A smooth image without any symmetry, int16."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    rng = np.random.default_rng(seed)
    waves = np.sin(0.21 * y + rng.uniform(0, 6)) + np.cos(0.13 * x + 0.05 * y)
    return (900 + 13 * y + 3 * x + 150 * waves + rng.normal(0, 5, shape)).astype(np.int16)


def disc(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, spacing: tuple[float, float] = (1.2, 1.2), colour: bool = False) -> None:
    """Write with SimpleITK; spacing (row, column)."""
    image = sitk.GetImageFromArray(pixels, isVector=colour)
    image.SetSpacing((spacing[1], spacing[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_table(folder: Path, rows: list[dict[str, str]], name: str = "cohort.csv") -> None:
    with open(folder / name, "w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def make_raw(folder: Path, patients: int = 6, slices: int = 2, masks: bool = True) -> list[dict[str, str]]:
    """images/*.mha (int16, 40 x 30, 1.2 mm) with masks; patients alternate between the labels 0 and 1."""
    rows = []
    for p in range(patients):
        for s in range(slices):
            name = f"images/secret{p}_{s}.mha"
            save(folder / name, picture(10 * p + s))
            row = {"image": name, "label": str(p % 2), "patient": f"Doe^{p}"}
            if masks:
                row["mask"] = f"masks/secret{p}_{s}.mha"
                save(folder / row["mask"], disc((40, 30), (20.3, 14.1), 6))
            rows.append(row)
    write_table(folder, rows)
    return rows


def settings(**changes: object) -> Data:
    values: dict[str, object] = {"raw": "raw", "image_size": 16, "spacing_mm": 1.2} | changes
    return Data(**values)  # type: ignore[arg-type]
