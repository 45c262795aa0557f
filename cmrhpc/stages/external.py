"""Images that something else made -> the synthetic shard of one fold, repeat and class.

Nothing about them is taken on trust: every file must be the one that `SHA256SUMS` names, and the generator may have
been trained on images of this fold's training set only. What it was trained on is declared by who made it; no program
can prove it.
"""

from __future__ import annotations

import math
import posixpath

import numpy as np

from cmrhpc import external, pictures, planning, shards
from cmrhpc.data.images import Reader, grey
from cmrhpc.data.region import to_unit
from cmrhpc.data.selection import training_images
from cmrhpc.errors import BadInput
from cmrhpc.external import DECLARATION, TABLE, Place
from cmrhpc.hashing import sha256_file
from cmrhpc.names import IMAGES_SCHEMA
from cmrhpc.planning import COHORT, FOLDS
from cmrhpc.stages.context import Context

SHOWN = 64  # images of the sample grid
SCALES = {"u1": 127.5, "u2": 32767.5}  # whole-numbered pixels: half of the largest value


def take_in(context: Context) -> None:
    """Check place and declaration, read `max_ratio` images per real training image, write the shard.

    Raises BadInput: a file that is not what its list says, a missing declaration, a declared id that is not in the
    fold's training set, fewer images than an arm needs, an image of another size or scale than the cohort's.
    """
    study, task = context.workspace.study, context.task
    root = context.workspace.external(task.generator)
    place = external.place_of(root, external.read_sums(root), task)
    if wrong := place.damage():
        raise BadInput(wrong, "", f"put it right, or {external.MAKE_SUMS}", str(root))
    real = training_images(context.inputs[COHORT], context.inputs[FOLDS], task.repeat, task.fold)
    declared = _declared(context, place)
    if outside := sorted(set(declared) - set(real.ids)):
        what = f"{len(outside)} declared training images are not in the training set of fold {task.fold} repeat "
        what += f"{task.repeat}: {', '.join(outside[:20])}{' ...' if len(outside) > 20 else ''}"
        mend = "train for each fold and repeat on its training images alone: `cmrhpc export --by-fold` writes them"
        raise BadInput(what, place.where(DECLARATION), mend, str(root))
    own = int((real.labels == task.label).sum())
    names = place.images[: planning.images_wanted(study.generators[task.generator].max_ratio, own)]
    highest = max(ratio for _, ratio, parts in planning.cells(study) if parts.generator == task.generator)
    if len(names) < (needed := planning.images_wanted(highest, own)):
        what = f"{len(names)} images, but ratio {highest:g} needs {needed}"
        raise BadInput(what, place.name, "make more images, or ask for lower ratios", str(root))
    images = _read(context, place, names, real.images.shape[1:])
    context.beside[external.input_name(task)] = place.content_sha256
    context.write(
        {
            "image": images,
            "label": np.full(len(images), task.label, np.int64),
            "train_id": shards.text_array(declared),
        },
        schema=IMAGES_SCHEMA,
        companions={".png": pictures.grid(images[:SHOWN], columns=8, scale=2)},
        info={"device": "cpu"},
    )


def _declared(context: Context, place: Place) -> list[str]:
    """The declared ids in the order of the cohort. A heading without rows declares that no image of it was seen."""
    where = place.where(DECLARATION)
    heading, rows = external.read_columns(place.path(DECLARATION), where)
    cohort = context.inputs[COHORT]
    if "id" in heading:
        told = {row["id"] for row in rows if any(row.values())}
    elif "image" in heading:
        told = _ids_of_images(context, [row["image"] for row in rows if any(row.values())], where)
    else:
        mend = "one column `id` (r000001, ...) or `image` (as in the raw table), one row per image"
        raise BadInput("neither a column id nor a column image", where, mend)
    ids = cohort.strings("id")
    if unknown := sorted(told - set(ids)):
        mend = "ids are those of cohort.csv: r000001, ..."
        raise BadInput(f"{len(unknown)} unknown ids", where, mend, f"{place.root}: {', '.join(unknown[:20])}")
    return [one for one in ids if one in told]


def _ids_of_images(context: Context, images: list[str], where: str) -> set[str]:
    """Paths as in the raw table -> ids. The table must be the one that the cohort was made from."""
    from cmrhpc.data.table import read_table

    data = context.workspace.study.data
    table = context.workspace.raw / data.table
    if not table.is_file() or context.inputs[COHORT].inputs.get(data.table) != sha256_file(table):
        what = "the raw table that image names belong to is not at hand, or changed"
        raise BadInput(what, where, f"declare ids instead (column id of {DECLARATION})", str(table))
    rows = read_table(context.workspace.raw, data.table, data.columns, check_files=False)
    ids = {posixpath.normpath(row.image): row.id for row in rows}
    missing = [number for number, image in enumerate(images, 1) if posixpath.normpath(image) not in ids]
    if missing:
        shown = ", ".join(map(str, missing[:20]))
        raise BadInput(f"rows {shown} name no image of the raw table", where, "write the names as they stand there")
    return {ids[posixpath.normpath(image)] for image in images}


def _read(context: Context, place: Place, names: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """(len(names), C, H, W) float32 in [-1, 1]; shape (C, H, W) is the cohort's."""
    rows: dict[str, dict[str, str]] = {}
    if TABLE in place.files:
        where = place.where(TABLE)
        rows = {row.get("image", ""): row for row in external.read_columns(place.path(TABLE), where)[1]}
    images = np.empty((len(names), *shape), np.float32)
    with Reader() as reader:
        for number, name in enumerate(names):
            where = place.where(name)
            pixels = reader.read(place.path(name), where).pixels
            if pixels.shape[:2] != shape[1:]:
                size = " x ".join(map(str, pixels.shape[:2]))
                what = f"an image of {size} pixels, the cohort's have {shape[1]} x {shape[2]}"
                raise BadInput(what, where, "make images of the cohort's size: nothing is resampled here")
            if shape[0] == 1:
                pixels, colour = grey(pixels)
                if colour:
                    raise BadInput("a colour image in a grey study", where, "store one channel")
            values = _unit(pixels, rows.get(name, {}), where).transpose(2, 0, 1)
            images[number] = np.broadcast_to(values, shape)
            context.progress(number + 1, len(names))
    return images


def _unit(pixels: np.ndarray, row: dict[str, str], where: str) -> np.ndarray:
    """Pixels on the scale from -1 to 1. `row`: the image's row of images.csv, which tells a window for raw units."""
    if row.get("unit") == "raw":
        try:
            low, high = float(row["window_low"]), float(row["window_high"])
        except (KeyError, ValueError):
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BadInput("raw units without a window", where, f"give window_low and window_high in {TABLE}")
        return to_unit(pixels.astype(np.float64), (low, high))[0]
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if low < -1.0 or high > 1.0:
            what = f"values from {low:g} to {high:g}"
            raise BadInput(what, where, f"store -1 to 1, or tell unit = raw and the window in {TABLE}")
        return pixels
    if (kind := pixels.dtype.str[1:]) not in SCALES:
        what = f"pixels of type {pixels.dtype.name} without a scale"
        raise BadInput(what, where, f"store 8 or 16 bits without sign or floats, or tell the window in {TABLE}")
    return pixels / SCALES[kind] - 1.0
