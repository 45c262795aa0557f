"""Comparisons of arms: what the difference is, what chance alone would give, which one was declared beforehand.

Every arm is compared with `none` and with `affine` on the folds that both have. The printed interval is the wider of
two: the patient-clustered bootstrap sees which patients were drawn and not how training went; the corrected
resampled t sees both, but poorly when folds are few. The p value that decides is the corrected t. It tests the mean of
the folds' own differences, which is not the pooled difference: folds weigh alike, one without a class is left out, and
an AUC ranks the images of one fold only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cmrhpc.measure import metrics, statistics
from cmrhpc.measure.metrics import METRICS
from cmrhpc.report.collect import Cell, Key
from cmrhpc.report.evaluate import Cells, Evaluator, Pooled, Row, per_patient, rests_on
from cmrhpc.seeds import derive_seed
from cmrhpc.study import arm_parts, cell_of

BASELINES = ("none", "affine")
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """metric(arm) - metric(versus) on the common folds, as a fraction; NaN where it cannot be computed."""

    key: Key
    versus: str
    metric: str
    difference: float
    low: float
    high: float
    p_corrected_t: float
    p_mcnemar: float  # balanced accuracy: patient-wise permutation; AUC: NaN, see p_delong
    p_delong: float
    p_holm: float  # NaN for the primary comparison, which stands alone
    primary: bool
    n_common: int  # cells (folds x repeats) that both have
    n_left_out: int  # cells that only one of them has
    n_patients: int
    only_arm_right: int  # patients (McNemar)
    only_versus_right: int
    mean_fold_difference: float = float("nan")  # what p_corrected_t tests
    n_tested: int = 0  # cells whose difference is defined, of which that is the mean

    @property
    def deciding_p(self) -> float:
        """Corrected t; of an exploratory comparison after Holm."""
        return self.p_corrected_t if self.primary else self.p_holm

    @property
    def distinguishable(self) -> bool:
        """Both the deciding p value and the interval speak against no effect."""
        return self.deciding_p < LEVEL and self.excludes_zero

    @property
    def excludes_zero(self) -> bool:
        """The interval lies on one side of 0; False where there is none."""
        return self.low > 0 or self.high < 0

    @property
    def interval_disagrees(self) -> bool:
        """The interval and p, neither corrected for how many comparisons there are, say different things."""
        both = np.isfinite(self.low) and np.isfinite(self.p_corrected_t)
        return bool(both and (self.p_corrected_t < LEVEL) != self.excludes_zero)


@dataclass(frozen=True)
class BestRatio:
    """Per fold and repeat the ratio with the best validation result; measured on the test images of that fold."""

    classifier: str
    arm: str
    chosen: dict[float, int]  # ratio -> in how many folds x repeats
    pooled: Pooled
    n_common: int
    n_left_out: int


def compare_all(evaluator: Evaluator, rows: dict[Key, Row]) -> list[Comparison]:
    """Every arm against none and against affine, for every metric; Holm within a classifier and metric."""
    study = evaluator.collection.study
    primary = primary_key(evaluator)
    found: list[Comparison] = []
    for key in rows:
        for versus in BASELINES:
            base = (key[0], versus, 0.0)
            if base in rows and key != base and key[1] != "none":
                declared = study.primary.metric if primary == (key, versus) else ""
                found += _compare(evaluator, rows, key, versus, declared)

    # Holm over all but the primary comparison.
    corrected: dict[int, float] = {}
    for family in dict.fromkeys((c.key[0], c.metric) for c in found):
        members = [i for i, c in enumerate(found) if (c.key[0], c.metric) == family and not c.primary]
        corrected |= dict(zip(members, statistics.holm([found[i].p_corrected_t for i in members]), strict=True))
    return [replace(c, p_holm=float(corrected.get(i, np.nan))) for i, c in enumerate(found)]


def primary_key(evaluator: Evaluator) -> tuple[Key, str]:
    """The (classifier, arm, ratio) of the declared comparison and its baseline, as cells of the plan."""
    study = evaluator.collection.study
    declared = study.primary
    arm, ratio = cell_of(declared.arm, declared.ratio, arm_parts(declared.arm, study))
    versus, _ = cell_of(declared.versus, 0.0, arm_parts(declared.versus, study))
    return (declared.classifier, arm, ratio), versus


def common_cells(a: Cells, b: Cells) -> tuple[Cells, Cells, int]:
    """The cells that both have with the same test images, and how many are left out."""
    same = [k for k in a if k in b and np.array_equal(a[k].images.row, b[k].images.row)]
    return {k: a[k] for k in same}, {k: b[k] for k in same}, len(a.keys() | b.keys()) - len(same)


def _compare(evaluator: Evaluator, rows: dict[Key, Row], key: Key, versus: str, declared: str) -> list[Comparison]:
    cells = evaluator.collection.cells
    base = (key[0], versus, 0.0)
    a, b, left_out = common_cells(cells.get(key, {}), cells.get(base, {}))
    nan = float("nan")
    if not a:
        return [
            Comparison(key, versus, m, nan, nan, nan, nan, nan, nan, nan, m == declared, 0, left_out, 0, 0, 0)
            for m in METRICS
        ]
    whole_a, whole_b = len(a) == len(cells[key]), len(b) == len(cells[base])
    pooled_a = Pooled(_values(rows[key]), rows[key].drawn, []) if whole_a else evaluator.pooled(a)
    pooled_b = Pooled(_values(rows[base]), rows[base].drawn, []) if whole_b else evaluator.pooled(b)

    # Per cell: what Nadeau-Bengio sees. Share of test to training images over the cells.
    folds = [{(f.repeat, f.fold): f.values for f in row.folds} for row in (rows[key], rows[base])]
    share = float(np.mean([len(cell.score) / max(1, cell.n_train) for cell in a.values()]))

    # Per patient: what McNemar and DeLong see.
    classes = evaluator.n_classes
    units_a, units_b = per_patient(a.values(), classes), per_patient(b.values(), classes)
    right_a, right_b, label = units_a.right, units_b.right, units_a.label
    delong = statistics.delong(label == 1, units_a.score[:, 1], units_b.score[:, 1]).p if classes == 2 else nan
    seed = derive_seed(evaluator.collection.study.seed, "permutation")
    n = rests_on(units_a, classes)
    found = []
    for metric in METRICS:
        difference = pooled_a.values[metric] - pooled_b.values[metric]
        by_fold = [folds[0][k][metric] - folds[1][k][metric] for k in sorted(a)]
        test = statistics.corrected_t(by_fold, share)
        low, high = _wider(difference, test, pooled_a, pooled_b, metric, n[metric])
        p, only_a, only_b = _patient_test(metric, right_a, right_b, label, classes, seed)
        found.append(
            Comparison(
                key,
                versus,
                metric,
                difference,
                low,
                high,
                test.p if np.isfinite(difference) else nan,
                p,
                delong if metric == "auc" else nan,
                nan,
                metric == declared,
                len(a),
                left_out,
                len(np.unique(units_a.patient)),
                only_a,
                only_b,
                test.mean,
                int(np.isfinite(by_fold).sum()),
            )
        )
    return found


def _values(row: Row) -> dict[str, float]:
    return {name: figure.value for name, figure in row.figures.items()}


def _wider(
    difference: float, test: statistics.TTest, a: Pooled, b: Pooled, metric: str, n_patients: int
) -> tuple[float, float]:
    """The outer limits of the bootstrap interval and of the corrected t interval about the pooled difference.

    n_patients: patients that the metric rests on. NaN where neither finds any spread.
    """
    if not np.isfinite(difference):
        return float("nan"), float("nan")
    low, high = statistics.interval(a.drawn[metric] - b.drawn[metric], n_patients)
    if np.isfinite(test.low):
        low, high = np.fmin(low, test.low + difference - test.mean), np.fmax(high, test.high + difference - test.mean)
    if statistics.blind(low, high):
        return float("nan"), float("nan")
    low, high = np.clip([low, high], -1, 1)  # with few folds the t interval reaches beyond any difference
    return float(low), float(high)


def _patient_test(
    metric: str, right_a: np.ndarray, right_b: np.ndarray, label: np.ndarray, n_classes: int, seed: int
) -> tuple[float, int, int]:
    """McNemar on the patients that a rate counts; a mean of rates has no 2 x 2 table and is permuted instead."""
    binary = n_classes == 2
    if metric == "accuracy":
        return statistics.mcnemar(right_a, right_b)
    if binary and metric in ("sensitivity", "specificity"):
        of_class = label == (1 if metric == "sensitivity" else 0)
        return statistics.mcnemar(right_a[of_class], right_b[of_class])
    if metric == "balanced_accuracy" or (metric == "sensitivity" and not binary):
        per_class = np.bincount(label, minlength=n_classes)
        adds = (right_a.astype(float) - right_b) / (n_classes * per_class[label])
        return statistics.permutation(adds, seed), int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    return float("nan"), 0, 0


def best_ratios(evaluator: Evaluator) -> list[BestRatio]:
    """For every arm with several ratios: in each fold and repeat the ratio that did best on validation patients.

    Best: highest validation accuracy, among equals the lower validation cross-entropy, then the smaller ratio. The
    test images take no part in the choice, and a fold's choice sees training patients of that fold only.
    """
    collection = evaluator.collection
    found = []
    for classifier in collection.study.classifiers:
        for arm in collection.study.arms:
            parts = arm_parts(arm.name, collection.study)
            columns: dict[float, Cells] = {}
            for ratio in sorted(arm.ratios):
                columns[ratio] = collection.cells.get((classifier, *cell_of(arm.name, ratio, parts)), {})
            everywhere = set.intersection(*(set(c) for c in columns.values()))
            usable = [k for k in sorted(everywhere) if all(len(c[k].validation_label) for c in columns.values())]
            if len(columns) < 2 or not usable:
                continue
            best = {k: min((_validation_rank(c[k], r) for r, c in columns.items()))[-1] for k in usable}
            chosen = {r: sum(b == r for b in best.values()) for r in columns}
            pooled = evaluator.pooled({k: columns[r][k] for k, r in best.items()})
            left_out = len(set.union(*(set(c) for c in columns.values()))) - len(usable)
            found.append(BestRatio(classifier, arm.name, chosen, pooled, len(usable), left_out))
    return found


def _validation_rank(cell: Cell, ratio: float) -> tuple[float, float, float]:
    """Smaller is better."""
    label, score = cell.validation_label, cell.validation_score
    accuracy = float((metrics.predicted_class(score) == label).mean())
    loss = float(-np.log(np.clip(score[np.arange(len(label)), label], 1e-12, 1)).mean())
    return -accuracy, loss, ratio
