"""Raw folder -> cohort.h5: read, cut out, resample and normalise every image (METHODS M1), and say what was done.

Each image is read once. The results are spooled next to the cohort in an unnamed file, and only when the last image was
good is the cohort written, so that bad input leaves nothing behind and memory stays bounded.
"""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import files, shards
from cmrhpc.csvtext import csv_cell
from cmrhpc.data import region as geometry
from cmrhpc.data import sources
from cmrhpc.data.folds import check_counts
from cmrhpc.data.hints import class_counts, class_slips, counted, ignored_columns
from cmrhpc.data.images import RawImage, Reader, grey
from cmrhpc.data.sheet import Sheet
from cmrhpc.data.table import Row, normalised_apart, read_heading, read_table
from cmrhpc.errors import BadInput
from cmrhpc.hashing import sha256_file
from cmrhpc.names import COHORT_SCHEMA
from cmrhpc.planning import cohort_settings
from cmrhpc.study import Data, Folds

SPOOL_MEMORY = 2**26  # bytes held in memory before the spool goes to disk
BLOCK = 64  # images
SHOWN_WARNINGS = 10
MOST_OUTSIDE = 0.5  # share of the region's area; above, most of the image would be its repeated border
LEAST_PIXELS = 8  # of the source along a side of the region; below, it is interpolation and little else
NAMED_WINDOWS = 3  # told one by one; all others together


@dataclass
class Crop:
    """One image of the cohort and what was done to it."""

    image: np.ndarray  # (C, H, W) float32 in [-1, 1]
    mask: np.ndarray  # (H, W) uint8, zeros without a mask
    report: dict[str, Any]
    window: tuple[float, float]
    spacing: tuple[float, float]  # of the source
    grid_spacing: float  # of the image
    lost_colour: bool
    warnings: list[str]


@dataclass
class Summary:
    """What ingest did, for people."""

    images: dict[str, int] = field(default_factory=dict)  # per class name
    patients: dict[str, int] = field(default_factory=dict)
    spacing_mm: tuple[float, float] = (math.nan, math.nan)  # smallest and largest of the sources
    normalised: dict[str, int] = field(default_factory=dict)  # images per kind (see `_kinds`)
    normalised_classes: dict[str, dict[str, int]] = field(default_factory=dict)  # the same per class name
    clipped: float = 0.0  # mean share of the region's pixels below or above the window
    table: list[str] = field(default_factory=list)  # what in the table looks like a slip, and ignored columns
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {name: (images, self.patients[name]) for name, images in self.images.items()}
        low, high = self.spacing_mm
        spacing = "unknown" if math.isnan(low) else f"{low:.4g} mm" if low == high else f"{low:.4g} to {high:.4g} mm"
        how = ", ".join(f"{count} by {name}" for name, count in self.normalised.items() if count)
        lines = [f"{sum(self.images.values())} images: {counted(counts)}"]
        lines += [f"source spacing {spacing}; normalised: {how}; {100 * self.clipped:.2f} % of the pixels clipped"]
        lines += self.table
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"warning: {text}" for text in self.warnings[:SHOWN_WARNINGS]]
        if (more := len(self.warnings) - SHOWN_WARNINGS) > 0:
            lines.append(f"warning: and {more} more, in the column `warning` of cohort.csv")
        return "\n".join(lines)


