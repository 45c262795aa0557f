"""Images of shards as files that other programs read: .mha with spacing and, where known, ms restored, or .png."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmrhpc import external, files
from cmrhpc.csvtext import to_csv
from cmrhpc.data.mha import mha_bytes
from cmrhpc.data.region import from_unit
from cmrhpc.errors import BadInput, CmrhpcError, UsageError
from cmrhpc.hashing import sha256_of
from cmrhpc.names import COHORT_SCHEMA, FOLDS_SCHEMA
from cmrhpc.planning import COHORT, FOLDS
from cmrhpc.shards import Shard, read_shard

BLOCK = 256
FORMATS = ("mha", "png")
HEADER = ("image", "label", "id", "unit", "window_low", "window_high", "spacing_mm")


@dataclass(frozen=True)
class _Calibration:
    """Per image: the window that is undone (NaN where none is known) and mm per pixel (NaN where unknown)."""

    window: np.ndarray  # (N, 2)
    spacing: np.ndarray  # (N,)


@dataclass
class _Out:
    """Where files go, and the sha256 of each by its path from there."""

    to: Path
    format: str
    unit_scale: bool
    sums: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, data: bytes) -> None:
        files.atomic_write(self.to / name, data)
        self.sums[name] = sha256_of(data)


def export(
    workspace: Path,
    shard: str,
    to: Path,
    format: str = "png",
    limit: int = 0,
    *,
    by_fold: bool = False,
    unit_scale: bool = False,
) -> int:
    """Write images as files into a new or empty folder, with a table `images.csv`; returns how many.

    shard: its path from the workspace; or a folder of synthetic or refined shards, each of which then goes, per class,
    into a folder of its own with the ids of its training images, as an external generator's images are laid out.
    by_fold: of the cohort, the training images of every fold, repeat and class, laid out in the same way.
    limit: at most so many images (of each folder); 0 is all.

    A cohort's values go back through each image's own window. Synthetic and refined images take the window and spacing
    of their training images where those are all equal and the cohort is at hand; otherwise, as in every .png and with
    `unit_scale`, they stay on the scale from -1 to 1 (`unit` in the table says which).
    Raises UsageError for an unknown format or a folder that is not empty; BadInput for a shard that is damaged or holds
    no images.
    """
    workspace, to = Path(workspace), Path(to)
    if format not in FORMATS:
        raise UsageError(f'unknown format "{format}"', "--format", f"use {' or '.join(FORMATS)}")
    if limit < 0:
        raise UsageError(f"{limit} images", "--limit", "use 0 for all, or a positive number")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError("the folder is not empty", str(to), "name a new or empty folder: nothing is mixed or replaced")
    out = _Out(to, format, unit_scale)
    if by_fold:
        count = _export_folds(workspace, shard, out, limit)
    elif (workspace / shard).is_dir():
        count = _export_folder(workspace, shard, out, limit)
    else:
        source = _source(workspace, shard)
        rows = np.arange(len(source["label"]))[: limit or None]
        ids = source.strings("id") if "id" in source else [""] * len(rows)
        return _write(out, "", _images(source, rows), source["label"][rows], ids, _calibration(source, workspace))
    lines = [f"{digest}  {name}\n" for name, digest in sorted(out.sums.items())]
    files.atomic_write(to / external.SUMS, "".join(lines))
    return count


def _export_folder(workspace: Path, folder: str, out: _Out, limit: int) -> int:
    """Every shard of a folder, per class."""
    names = sorted(path.name for path in (workspace / folder).glob("*.h5") if not files.is_temporary(path.name))
    if not names:
        raise BadInput("no shard in this folder", folder, "name one such as synthetic/dae-gan")
    count = 0
    for name in names:
        source = _source(workspace, f"{folder}/{name}")
        task, labels, calibration = source.task, source["label"], _calibration(source, workspace)
        for label in sorted(set(labels.tolist())):
            rows = np.flatnonzero(labels == label)[: limit or None]
            place = f"fold{task.get('fold', 0)}_repeat{task.get('repeat', 0)}_class{label}/"
            of_rows = _Calibration(calibration.window[rows], calibration.spacing[rows])
            count += _write(out, place, _images(source, rows), labels[rows], [""] * len(rows), of_rows)
            ids = source.strings("train_id") if "train_id" in source else []
            out.write(place + external.DECLARATION, to_csv(["id"], [[one] for one in ids]).encode())
    return count


def _export_folds(workspace: Path, shard: str, out: _Out, limit: int) -> int:
    """The training images of every fold, repeat and class: what a generator elsewhere may be trained on."""
    from cmrhpc.data.selection import training_images

    if shard != COHORT:
        raise UsageError("--by-fold is for the cohort", "--shard", f"--shard {COHORT} --by-fold")
    source, folds = read_shard(workspace / COHORT, COHORT_SCHEMA), read_shard(workspace / FOLDS, FOLDS_SCHEMA)
    row_of = {one: row for row, one in enumerate(source.strings("id"))}
    calibration, count = _calibration(source, workspace), 0
    for repeat in range(folds.attributes["repeats"]):
        for fold in range(folds.attributes["k"]):
            for label in sorted(set(source["label"].tolist())):
                real = training_images(source, folds, repeat, fold, label)
                ids, images = real.ids[: limit or None], real.images[: limit or None]
                rows = np.array([row_of[one] for one in ids])
                place = f"fold{fold}_repeat{repeat}_class{label}/"
                of_rows = _Calibration(calibration.window[rows], calibration.spacing[rows])
                count += _write(out, place, images, real.labels, ids, of_rows)
                out.write(place + external.DECLARATION, to_csv(["id"], [[one] for one in ids]).encode())
    return count


def _write(
    out: _Out, place: str, images: Iterable[np.ndarray], labels: np.ndarray, ids: list[str], calibration: _Calibration
) -> int:
    """Images (C, H, W) and their table into the folder `place`; labels, ids, calibration in the order of the images."""
    rows = []
    for number, image in enumerate(images):
        window, spacing, label = calibration.window[number], float(calibration.spacing[number]), int(labels[number])
        raw = out.format == "mha" and not out.unit_scale and bool(np.isfinite(window).all())
        name = f"{number + 1:06d}_class{label}.{out.format}"
        if out.format == "png":
            data = _png(image)
        else:
            values = from_unit(image, (window[0], window[1])) if raw else image
            planes = values.astype("<f4").transpose(1, 2, 0)
            pitch = None if math.isnan(spacing) else (spacing, spacing)
            data = mha_bytes(planes[..., 0] if planes.shape[2] == 1 else planes, pitch)
        out.write(place + name, data)
        unit = "raw" if raw else "[-1, 1]" if out.format == "mha" else "[0, 255]"
        rows.append([name, label, ids[number], unit, *(window.tolist() if raw else ("", "")), spacing])
    out.write(f"{place}images.csv", to_csv(HEADER, rows).encode())
    return len(rows)


def _source(workspace: Path, shard: str) -> Shard:
    source = read_shard(workspace / shard)
    if "image" not in source or "label" not in source:
        mend = "name cohort.h5, or a shard below synthetic/ or refined/"
        raise BadInput(f'a shard of schema "{source.schema}" holds no images', shard, mend)
    return source


def _images(source: Shard, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The images of the named rows (rising), read block by block."""
    for first in range(0, len(source["label"]), BLOCK):
        here = rows[(rows >= first) & (rows < first + BLOCK)]
        if len(here):
            yield from source.read("image", slice(first, int(here[-1]) + 1))[here - first]


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    pixels = (np.clip(np.nan_to_num(image), -1, 1) * 127.5 + 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def _calibration(source: Shard, workspace: Path) -> _Calibration:
    if source.schema == COHORT_SCHEMA:
        return _Calibration(source["window"], source["grid_spacing"])
    count = len(source["label"])
    found = _Calibration(np.full((count, 2), np.nan), np.full(count, np.nan))
    try:
        cohort = read_shard(workspace / COHORT, COHORT_SCHEMA)
    except CmrhpcError:
        return found
    if source.inputs.get(COHORT) != cohort.content_sha256 or "train_id" not in source:
        return found
    trained = np.isin(cohort["id"], source["train_id"])
    window, spacing = cohort["window"][trained], cohort["grid_spacing"][trained]
    if len(window) and (window == window[0]).all():
        found.window[:] = window[0]
    if len(spacing) and (spacing == spacing[0]).all():
        found.spacing[:] = spacing[0]
    return found
