"""Collected predictions -> every number of the report, computed once; tables, figures and page only print them.

A metric is the mean over repeats of the value pooled over a repeat's folds; a repeat that lacks folds weighs as much as
it tests. All intervals of a row and all differences
use the same resampled patients, so that arms stay paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from cmrhpc.measure import metrics, statistics
from cmrhpc.names import METRICS
from cmrhpc.report.collect import Cell, Collection, Key
from cmrhpc.seeds import derive_seed

Cells = dict[tuple[int, int], Cell]  # by (repeat, fold)
COUNTED = ("accuracy", "sensitivity", "specificity")  # of a binary study: shares of patients of a kind


@dataclass(frozen=True)
class Figure:
    """One metric with its 95 % interval, fractions in [0, 1]; NaN when undefined."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Fold:
    """Metrics of one cell: a fold of a repeat."""

    repeat: int
    fold: int
    n_images: int
    n_patients: int
    values: dict[str, float]
    best_step: int


@dataclass(frozen=True)
class PerPatient:
    """One prediction per patient: mean score over the patient's images and all repeats (highest score is the class).

    A patient with images of two classes counts once for each.
    """

    patient: np.ndarray  # (U,) row of Collection.patients
    label: np.ndarray  # (U,)
    score: np.ndarray  # (U, K)
    n_images: np.ndarray  # (U,) distinct images
    n_predictions: np.ndarray  # (U,) images x repeats

    @property
    def predicted(self) -> np.ndarray:
        return metrics.predicted_class(self.score)

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.label


@dataclass(frozen=True)
class Row:
    """One classifier, arm and ratio."""

    key: Key
    figures: dict[str, Figure]
    counts: np.ndarray  # (K, K) confusion counts, mean over repeats: true class x predicted class
    per_class: dict[str, np.ndarray]  # precision, recall, f1 (K,), of the counts of all repeats together
    folds: list[Fold]
    n_folds: int
    n_repeats: int
    n_missing: int
    patients: PerPatient | None  # None when no cell is there
    drawn: dict[str, np.ndarray] = field(repr=False, default_factory=dict)  # metric -> (draws,)

    @property
    def n_expected(self) -> int:
        return len(self.folds) + self.n_missing


