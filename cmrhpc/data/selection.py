"""The only way images enter training, validation and testing; each use is checked for leaks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmrhpc.data.folds import PARTS, Split
from cmrhpc.errors import Damage
from cmrhpc.shards import Shard

BLOCK = 4096  # images


@dataclass(frozen=True)
class Selection:
    """Images of one part of a fold in the order of the cohort.

    images: (N, C, H, W) float32 in [-1, 1]. labels: (N,) int64. ids, patients: N texts.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: list[str]
    patients: list[str]


def training_images(cohort: Shard, folds: Shard, repeat: int, fold: int, label: int | None = None) -> Selection:
    """The training images of a fold, or of one class of it. Raises Damage when a patient leaks (`checked_split`)."""
    return _select(cohort, folds, repeat, fold, "train", label)


def held_out_images(cohort: Shard, folds: Shard, repeat: int, fold: int, part: str) -> Selection:
    """The images of a fold's "validation" or "test" part. Raises Damage when a patient leaks."""
    return _select(cohort, folds, repeat, fold, part, None)


def _select(cohort: Shard, folds: Shard, repeat: int, fold: int, part: str, label: int | None) -> Selection:
    ids, patients = cohort.strings("id"), cohort.strings("patient")
    split = checked_split(ids, patients, folds, repeat, fold)
    wanted = set(getattr(split, part))
    labels = cohort["label"]
    rows = np.array([i for i, one in enumerate(ids) if one in wanted and label in (None, labels[i])], np.int64)
    if part == "train" and not len(rows):
        what = "no training image" if label is None else f"no training image of class {label}"
        raise Damage(f"{what} in repeat {repeat} fold {fold}", str(folds.path), "run ingest again")
    return Selection(_images(cohort, rows), labels[rows], [ids[i] for i in rows], [patients[i] for i in rows])


def _images(cohort: Shard, rows: np.ndarray) -> np.ndarray:
    """The named rows, block by block: HDF5 is slow to pick many single rows."""
    images = np.empty((len(rows), *cohort.shapes["image"][1:]), np.float32)
    for first in range(0, cohort.shapes["image"][0], BLOCK):
        here = (rows >= first) & (rows < first + BLOCK)
        if here.any():
            images[here] = cohort.read("image", slice(first, first + BLOCK))[rows[here] - first]
    return images


def checked_split(ids: list[str], patients: list[str], folds: Shard, repeat: int, fold: int) -> Split:
    """The split of one fold, after proof that it does not leak.

    ids, patients: of the whole cohort. Raises Damage when the folds do not hold the split, when an id is unknown, is in
    two parts or in none, or when two parts share a patient (which folds that were grouped by image may do).
    """
    place, where = f"repeat {repeat} fold {fold}", str(folds.path)
    mend = "the folds were not made from this cohort: delete folds.h5 and run ingest again"
    names = [f"repeat{repeat}_fold{fold}_{part}" for part in PARTS]
    if not all(name in folds for name in names):
        raise Damage(f"the folds do not hold {place}", where, mend)
    parts = [tuple(folds.strings(name)) for name in names]
    listed = [one for part in parts for one in part]
    if sorted(listed) != sorted(ids) or len(set(ids)) != len(ids):
        twice = len(listed) - len(set(listed))
        strange = len(set(listed) ^ set(ids))
        raise Damage(f"leak or loss in {place}: {twice} ids in two parts, {strange} not in both files", where, mend)
    if folds.attributes.get("group_by") != "image":
        patient_of = dict(zip(ids, patients, strict=True))
        groups = [{patient_of[one] for one in part} for part in parts]
        for a, b in ((0, 2), (1, 2), (0, 1)):
            if shared := groups[a] & groups[b]:
                what = f"leak in {place}: {PARTS[a]} and {PARTS[b]} share {len(shared)} patient(s)"
                raise Damage(what, where, mend)
    return Split(*parts)
