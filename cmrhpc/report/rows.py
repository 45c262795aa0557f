"""Collected predictions -> every number of the report, computed once; tables, figures and page only print them.

A metric is the mean over repeats of the value pooled over a repeat's folds. A repeat with missing folds is weighted by
what the metric counts there: its test images, for sensitivity the positive and for specificity the negative ones. All
intervals of a row and all differences use the same resampled patients, so that arms stay paired.
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
RATES = ("precision", "recall", "f1")  # of a class


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
class Pooled:
    """The metrics of a set of cells, pooled over folds and repeats, and their bootstrap draws."""

    values: dict[str, float]
    drawn: dict[str, np.ndarray]  # metric -> (draws,)
    by_patient: np.ndarray  # (P, K, K) confusion counts of each patient, all repeats together: true x predicted class


@dataclass(frozen=True, kw_only=True)
class Row:
    """One classifier, arm and ratio."""

    key: Key
    figures: dict[str, Figure]
    counts: np.ndarray  # (K, K) confusion counts, mean over repeats: true class x predicted class
    per_class: dict[str, list[Figure]]  # `Evaluator.class_rates` (K,), of the counts of all repeats together
    folds: list[Fold]
    n_folds: int
    n_repeats: int
    n_missing: int
    patients: PerPatient | None  # None when no cell is there
    pooled: Pooled | None = field(repr=False)

    @property
    def n_expected(self) -> int:
        return len(self.folds) + self.n_missing


class Evaluator:
    """Measures cells with one set of resampled patients."""

    def __init__(self, collection: Collection):
        self.collection = collection
        self.n_classes = len(collection.study.classes)
        # Per class: with two classes the recalls, which are sensitivity and specificity, say it all.
        self.class_rates = ("recall",) if self.n_classes == 2 else RATES
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
            return Row(
                key=key,
                figures={name: Figure(float("nan")) for name in METRICS},
                counts=np.full((self.n_classes,) * 2, np.nan),
                per_class={name: [Figure(float("nan"))] * self.n_classes for name in self.class_rates},
                folds=[],
                n_folds=0,
                n_repeats=0,
                n_missing=n_missing,
                patients=None,
                pooled=None,
            )
        pooled = self.pooled(cells)
        patients = per_patient(cells.values(), self.n_classes)
        per_class = self._per_class(pooled)
        n_repeats = len({repeat for repeat, _ in cells})
        return Row(
            key=key,
            figures=_figures(pooled, per_class["recall"], rests_on(patients, self.n_classes)),
            counts=pooled.by_patient.sum(0) / n_repeats,
            per_class=per_class,
            folds=[self._fold(cell) for _, cell in sorted(cells.items())],
            n_folds=len({fold for _, fold in cells}),
            n_repeats=n_repeats,
            n_missing=n_missing,
            patients=patients,
            pooled=pooled,
        )

    def _fold(self, cell: Cell) -> Fold:
        values = metrics.measure(cell.images.label, cell.score)
        n_patients = len(np.unique(cell.images.patient))
        return Fold(cell.task.repeat, cell.task.fold, len(cell.score), n_patients, values, cell.best_step)

    def pooled(self, cells: Cells) -> Pooled:
        """Values and bootstrap draws of a set of cells; the accuracy identity is asserted for every repeat and for all.

        A rate is that of the counts of all repeats together: where none lacks folds, the mean over repeats.
        """
        k, n_patients = self.n_classes, self.weights.shape[1]
        by_patient = np.zeros((n_patients, k, k), np.int64)
        aucs, drawn_aucs, sizes = [], [], []
        for repeat in sorted({repeat for repeat, _ in cells}):
            here = [cell for (r, _), cell in sorted(cells.items()) if r == repeat]
            label, patient = (np.concatenate([getattr(c.images, n) for c in here]) for n in ("label", "patient"))
            score = np.concatenate([cell.score for cell in here])
            auc = metrics.measure(label, score)["auc"]
            flat = (patient * k + label) * k + metrics.predicted_class(score)
            by_patient += np.bincount(flat, minlength=by_patient.size).reshape(by_patient.shape)
            if np.isfinite(auc):  # a repeat that lacks a class has none, and so no part in the mean
                aucs.append(auc)
                drawn_aucs.append(metrics.class_auc(label, score, patient, self.weights))
                sizes.append(len(label))
        counts = by_patient.sum(0)
        metrics.check_identity(counts)
        values = {name: float(value) for name, value in metrics.rates(counts).items()} | {"auc": float("nan")}
        drawn = metrics.rates(self._drawn_counts(by_patient))
        if aucs:
            weights = np.array(sizes) / max(sizes)  # whole repeats weigh 1, exactly
            values["auc"] = float(np.average(aucs, weights=weights))
            drawn["auc"] = np.average(drawn_aucs, axis=0, weights=weights)
        return Pooled(values, drawn, by_patient)

    def _drawn_counts(self, by_patient: np.ndarray) -> np.ndarray:
        """Confusion counts (draws, K, K) of every resample of patients."""
        flat = by_patient.reshape(len(by_patient), -1)
        return (self.weights @ flat).reshape(-1, *by_patient.shape[1:])

    def _per_class(self, pooled: Pooled) -> dict[str, list[Figure]]:
        """The rates of each class with their intervals.

        A recall rests on the patients of the class, a precision on those with an image that is called so.
        """
        values = metrics.per_class(pooled.by_patient.sum(0))
        drawn = metrics.per_class(self._drawn_counts(pooled.by_patient))
        true, called = ((pooled.by_patient.sum(axis) > 0).sum(0).tolist() for axis in (2, 1))
        found: dict[str, list[Figure]] = {}
        for name in self.class_rates:
            limits, n = bootstrap_limits if name == "f1" else share_limits, called if name == "precision" else true
            every = zip(values[name].tolist(), drawn[name].T, n, strict=True)
            found[name] = [Figure(value, *limits(value, draws, patients)) for value, draws, patients in every]
        return found


def bootstrap_limits(value: float, drawn: np.ndarray, n: int) -> tuple[float, float]:
    """95 % limits of a value that rests on n patients, from its draws; NaN where the bootstrap is blind."""
    low, high = statistics.interval(drawn, n)
    return (float("nan"),) * 2 if statistics.blind(low, high) or not np.isfinite(value) else (low, high)


def share_limits(value: float, drawn: np.ndarray, n: int) -> tuple[float, float]:
    """95 % limits of a share of n patients: the wider of bootstrap and exact ones.

    Near 0 or 1 a bootstrap rests on few patients and is too narrow (of 77, each right with chance 0.95, it covers
    0.89), so the exact limits over patients count too.
    """
    exact = statistics.exact_limits(round(value * n, 9), n) if np.isfinite(value) else (float("nan"),) * 2
    return _wider(bootstrap_limits(value, drawn, n), exact)


def _wider(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """The outer limits; one that is NaN has no part."""
    return float(np.fmin(a[0], b[0])), float(np.fmax(a[1], b[1]))


def _mean_limits(shares: list[Figure]) -> tuple[float, float]:
    """Limits of the mean of shares of different patients by squares and sums; NaN when one is.

    MOVER: Zou and Donner, Statistics in Medicine 27, 2008.
    """
    value, low, high = (np.array([getattr(f, end) for f in shares]) for end in ("value", "low", "high"))
    down, up = (float(np.sqrt((reach**2).sum())) / len(shares) for reach in (value - low, high - value))
    return float(value.mean()) - down, float(value.mean()) + up


def _auc_limits(value: float, n: int) -> tuple[float, float]:
    """Exact limits of an AUC of 1 or 0, which every resample has; NaN otherwise.

    n: pairs of patients, as many as the smaller class has, or half of all patients where some have both classes.

    n pairs of a patient of each class, no patient in two, are independent, and each is ranked rightly with a chance of
    the AUC or less: all are with AUC^n at most. So the limits are those of n of n (Clopper-Pearson).
    """
    return statistics.exact_limits(value * n, n) if value in (0, 1) else (float("nan"),) * 2


def _figures(pooled: Pooled, recall: list[Figure], n: dict[str, int]) -> dict[str, Figure]:
    """Every metric with its 95 % interval. recall: of each class; n: patients that each metric rests on."""
    limits: dict[str, tuple[float, float]] = {}
    binary = len(recall) == 2
    for name in METRICS:
        value, drawn = pooled.values[name], pooled.drawn.get(name, np.full(1, np.nan))
        if name == "accuracy":
            limits[name] = share_limits(value, drawn, n[name])
        elif binary and name in ("sensitivity", "specificity"):
            one = recall[name == "sensitivity"]
            limits[name] = one.low, one.high
        else:
            exact = (float("nan"),) * 2  # of a mean over classes of specificities, which share patients
            if name in ("balanced_accuracy", "sensitivity"):
                exact = _mean_limits(recall)
            elif name == "auc":
                exact = _auc_limits(value, min(n[name], n["accuracy"] // 2))
            limits[name] = _wider(bootstrap_limits(value, drawn, n[name]), exact)
    return {name: Figure(pooled.values[name], *limits[name]) for name in METRICS}


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
