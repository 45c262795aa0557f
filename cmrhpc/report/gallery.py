"""What a whole workspace adds to the predictions: sample images, kernel distances and training logs.

Images and curves are of repeat 0 only, warnings of every training. A shard that is missing, damaged or no longer what
the study asks for is left out with a note.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import files, pictures, planning, shards
from cmrhpc.errors import CmrhpcError
from cmrhpc.hashing import sha256_of
from cmrhpc.measure.kernel_distance import feature_distance, features, turned
from cmrhpc.names import COHORT_SCHEMA, FOLDS_SCHEMA, IMAGES_SCHEMA
from cmrhpc.planning import COHORT, FOLDS, Task
from cmrhpc.report import figures
from cmrhpc.report.collect import Collection
from cmrhpc.shards import Shard
from cmrhpc.study import Study

MAX_IMAGES = 300  # per side of a kernel distance
SAMPLES = 16
MAX_WARNING = 300  # characters
MAX_LOG_BYTES = 16 * 2**20
MAX_PLACES = 5  # of one warning that are named
MAX_DRAWS = 8  # times that real images are put into other orientations


@dataclass(frozen=True, kw_only=True)
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
class TrainingWarning:
    """One warning of the trainings of one generator or refiner and class, wherever it was given."""

    training: str  # `dae-gan+simgan, class disease`
    text: str  # of the first place; numbers in it may differ elsewhere
    places: list[str] = field(default_factory=list)  # `fold 0 repeat 1`

    def in_words(self) -> str:
        """`dae-gan, class disease: D is never wrong (2 trainings: fold 0 repeat 1; fold 3 repeat 0)`."""
        more = len(self.places) - MAX_PLACES
        where = "; ".join(self.places[:MAX_PLACES]) + (f" and {more} more" if more > 0 else "")
        n = len(self.places)
        return f"{self.training}: {self.text} ({n} training{'s' * (n > 1)}: {where})"


@dataclass
class Gallery:
    """Empty when only predictions are at hand."""

    strips: list[Strip] = field(default_factory=list)
    distances: list[Distance] = field(default_factory=list)
    curves: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # file name -> title, PNG
    training_warnings: list[TrainingWarning] = field(default_factory=list)
    n_logs: int = 0  # trainings of generators and refiners whose log was read for warnings
    n_warned: int = 0  # those of them that warned
    notes: list[str] = field(default_factory=list)

    @property
    def warned(self) -> str:
        """`3 of 50 trainings of generators and refiners warned`; empty when none did."""
        if not self.n_warned:
            return ""
        return f"{self.n_warned} of {self.n_logs} training{'s' * (self.n_logs > 1)} of generators and refiners warned"


class _Images:
    """Real and made images of a workspace, read as they are needed."""

    def __init__(self, collection: Collection, notes: list[str]):
        self.root, self.study, self.notes = collection.root, collection.study, notes
        self.asked = collection.asked
        self.cohort, self.folds = self._open(COHORT, COHORT_SCHEMA), self._open(FOLDS, FOLDS_SCHEMA)
        if self.cohort and self.folds:
            self.rows = {image: row for row, image in enumerate(self.cohort.strings("id"))}
            self.label = self.cohort["label"]
        self.real = lru_cache(maxsize=64)(self._real)
        self.real_features = lru_cache(maxsize=64)(self._real_features)

    def _open(self, name: str, schema: str) -> Shard | None:
        shard = self.asked.header(name)
        if shard and shard.schema == schema:
            return shard
        if (self.root / name).is_file():
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

    def _real_features(self, fold: int, part: str, label: int, expanded: bool) -> np.ndarray:
        """Features (draws, N, D) of the real images; expanded: draws of their orientations, MAX_IMAGES in all."""
        images = self.real(fold, part, label, MAX_IMAGES)
        if not len(images):
            return np.zeros((1, 0, 1))
        if not expanded:
            return features(images)[None]
        draws, rng = min(MAX_DRAWS, MAX_IMAGES // len(images)), np.random.default_rng(("train", "test").index(part))
        return np.stack([features(turned(images, rng)) for _ in range(draws)])

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
    _add_warnings(gallery, images)
    if not (images.cohort and images.folds):
        return gallery
    try:
        _fill(gallery, images)
    except (KeyError, ValueError, TypeError, IndexError, CmrhpcError) as error:  # shards that do not fit each other
        gallery.notes.append(f"images and kernel distances stop here: {error}")
    gallery.notes[:] = list(dict.fromkeys(gallery.notes))
    return gallery


def is_expanded(study: Study, generator: str) -> bool:
    """Whether a generator is trained on the affine-expanded set, in which a heart lies any way round (METHODS M3)."""
    settings = study.generators[generator]
    return settings.expand and study.affine.factor > 1 and not settings.external


def _fill(gallery: Gallery, images: _Images) -> None:
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
                        gallery.strips += _strip(f"{task.generator}+{name}", kind, label, samples)
        if task.fold == 0:
            _add_curve(gallery, images, task, shard)
    for task in (t for t in refine if t.fold == 0):
        shard = images.made(task)
        if shard:
            _add_curve(gallery, images, task, shard)


def _strip(name: str, kind: str, label: int, samples: np.ndarray) -> list[Strip]:
    if not len(samples):
        return []
    scale = max(1, 96 // samples.shape[-1])
    grid = pictures.grid(samples, columns=8, scale=scale)
    return [Strip(f"samples_{name}_class{label}.png", grid, kind, label, len(samples))]


def _distance(images: _Images, task: Task, label: int, shard: Shard, refined: dict[str, Shard | None]) -> Distance:
    expanded = is_expanded(images.study, task.generator)
    held_out = images.real_features(task.fold, "test", label, expanded)
    train = images.real_features(task.fold, "train", label, expanded)

    def far(samples: np.ndarray) -> float:
        return feature_distance(features(samples), held_out) if len(samples) else math.nan

    trained = images.of_class(shard, label, MAX_IMAGES)
    untrained = shard.read("untrained", slice(0, MAX_IMAGES)) if "untrained" in shard else trained[:0]
    if task.label is None:  # a conditional generator's show the classes in turn
        untrained = untrained[label :: len(images.study.classes)]
    return Distance(
        generator=task.generator,
        fold=task.fold,
        label=label,
        n_held_out=held_out.shape[1],
        untrained=far(untrained),
        trained=far(trained),
        refined={name: far(images.of_class(made, label, MAX_IMAGES)) for name, made in refined.items() if made},
        floor=feature_distance(train, held_out),
    )


def _add_curve(gallery: Gallery, images: _Images, task: Task, shard: Shard) -> None:
    """The training curves of one task, from its .jsonl companion if that is there and unchanged."""
    title = task.title
    if task.label is not None:
        title = title.replace(f"class {task.label}", f"class {images.study.classes[task.label]}")
    made = figures.training_curves(title, list(_log_lines(_log_text(images.root / task.output, shard))))
    if made:
        part = "classes" if task.label is None else f"class{task.label}"
        gallery.curves[f"training_{_name(task)}_{part}.png"] = (title, made)


def _add_warnings(gallery: Gallery, images: _Images) -> None:
    """What the trainings of all folds and repeats warned of, from the logs that are at hand and unchanged."""
    found: dict[tuple[str, str], TrainingWarning] = {}
    for task in (t for stage in ("synthesize", "refine") for t in planning.tasks(images.study, stage)):
        shard = images.made(task)
        text = _log_text(images.root / task.output, shard) if shard else ""
        gallery.n_logs += bool(text)
        suspects = "\n".join(line for line in text.splitlines() if '"warning"' in line)
        told = [line["warning"] for line in _log_lines(suspects) if isinstance(line.get("warning"), str)]
        gallery.n_warned += bool(told)
        training = _name(task) + ("" if task.label is None else f", class {images.study.classes[task.label]}")
        for warning in dict.fromkeys(part for line in told for part in line[:MAX_WARNING].split("; ")):
            one = found.setdefault((training, re.sub(r"\d+", "0", warning)), TrainingWarning(training, warning))
            place = f"fold {task.fold} repeat {task.repeat}"
            one.places += [place] if place not in one.places else []
    gallery.training_warnings = list(found.values())


def _name(task: Task) -> str:
    return "+".join(filter(None, (task.generator, task.refiner)))


def _log_text(output: Path, shard: Shard) -> str:
    """The log of a training; empty when it is absent, unreadable, too large or not the one that the shard names."""
    path = output.with_suffix(".jsonl")
    told = shard.files.get(path.name, "")
    try:
        if not told or not path.is_file() or path.is_symlink() or path.stat().st_size > MAX_LOG_BYTES:
            return ""
        data = files.read_plain(path)
    except OSError:
        return ""
    return data.decode("utf-8", "replace") if sha256_of(data) == told else ""


def _log_lines(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log."""
    for one in text.splitlines():
        try:
            line = json.loads(one)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line
