"""Images of a shard as files that other programs read: .mha with spacing and, where known, ms restored, or .png."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmrhpc import files
from cmrhpc.data.ingest import csv_cell
from cmrhpc.data.mha import mha_bytes
from cmrhpc.data.region import from_unit
from cmrhpc.errors import BadInput, CmrhpcError, UsageError
from cmrhpc.plan import COHORT
from cmrhpc.shards import Shard, read_shard

BLOCK = 256
FORMATS = ("mha", "png")


@dataclass(frozen=True)
class _Physics:
    """Per image: the window that is undone (NaN where none is known) and mm per pixel (NaN where unknown)."""

    window: np.ndarray  # (N, 2)
    spacing: np.ndarray  # (N,)


def export(workspace: Path, shard: str, to: Path, format: str = "png", limit: int = 0) -> int:
    """Write the first `limit` images (0: all) of a shard as files, with a table `images.csv`; returns how many.

    shard: its path from the workspace. A cohort's values go back through each image's own window. Synthetic and refined
    images take the window and spacing of their training images where those are all equal and the cohort is at hand;
    otherwise, as in every .png, they stay on the scale from -1 to 1 (`unit` in the table says which).
    Raises UsageError for an unknown format; BadInput for a shard that is damaged or holds no images.
    """
    if format not in FORMATS:
        raise UsageError(f'unknown format "{format}"', "--format", f"use {' or '.join(FORMATS)}")
    if limit < 0:
        raise UsageError(f"{limit} images", "--limit", "use 0 for all, or a positive number")
    source = read_shard(Path(workspace) / shard)
    if "image" not in source or "label" not in source:
        mend = "name cohort.h5, or a shard below synthetic/ or refined/"
        raise BadInput(f'a shard of schema "{source.schema}" holds no images', shard, mend)
    count = len(source["label"])
    count = min(count, limit) if limit else count
    physics = _physics(source, Path(workspace), len(source["label"]))
    rows: list[list[str]] = [["image", "label", "id", "unit", "window_low", "window_high", "spacing_mm"]]
    ids = source.strings("id") if "id" in source else [""] * count
    for number, (image, label) in enumerate(_images(source, count)):
        window, spacing = physics.window[number], float(physics.spacing[number])
        physical = format == "mha" and bool(np.isfinite(window).all())
        name = f"{number + 1:06d}_class{label}.{format}"
        if format == "png":
            data = _png(image)
        else:
            values = from_unit(image, (window[0], window[1])) if physical else image
            planes = values.astype("<f4").transpose(1, 2, 0)
            pitch = 1.0 if math.isnan(spacing) else spacing
            data = mha_bytes(planes[..., 0] if planes.shape[2] == 1 else planes, (pitch, pitch))
        files.atomic_write(Path(to) / name, data)
        ends = [csv_cell(float(value)) for value in window] if physical else ["", ""]
        unit = "raw" if physical else "-1 to 1" if format == "mha" else "0 to 255"
        rows.append([name, str(label), csv_cell(ids[number]), unit, *ends, csv_cell(spacing)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.atomic_write(Path(to) / "images.csv", text.getvalue())
    return count


def _images(source: Shard, count: int) -> Iterator[tuple[np.ndarray, int]]:
    labels = source["label"]
    for first in range(0, count, BLOCK):
        rows = slice(first, min(first + BLOCK, count))
        yield from zip(source.read("image", rows), labels[rows].tolist(), strict=True)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    pixels = (np.clip(np.nan_to_num(image), -1, 1) * 127.5 + 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def _physics(source: Shard, workspace: Path, count: int) -> _Physics:
    if source.schema == "cohort-1":
        return _Physics(source["window"], source["grid_spacing"])
    unknown = _Physics(np.full((count, 2), np.nan), np.full(count, np.nan))
    try:
        cohort = read_shard(workspace / COHORT, "cohort-1")
    except CmrhpcError:
        return unknown
    if source.inputs.get(COHORT) != cohort.content_sha256 or "train_id" not in source:
        return unknown
    trained = np.isin(cohort["id"], source["train_id"])
    window, spacing = cohort["window"][trained], cohort["grid_spacing"][trained]
    if len(window) and (window == window[0]).all():
        unknown.window[:] = window[0]
    if len(spacing) and (spacing == spacing[0]).all():
        unknown.spacing[:] = spacing[0]
    return unknown