class Evaluator:
    """Measures cells with one set of resampled patients."""

    def __init__(self, collection: Collection):
        self.collection = collection
        self.n_classes = len(collection.study.classes)
        self.expected = Counter((task.classifier, task.arm, task.ratio) for task in collection.expected)
        seed = derive_seed(collection.study.seed, "bootstrap")
        self.weights = statistics.patient_weights(len(collection.patients), seed)

    # ------------------------------------------------------------------------------------------ one row

    def row(self, key: Key) -> Row:
        cells = self.collection.cells.get(key, {})
        return self.row_of(key, cells, self.expected[key] - len(cells))

    def row_of(self, key: Key, cells: Cells, n_missing: int) -> Row:
        """The row of any cells, at most one per fold and repeat."""
        if not cells:
            nan = np.full(self.n_classes, np.nan)
            empty = {name: Figure(float("nan")) for name in METRICS}
            nothing = {name: nan for name in ("precision", "recall", "f1")}
            return Row(key, empty, np.full((self.n_classes,) * 2, np.nan), nothing, [], 0, 0, n_missing, None)
        pooled = self.pooled(cells)
        patients = per_patient(cells.values(), self.n_classes)
        limits = self.limits(pooled, patients)
        figures = {name: Figure(pooled.values[name], *limits[name]) for name in METRICS}
        return Row(
            key,
            figures,
            np.mean(pooled.counts, axis=0),
            metrics.per_class(np.sum(pooled.counts, axis=0)),
            [self._fold(cell) for _, cell in sorted(cells.items())],
            len({fold for _, fold in cells}),
            len({repeat for repeat, _ in cells}),
            n_missing,
            patients,
            pooled.drawn,
        )

    def _fold(self, cell: Cell) -> Fold:
        values = metrics.measure(cell.images.label, cell.score)
        n_patients = len(np.unique(cell.images.patient))
        return Fold(cell.task.repeat, cell.task.fold, len(cell.score), n_patients, values, cell.best_step)

    def pooled(self, cells: Cells) -> Pooled:
        """Values and bootstrap draws of a set of cells; the accuracy identity is asserted for every repeat."""
        repeats = sorted({repeat for repeat, _ in cells})
        values, drawn, counts, sizes = [], [], [], []
        for repeat in repeats:
            here = [cell for (r, _), cell in sorted(cells.items()) if r == repeat]
            label, patient = (np.concatenate([getattr(c.images, n) for c in here]) for n in ("label", "patient"))
            score = np.concatenate([cell.score for cell in here])
            values.append(metrics.measure(label, score))
            counts.append(metrics.confusion(label, metrics.predicted_class(score), self.n_classes))
            drawn.append(self._draw(label, patient, score))
            sizes.append(len(label))
        weights = np.array(sizes) / max(sizes)  # whole repeats weigh 1, exactly
        means, draws = dict.fromkeys(METRICS, float("nan")), {}
        for name in METRICS:
            # A repeat that lacks a class has no value of some metrics and so no part in their mean.
            there = [i for i, v in enumerate(values) if np.isfinite(v[name])]
            if there:
                means[name] = float(np.average([values[i][name] for i in there], weights=weights[there]))
                draws[name] = np.average([drawn[i][name] for i in there], axis=0, weights=weights[there])
        return Pooled(means, draws, counts)

    def _draw(self, label: np.ndarray, patient: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of one repeat for every resample of patients, (draws,) each."""
        k, n_patients = self.n_classes, self.weights.shape[1]
        flat = (patient * k + label) * k + metrics.predicted_class(score)
        per_patient_counts = np.bincount(flat, minlength=n_patients * k * k).reshape(n_patients, k * k)
        found = metrics.rates((self.weights @ per_patient_counts).reshape(-1, k, k))
        return found | {"auc": metrics.class_auc(label, score, patient, self.weights)}

    def limits(self, pooled: Pooled, patients: PerPatient) -> dict[str, tuple[float, float]]:
        """95 % interval of each metric: bootstrap, for the rates of a binary study the wider of it and an exact one.

        Near 0 or 1 a bootstrap of a rate rests on few patients and is too narrow (of 77, each right with chance 0.95,
        it covers 0.89), so the exact limits over patients count too. Balanced accuracy takes those of its two rates,
        of different patients, by squares and sums (MOVER: Zou and Donner, Statistics in Medicine 27, 2008).
        """
        n, value = rests_on(patients, self.n_classes), pooled.values
        limits: dict[str, tuple[float, float]] = {}
        binary = self.n_classes == 2
        for name in METRICS:
            low, high = statistics.interval(pooled.drawn.get(name, np.full(1, np.nan)), n[name])
            exact = (float("nan"), float("nan"))
            if binary and name in COUNTED and np.isfinite(value[name]):
                exact = statistics.exact_limits(round(value[name] * n[name], 9), n[name])
            elif binary and name == "balanced_accuracy":
                exact = _of_two(*((value[rate], *limits[rate]) for rate in ("sensitivity", "specificity")))
            low, high = (float("nan"),) * 2 if statistics.blind(low, high) else (low, high)
            limits[name] = float(np.fmin(low, exact[0])), float(np.fmax(high, exact[1]))
        return limits


@dataclass(frozen=True)
class Pooled:
    """Mean over repeats of the pooled metrics, their bootstrap draws, and the confusion counts of each repeat."""

    values: dict[str, float]
    drawn: dict[str, np.ndarray]
    counts: list[np.ndarray]


def _of_two(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float]:
    """Limits of the mean of two independent rates, each given as value, low, high; NaN when one is."""
    down, up = np.hypot(a[0] - a[1], b[0] - b[1]) / 2, np.hypot(a[2] - a[0], b[2] - b[0]) / 2
    middle = (a[0] + b[0]) / 2
    return float(middle - down), float(middle + up)


def rests_on(patients: PerPatient, n_classes: int) -> dict[str, int]:
    """How many patients each metric rests on: those of its class, or of the smaller class where it needs all."""
    per_class = [len(np.unique(patients.patient[patients.label == label])) for label in range(n_classes)]
    smallest, binary = min(per_class), n_classes == 2
    return {
        "accuracy": len(np.unique(patients.patient)),
        "sensitivity": per_class[1] if binary else smallest,
        "specificity": per_class[0] if binary else smallest,
        "balanced_accuracy": smallest,
        "auc": smallest,
    }


def nanmean(values: Iterable[np.ndarray | float]) -> np.ndarray:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    stacked = np.asarray(list(values), float)
    there = np.isfinite(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, stacked, 0).sum(0) / there.sum(0)


def per_patient(cells: Iterable[Cell], n_classes: int) -> PerPatient:
    """Mean score of each patient over images and repeats."""
    cells = list(cells)
    label, patient, image = (np.concatenate([getattr(c.images, n) for c in cells]) for n in ("label", "patient", "row"))
    score = np.concatenate([cell.score for cell in cells])
    unit, inverse = np.unique(patient * n_classes + label, return_inverse=True)
    count = np.bincount(inverse, minlength=len(unit))
    total = np.stack([np.bincount(inverse, score[:, k], len(unit)) for k in range(n_classes)], axis=1)
    first = np.unique(image, return_index=True)[1]
    n_images = np.bincount(inverse[first], minlength=len(unit))
    return PerPatient(unit // n_classes, unit % n_classes, total / count[:, None], n_images, count)