def ingest(
    data: Data,
    classes: Sequence[str],
    raw: Path,
    out: Path,
    *,
    task: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    folds: Folds | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Read a raw folder and write the cohort `out` with its report (.csv) and contact sheet (.png).

    classes: label texts; an image's label is the index into them. task, settings, info: as for `shards.write_shard`;
    settings default to those of `data` and `classes`. folds: when given, a class with fewer patients than folds is
    found before any image is read. progress: called with (images done, images).

    Raises BadInput: what `read_table`, `Reader.read` and `crop_image` refuse; one class only; a table that is edited
    meanwhile, and an image or a mask that is replaced while it is read.
    """
    rows, table_sha256 = _read_table(raw, data, classes)
    labels = np.array([list(classes).index(row.label) for row in rows], np.int64)
    patients = _pseudonyms(rows) if data.pseudonyms else [_own_name(row, data.table) for row in rows]
    if len(set(labels.tolist())) < 2:
        raise BadInput(f'only one class: every label is "{rows[0].label}"', data.table, "a study needs two classes")
    groups = [row.id for row in rows] if folds and folds.group_by == "image" else patients
    slips = class_slips(class_counts(rows))
    try:
        check_counts(groups, labels, folds or Folds(k=1), len(classes), classes)
    except BadInput as error:
        raise BadInput(error.what, error.where, "; ".join([error.mend, *slips])) from None

    out = Path(out)
    files.make_folder(out.parent)
    size, channels = data.image_size, data.channels
    sheet = Sheet(labels, classes)
    report = _Report()
    windows, spacings, grids = np.zeros((len(rows), 2)), np.zeros((len(rows), 2)), np.zeros(len(rows))
    summary, coloured = Summary(), 0
    summary.table = [f"warning: {slip}" for slip in slips]
    summary.table += ignored_columns(read_heading(raw, data.table), data.columns)
    try:
        with (
            tempfile.SpooledTemporaryFile(SPOOL_MEMORY, dir=str(out.parent)) as images,
            tempfile.SpooledTemporaryFile(SPOOL_MEMORY, dir=str(out.parent)) as masks,
            Reader() as reader,
        ):
            for i, row in enumerate(rows):
                before = sources.hashes_now(row, Path(raw))
                crop = crop_image(row, raw, data, reader)
                images.write(crop.image.tobytes())
                masks.write(crop.mask.tobytes())
                windows[i], spacings[i], grids[i] = crop.window, crop.spacing, crop.grid_spacing
                sheet.add(i, crop.image)
                coloured += crop.lost_colour
                crop.report |= _same(before, sources.hashes(row, Path(raw)), f"{data.table} row {row.number}")
                report.add(row, patients[i], crop)
                summary.warnings += [f"row {row.number}: {text}" for text in crop.warnings]
                progress(i + 1, len(rows))
            summary.warnings[:0] = _mark_copies(report, groups)
            _summarise(summary, report, labels, patients, classes, spacings, coloured)
            datasets: dict[str, np.ndarray | shards.Blocks] = {
                "image": shards.Blocks(
                    (len(rows), channels, size, size), "f4", _blocks(images, (channels, size, size), "<f4")
                ),
                "mask": shards.Blocks((len(rows), size, size), "u1", _blocks(masks, (size, size), "u1")),
                "label": labels,
                "patient": shards.text_array(patients),
                "id": shards.text_array(row.id for row in rows),
                "spacing": spacings,
                "window": windows,
                "grid_spacing": grids,
            }
            shards.write_shard(
                out,
                datasets,
                schema=COHORT_SCHEMA,
                task=task or {"stage": "ingest"},
                settings=settings or cohort_settings(data, classes),
                inputs={data.table: table_sha256},
                seed=0,
                attributes={
                    "classes": list(classes),
                    "spacing_mm": data.spacing_mm,
                    "roi": data.roi,
                    "normalise": {
                        "images": summary.normalised,
                        "classes": summary.normalised_classes,
                        "clipped": round(summary.clipped, 6),
                    },
                },
                companions={".csv": report.text().encode(), ".png": sheet.png()},
                info=info,
                replace=True,  # other files may give the same images, and the report tells the files
            )
    except OSError as error:
        raise files.explain(error, out) from error
    return summary


def _read_table(raw: Path, data: Data, classes: Sequence[str]) -> tuple[list[Row], str]:
    """The rows, and the hash of the very table that they were read from: it may be edited while images are read."""
    path = Path(raw) / data.table

    def now() -> str:
        try:
            return sha256_file(path)
        except OSError:  # `read_table` says what is wrong
            return ""

    before = now()
    rows = read_table(raw, data.table, data.columns, classes=classes)
    if now() != before or not before:
        raise BadInput("the table changed while it was read", data.table, "run the same command again")
    return rows, before


def _same(before: dict[str, str] | None, after: dict[str, str], where: str) -> dict[str, str]:
    """The hashes of the very files that a row was read from: they may be replaced meanwhile."""
    if before != after:
        raise BadInput("an image or its mask changed while it was read", where, "run the same command again")
    return after


def crop_image(row: Row, raw: Path, data: Data, reader: Reader) -> Crop:
    """Read one row's image and mask and make its region. Raises BadInput for whatever cannot be used."""

    def at(column: str) -> str:
        return f"{data.table} row {row.number}, column {data.columns.get(column, column)}"

    warnings: list[str] = []
    source = reader.read(Path(raw) / row.image, at("image"))
    pixels = source.pixels
    shape = (pixels.shape[0], pixels.shape[1])
    if (pixels == pixels.reshape(-1, pixels.shape[-1])[0]).all():
        raise BadInput("a constant image", at("image"), "every pixel is the same: leave the row out")
    spacing, origin = _source_spacing(row, source, data, at, warnings)
    mask = _source_mask(row, raw, data, reader, source, at)
    place = _region(shape, spacing, mask, data)
    padded = geometry.share_outside(shape, place)
    if data.roi != "whole" and spacing:
        _check_region(place, spacing, padded, at("image"))

    pixels, lost_colour = (pixels, False) if data.channels == 3 else grey(pixels)
    values = geometry.linear(pixels, place)
    window, how = _window(row, data, values, at("image"))
    scaled, below, above = geometry.to_unit(values, window)
    if below + above == 1.0:
        what = f"every pixel of the region lies outside the window {window[0]:g} to {window[1]:g}"
        raise BadInput(what, at("window_low"), "is it in the unit of the image, such as ms?")
    if below + above > 0.5:
        warnings.append(f"{100 * (below + above):.0f} % of the pixels lie outside the window and were clipped")
    image = np.repeat(scaled, 3, axis=2) if data.channels == 3 and scaled.shape[2] == 1 else scaled
    if padded > 0 and data.roi != "whole":
        warnings.append(f"the region leaves the image: {100 * padded:.1f} % of it repeats the border")
    inside, all_of_mask, cropped = 0, 0, np.zeros((place.size, place.size), np.uint8)
    if mask is not None:
        inside, all_of_mask = geometry.mask_kept(mask, place)
        cropped = geometry.nearest(mask, place).astype(np.uint8)
        if inside < all_of_mask:
            warnings.append(f"the region cuts away {all_of_mask - inside} of {all_of_mask} mask pixels")
        elif not cropped.any():
            warnings.append("no mask pixel is left after resampling")
    known = spacing or (math.nan, math.nan)
    report = {
        "rows": shape[0],
        "columns": shape[1],
        "spacing_row_mm": _short(known[0]),
        "spacing_column_mm": _short(known[1]),
        "spacing_from": origin,
        "region_row": _short(place.start[0]),  # source index of the region's first pixel
        "region_column": _short(place.start[1]),
        "region_spacing_mm": _short(place.spacing),
        "outside_image": _short(padded),
        "mask_pixels": all_of_mask,
        "mask_inside": _short(inside / all_of_mask) if all_of_mask else "",
        "normalised_by": how,
        "window_low": _short(window[0]),
        "window_high": _short(window[1]),
        "clipped_low": _short(below),
        "clipped_high": _short(above),
    }
    planes = np.ascontiguousarray(image.transpose(2, 0, 1), "<f4")
    return Crop(planes, cropped, report, window, known, place.spacing, lost_colour, warnings)


def _source_spacing(
    row: Row, source: RawImage, data: Data, at: Callable[[str], str], warnings: list[str]
) -> tuple[tuple[float, float] | None, str]:
    """(mm between rows and columns or None, where it comes from): the table first, then the file, then the study."""
    if row.spacing:
        if source.spacing and any(abs(a / b - 1) > 0.01 for a, b in zip(row.spacing, source.spacing, strict=True)):
            told = f"{source.spacing[0]:.4g} x {source.spacing[1]:.4g} mm"
            warnings.append(f"the table's spacing was taken; the file says {told}")
        return row.spacing, "table"
    if source.spacing:
        return source.spacing, "file"
    if data.file_spacing_mm is not None:
        return (data.file_spacing_mm, data.file_spacing_mm), "study"
    if data.roi == "whole":  # the whole image needs none; its pixels count as square
        return None, "unknown"
    mend = (
        "add a column spacing_mm, or set file_spacing_mm in study.toml [data] (init: --spacing 1.25); "
        'or roi = "whole" there, which takes the whole image and needs none'
    )
    raise BadInput("the image's spacing is unknown: its file holds none", at("image"), mend)


def _source_mask(
    row: Row, raw: Path, data: Data, reader: Reader, source: RawImage, at: Callable[[str], str]
) -> np.ndarray | None:
    """Mask (rows, columns) bool, True where any channel is not zero; None when the row names none."""
    if row.mask is None:
        if data.roi == "mask":
            mend = 'name a mask in every row, or set roi = "centre" or "whole" in study.toml [data]'
            raise BadInput("the row names no mask", at("mask"), mend)
        return None
    stored = reader.read(Path(raw) / row.mask, at("mask"), "the mask")
    if stored.pixels.shape[:2] != source.pixels.shape[:2]:
        sizes = [f"{p.shape[0]} x {p.shape[1]}" for p in (stored.pixels, source.pixels)]
        what = f"the mask has {sizes[0]} pixels, its image {sizes[1]}"
        raise BadInput(what, at("mask"), "draw the mask on this image")
    for ours, theirs in ((stored.spacing, source.spacing), (stored.axes, source.axes)):
        if ours and theirs and len(ours) == len(theirs) and not np.allclose(ours, theirs, rtol=0, atol=1e-3):
            what = "the mask lies on another grid than its image (spacing or direction differ)"
            raise BadInput(what, at("mask"), "resample the mask onto the image")
    mask: np.ndarray = (stored.pixels != 0).any(axis=2)
    if not mask.any():
        raise BadInput("the mask is empty", at("mask"), "draw it, or leave the row out")
    return mask


def _region(
    shape: tuple[int, int], spacing: tuple[float, float] | None, mask: np.ndarray | None, data: Data
) -> geometry.Region:
    if data.roi == "whole" or spacing is None:
        return geometry.whole(shape, spacing, data.image_size)
    centre = ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
    if data.roi == "mask" and mask is not None:
        at = np.nonzero(mask)
        centre = (float(at[0].mean()), float(at[1].mean()))
    return geometry.centred(centre, spacing, data.spacing_mm, data.image_size)


def _check_region(place: geometry.Region, spacing: tuple[float, float], padded: float, where: str) -> None:
    """Raises BadInput where the region holds next to nothing of the image; `padded` is the share outside it."""
    across, side = [place.size * step for step in place.step], place.size * place.spacing
    mend = (
        f"check the spacing ({spacing[0]:g} x {spacing[1]:g} mm), the mask, and the region's side ({side:g} mm: "
        'image_size x spacing_mm in study.toml [data]; roi = "whole" takes images that are cropped already as they are)'
    )
    if min(across) < LEAST_PIXELS:
        raise BadInput(f"the region spans only {across[0]:.2g} x {across[1]:.2g} pixels of the image", where, mend)
    if padded > MOST_OUTSIDE:
        raise BadInput(f"{100 * padded:.0f} % of the region lies outside the image", where, mend)


def _window(row: Row, data: Data, values: np.ndarray, where: str) -> tuple[tuple[float, float], str]:
    """The raw values that become -1 and 1: the table's window, or the 1st and 99th percentile of the region."""
    if values.min() == values.max():
        raise BadInput("the region is constant", where, "is the mask on the right spot?")
    if row.window and data.normalise == "auto":
        return row.window, "window"
    low, high = (float(value) for value in np.percentile(values, [1, 99]))
    if not low < high:
        low, high = float(values.min()), float(values.max())
    return (low, high), "percentile"


def _pseudonyms(rows: Sequence[Row]) -> list[str]:
    """p0001, p0002, ... in the order in which patients first appear."""
    names: dict[str, str] = {}
    for row in rows:
        names.setdefault(row.patient, f"p{len(names) + 1:04d}")
    return [names[row.patient] for row in rows]


def _own_name(row: Row, table: str) -> str:
    if len(row.patient.encode()) > 32:
        mend = "shorten it, or set pseudonyms = true in study.toml [data]"
        raise BadInput("a patient id of more than 32 bytes", f"{table} row {row.number}", mend)
    return row.patient


def _blocks(spool: Any, shape: tuple[int, ...], kind: str) -> Iterator[np.ndarray]:
    """The spooled images, BLOCK at a time."""
    spool.seek(0)
    each = math.prod(shape) * np.dtype(kind).itemsize
    while data := spool.read(each * BLOCK):
        yield np.frombuffer(data, kind).reshape(-1, *shape)


def _summarise(
    summary: Summary,
    report: _Report,
    labels: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    spacings: np.ndarray,
    coloured: int,
) -> None:
    for index, name in enumerate(classes):
        own = np.flatnonzero(labels == index).tolist()
        summary.images[name] = len(own)
        summary.patients[name] = len({patients[i] for i in own})
    if np.isfinite(spacings).any():
        summary.spacing_mm = float(np.nanmin(spacings)), float(np.nanmax(spacings))
    windows = Counter[tuple[float, float]]()
    for own_windows in report.windows.values():
        windows.update({window: count for window, count in own_windows.items() if window})
    shared = {window for window, patients in report.window_patients.items() if len(patients) > 1}
    summary.normalised_classes = _kinds({name: report.windows[name] for name in classes}, windows, shared)
    by_class = summary.normalised_classes.values()
    summary.normalised = {kind: sum(kinds[kind] for kinds in by_class) for kind in next(iter(by_class))}
    summary.clipped = report.clipped / len(labels)
    if coloured:
        summary.notes.append(f"{coloured} images are in colour and became grey (channels = 1): luminance of BT.601")
    if apart := normalised_apart(summary.normalised_classes):
        mend = 'give every row the same window or none, or set normalise = "percentile" in study.toml [data]'
        summary.warnings.insert(0, f"{apart}; {mend}")
        return
    if 0 < windows.total() < len(labels):
        summary.notes.append("some images were normalised by window, some by percentile: their values do not compare")
    if len(windows) > 1:
        summary.notes.append(f"the table gives {len(windows)} different windows: values of two of them do not compare")


def _kinds(
    counts: Mapping[str, Counter[tuple[float, float] | None]],
    windows: Counter[tuple[float, float]],
    shared: Collection[tuple[float, float]],
) -> dict[str, dict[str, int]]:
    """Class -> images per kind of normalisation: "window" and "percentile".

    counts: class -> images per window, None by percentile. Where the table gives several windows, the commonest are
    kinds of their own, "window 300 to 1800", and the others one kind together.
    shared: windows of more than one patient. Others are never named: a window for each patient tells no class.
    """
    common = [window for window, _ in windows.most_common() if window in shared][:NAMED_WINDOWS]
    common = common if len(windows) > 1 else []
    names = {window: f"window {window[0]:g} to {window[1]:g}" for window in common}
    other = "another window" if names else "window"
    others = [other] if not names or len(names) < len(windows) else []
    found = {}
    for name, own in counts.items():
        found[name] = kinds = dict.fromkeys([*names.values(), *others, "percentile"], 0)
        for window, n in own.items():
            kinds[names.get(window, other) if window else "percentile"] += n
    return found


def _mark_copies(report: _Report, groups: Sequence[str]) -> list[str]:
    """Mark rows whose image file is identical to one of another class or another fold group.

    Returns one summary warning. groups: per row what folds keep together, a patient or, by image, one image.
    """
    number, label, image = (report.heading.index(name) for name in ("row", "label", sources.IMAGE))
    same: dict[str, list[int]] = {}
    for place, row in enumerate(report.rows):
        same.setdefault(row[image], []).append(place)
    marked = []
    for places in same.values():
        for place in places if len(places) > 1 else ():
            row = report.rows[place]
            across = next((p for p in places if groups[p] != groups[place]), None)
            unlike = next((p for p in places if report.rows[p][label] != row[label]), None)
            other = across if across is not None else unlike
            if other is not None:
                why = "which may fall into another fold" if across is not None else "of another class"
                told = f"the same image as row {report.rows[other][number]}, {why}"
                report.warnings[place] = "; ".join(filter(None, (report.warnings[place], told)))
                marked.append((row[number], report.rows[other][number], across is not None))
    if not marked:
        return []
    one, two, crosses = min(marked)
    what = "training and test can share it" if crosses else "it cannot be of both classes"
    told = f"rows {one} and {two} are the same image ({len(marked)} such rows in all): {what}"
    return [f"{told}; give them one patient id and one class, or leave one out"]


def _short(value: float) -> float:
    """Six significant digits, as the report prints them."""
    return float(f"{value:.6g}")


class _Report:
    """The table of what was done to each image, and its sums."""

    def __init__(self) -> None:
        self.heading: list[str] = []
        self.rows: list[tuple[Any, ...]] = []  # of hundreds of thousands of images
        self.warnings: list[str] = []  # the last column
        self.windows: dict[str, Counter[tuple[float, float] | None]] = {}  # class -> images; None by percentile
        self.window_patients: dict[tuple[float, float], set[str]] = {}
        self.clipped = 0.0

    def add(self, row: Row, patient: str, crop: Crop) -> None:
        cells: dict[str, Any] = {"row": row.number, "id": row.id, "patient": patient, "label": row.label}
        cells |= crop.report
        self.heading = [*cells, "warning"]
        self.rows.append(tuple(cells.values()))
        self.warnings.append("; ".join(crop.warnings))
        window = crop.window if crop.report["normalised_by"] == "window" else None
        self.windows.setdefault(row.label, Counter())[window] += 1
        if window:
            self.window_patients.setdefault(window, set()).add(patient)
        self.clipped += crop.report["clipped_low"] + crop.report["clipped_high"]

    def text(self) -> str:
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(self.heading)
        for cells, warning in zip(self.rows, self.warnings, strict=True):
            table.writerow([csv_cell(value) for value in (*cells, warning)])
        return stream.getvalue()
