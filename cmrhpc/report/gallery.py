"""What a whole workspace adds to the predictions: sample images, kernel distances and training logs.

Looks at repeat 0 only. A shard that is missing, damaged or no longer what the study asks for is left out with a note.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import files, pictures, planning, shards
from cmrhpc.errors import CmrhpcError
from cmrhpc.hashing import sha256_of
from cmrhpc.measure.kernel_distance import feature_distance, features
from cmrhpc.names import COHORT_SCHEMA, FOLDS_SCHEMA, IMAGES_SCHEMA
from cmrhpc.planning import COHORT, FOLDS, Task
from cmrhpc.report import figures
from cmrhpc.report.collect import Asked, Collection
from cmrhpc.shards import Shard

MAX_IMAGES = 300  # per side of a kernel distance
SAMPLES = 16
MAX_LOG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Distance:
    """Kernel distances to the held-out real images of a class and fold; NaN where there is no such set of images."""

    generator: str
    fold: int
    label: int
    n_held_out: int
    untrained: float
    trained: float
    refined: dict[str, float]  # by refiner
    floor: float  # real training images to the same held-out images


@dataclass(frozen=True)
class Strip:
    """Sample images of one kind and class: file name under figures/, PNG bytes, what they are, how many."""

    name: str
    png: bytes
    kind: str
    label: int
    count: int


@dataclass
class Gallery:
    """Empty when only predictions are at hand."""

    strips: list[Strip] = field(default_factory=list)
    distances: list[Distance] = field(default_factory=list)
    curves: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # file name -> title, PNG
    training_warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Images:
    """Real and made images of a workspace, read as they are needed."""

    def __init__(self, collection: Collection, notes: list[str]):
        self.root, self.study, self.notes = collection.root, collection.study, notes
        self.asked = Asked(self.root, self.study, {})
        self.cohort, self.folds = self._open(COHORT, COHORT_SCHEMA), self._open(FOLDS, FOLDS_SCHEMA)
        if self.cohort and self.folds:
            self.rows = {image: row for row, image in enumerate(self.cohort.strings("id"))}
            self.label = self.cohort["label"]
        self.real = lru_cache(maxsize=64)(self._real)
        self.real_features = lru_cache(maxsize=64)(self._real_features)

    def _open(self, name: str, schema: str) -> Shard | None:
        if not (self.root / name).is_file():
            return None
        try:
            return shards.read_shard(self.root / name, schema)
        except CmrhpcError as error:
            self.notes.append(f"{name}: {error.what}")
            return None

    def made(self, task: Task) -> Shard | None:
        """The shard of a synthesize or refine task if it is there and is what the study asks for."""
        shard = self._open(task.output, IMAGES_SCHEMA)
        reason = self.asked.reason(task, shard) if shard else ""
        if reason:
            self.notes.append(f"{task.output}: {reason}; left out")
        return None if reason else shard

    def _real(self, fold: int, part: str, label: int, limit: int) -> np.ndarray:
        """At most `limit` real images of a class, evenly spread over the training or test list of the fold."""
        assert self.cohort is not None
        assert self.folds is not None
        ids = self.folds.strings(f"repeat0_fold{fold}_{part}")
        rows = np.array(sorted(self.rows[i] for i in ids if self.label[self.rows[i]] == label), int)
        if len(rows) > limit:
            rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
        return self.cohort.read("image", rows)

    def _real_features(self, fold: int, part: str, label: int) -> np.ndarray:
        images = self.real(fold, part, label, MAX_IMAGES)
        return features(images) if len(images) else np.zeros((0, 1))

    def of_class(self, shard: Shard, label: int, limit: int) -> np.ndarray:
        """The first `limit` images of a class in a synthetic or refined shard."""
        rows = np.flatnonzero(shard["label"] == label)[:limit]
        if not len(rows):
            return shard.read("image", slice(0, 0))
        return shard.read("image", slice(int(rows[0]), int(rows[-1]) + 1))[rows - rows[0]]


def make_gallery(collection: Collection) -> Gallery:
    """Everything that the workspace around the predictions shows; an empty gallery for a copied predictions folder."""
    gallery = Gallery()
    images = _Images(collection, gallery.notes)
    if not (images.cohort and images.folds):
        return gallery
    try:
        _fill(gallery, images, collection)
    except (KeyError, ValueError, TypeError, IndexError, CmrhpcError) as error:  # shards that do not fit each other
        gallery.notes.append(f"images and kernel distances stop here: {error}")
    return gallery


def _fill(gallery: Gallery, images: _Images, collection: Collection) -> None:
    study = images.study
    refine = [t for t in planning.tasks(study, "refine") if t.repeat == 0]
    for label in range(len(study.classes)):
        real = images.real(0, "train", label, SAMPLES)
        gallery.strips += _strip("real", "real, training images of fold 0", label, real)
    for task in (t for t in planning.tasks(study, "synthesize") if t.repeat == 0):
        shard = images.made(task)
        if not shard:
            continue
        followers = [t for t in refine if t.generator == task.generator and t.fold == task.fold]
        for label in range(len(study.classes)) if task.label is None else [task.label]:
            refined = {t.refiner: images.made(t) for t in followers if t.label in (None, label)}
            gallery.distances.append(_distance(images, task, label, shard, refined))
            if task.fold == 0:
                synthetic = images.of_class(shard, label, SAMPLES)
                gallery.strips += _strip(task.generator, f"synthetic, {task.generator}", label, synthetic)
                for name, made in refined.items():
                    if made:
                        kind, samples = f"refined, {task.generator} by {name}", images.of_class(made, label, SAMPLES)
                        gallery.strips += _strip(f"{task.generator}_{name}", kind, label, samples)
        if task.fold == 0:
            _add_curve(gallery, images, task, shard)
    for task in (t for t in refine if t.fold == 0):
        shard = images.made(task)
        if shard:
            _add_curve(gallery, images, task, shard)
    gallery.notes[:] = list(dict.fromkeys(gallery.notes))


def _strip(name: str, kind: str, label: int, samples: np.ndarray) -> list[Strip]:
    if not len(samples):
        return []
    scale = max(1, 96 // samples.shape[-1])
    grid = pictures.grid(samples, columns=8, scale=scale)
    return [Strip(f"samples_{name}_class{label}.png", grid, kind, label, len(samples))]


def _distance(images: _Images, task: Task, label: int, shard: Shard, refined: dict[str, Shard | None]) -> Distance:
    held_out = images.real_features(task.fold, "test", label)

    def far(samples: np.ndarray) -> float:
        return feature_distance(features(samples), held_out) if len(samples) > 1 and len(held_out) > 1 else math.nan

    trained = images.of_class(shard, label, MAX_IMAGES)
    untrained = shard.read("untrained", slice(0, MAX_IMAGES)) if "untrained" in shard else trained[:0]
    if task.label is None:  # a conditional generator's show the classes in turn
        untrained = untrained[label :: len(images.study.classes)]
    train = images.real_features(task.fold, "train", label)
    return Distance(
        task.generator,
        task.fold,
        label,
        len(held_out),
        far(untrained),
        far(trained),
        {name: far(images.of_class(made, label, MAX_IMAGES)) for name, made in refined.items() if made},
        feature_distance(train, held_out) if min(len(train), len(held_out)) > 1 else math.nan,
    )


def _add_curve(gallery: Gallery, images: _Images, task: Task, shard: Shard) -> None:
    """The training curves of one task, from its .jsonl companion if that is there and unchanged."""
    path = (images.root / task.output).with_suffix(".jsonl")
    lines = list(_log_lines(path, shard.files.get(path.name, "")))
    title = task.title
    if task.label is not None:
        title = title.replace(f"class {task.label}", f"class {images.study.classes[task.label]}")
    for line in lines:
        if isinstance(line.get("warning"), str):
            gallery.training_warnings.append(f"{title}, step {line.get('step', '?')}: {line['warning'][:300]}")
    made = figures.training_curves(title, lines)
    if made:
        part = "classes" if task.label is None else f"class{task.label}"
        kind = "_".join(filter(None, (task.refiner, task.generator)))
        gallery.curves[f"training_{kind}_{part}.png"] = (title, made)


def _log_lines(path: Path, told: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log; nothing when the file is absent, too large or not the one that the shard names."""
    if not told or not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_LOG_BYTES:
        return
    data = files.read_plain(path)
    if sha256_of(data) != told:
        return
    for text in data.decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line
