"""Comparisons of arms: what the difference is, what chance alone would give, which one was declared beforehand.

Every arm is compared with `none` and with `affine` on the folds that both have, synthetic ones also with `repeat-real`.
The printed interval is the wider of two: the patient bootstrap captures patient sampling but not training variability;
the corrected t captures both, but poorly with few folds. The p value that decides is the corrected t. It tests the mean
of the folds' own differences, which is not the pooled difference: folds weigh alike, one without a class is left out,
and an AUC ranks the images of one fold only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan

import numpy as np

from cmrhpc.measure import metrics, statistics
from cmrhpc.names import METRICS
from cmrhpc.report.collect import Cell, Key
from cmrhpc.report.rows import Cells, Evaluator, PerPatient, Row, per_patient, rests_on
from cmrhpc.seeds import derive_seed
from cmrhpc.study import Study, arm_parts, cell_of

BASELINES = ("none", "affine")
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """metric(arm) - metric(versus) on the common folds, as a fraction; NaN where it cannot be computed."""

    key: Key
    versus: str
    metric: str
    primary: bool
    n_left_out: int  # cells of the plan that one of them lacks, or both
    difference: float = nan
    low: float = nan
    high: float = nan
    p_corrected_t: float = nan
    p_mcnemar: float = nan  # of some metrics a permutation, see `_patient_test`; AUC: NaN, see p_delong
    p_delong: float = nan
    p_holm: float = nan  # NaN for the primary comparison, which stands alone
    n_common: int = 0  # cells (folds x repeats) that both have
    n_patients: int = 0
    only_arm_right: int = 0  # patients (McNemar)
    only_versus_right: int = 0
    mean_fold_difference: float = nan  # what p_corrected_t tests
    n_tested: int = 0  # cells whose difference is defined, of which that is the mean

    @property
    def deciding_p(self) -> float:
        """Corrected t; of an exploratory comparison after Holm."""
        return self.p_corrected_t if self.primary else self.p_holm

    @property
    def distinguishable(self) -> bool:
        """Both the deciding p value and the interval speak against no effect."""
        return self.deciding_p < LEVEL and self.excludes_zero and not self.interval_disagrees

    @property
    def excludes_zero(self) -> bool:
        """The interval lies on one side of 0; False where there is none."""
        return self.low > 0 or self.high < 0

    @property
    def interval_disagrees(self) -> bool:
        """The interval and p, neither corrected for how many comparisons there are, say different things.

        So they do too when both speak against no effect, but in opposite directions.
        """
        if not (np.isfinite(self.low) and np.isfinite(self.p_corrected_t)):
            return False
        against = self.p_corrected_t < LEVEL
        opposite = against and self.difference * self.mean_fold_difference < 0
        return bool(against != self.excludes_zero or opposite)


@dataclass(frozen=True, kw_only=True)
class BestRatio:
    """Per fold and repeat the ratio with the best validation result; measured on the test images of that fold."""

    chosen: dict[float, int]  # ratio -> in how many folds x repeats
    reason: str  # why no ratio can be chosen; else empty
    row: Row  # of the chosen cells; its key has no ratio
    versus: Comparison  # of the primary metric, with none, or with affine where the arm has that on top


def compare_all(evaluator: Evaluator, rows: dict[Key, Row]) -> list[Comparison]:
    """Every arm against each of its baselines, for every metric; Holm within a classifier and metric."""
    study = evaluator.collection.study
    primary = primary_key(evaluator)
    found: list[Comparison] = []
    for key in rows:
        for base in _baselines(key, study):
            if base in rows:
                declared = study.primary.metric if primary == (key, base[1]) else ""
                cells = evaluator.collection.cells
                found += _compare(evaluator, rows[key], cells.get(key, {}), rows[base], cells.get(base, {}), declared)

    # Holm over all but the primary comparison.
    corrected: dict[int, float] = {}
    for family in dict.fromkeys((c.key[0], c.metric) for c in found):
        members = [i for i, c in enumerate(found) if (c.key[0], c.metric) == family and not c.primary]
        corrected |= dict(zip(members, statistics.holm([found[i].p_corrected_t for i in members]), strict=True))
    return [replace(c, p_holm=float(corrected.get(i, nan))) for i, c in enumerate(found)]


def _baselines(key: Key, study: Study) -> list[Key]:
    """What an arm is compared with: none, affine, and a synthetic one with as many real images repeated."""
    classifier, arm, ratio = key
    if arm == "none":
        return []
    found = [(classifier, name, 0.0) for name in BASELINES if name != arm]
    parts = arm_parts(arm, study)
    if parts.generator:
        found.append((classifier, "repeat-real+affine" if parts.affine else "repeat-real", ratio))
    return found


def primary_key(evaluator: Evaluator) -> tuple[Key, str]:
    """The (classifier, arm, ratio) of the declared comparison and its baseline, as cells of the plan."""
    study = evaluator.collection.study
    declared = study.primary
    arm, ratio = cell_of(declared.arm, declared.ratio, arm_parts(declared.arm, study))
    versus, _ = cell_of(declared.versus, 0.0, arm_parts(declared.versus, study))
    return (declared.classifier, arm, ratio), versus


def common_cells(a: Cells, b: Cells) -> tuple[Cells, Cells]:
    """The cells that both have with the same test images."""
    same = [k for k in a if k in b and np.array_equal(a[k].images.row, b[k].images.row)]
    return {k: a[k] for k in same}, {k: b[k] for k in same}


def _compare(
    evaluator: Evaluator, one: Row, one_cells: Cells, base: Row, base_cells: Cells, declared: str
) -> list[Comparison]:
    """Every metric of `one` against `base`, rows of the same planned folds and repeats, on the cells that both have."""
    key, versus = one.key, base.key[1]
    a, b = common_cells(one_cells, base_cells)
    left_out = one.n_expected - len(a)
    if not a:
        return [
            Comparison(key=key, versus=versus, metric=m, primary=m == declared, n_left_out=left_out) for m in METRICS
        ]
    whole_a, whole_b = len(a) == len(one_cells), len(b) == len(base_cells)
    pooled_a = one.pooled if one.pooled and whole_a else evaluator.pooled(a)
    pooled_b = base.pooled if base.pooled and whole_b else evaluator.pooled(b)

    # Per cell: what Nadeau-Bengio sees. Share of test to training images over the cells.
    folds = [{(f.repeat, f.fold): f.values for f in row.folds} for row in (one, base)]
    share = float(np.mean([len(cell.score) / max(1, cell.n_train) for cell in a.values()]))

    # Per patient: what McNemar and DeLong see.
    classes = evaluator.n_classes
    units_a, units_b = per_patient(a.values(), classes), per_patient(b.values(), classes)
    label, one_class = units_a.label, len(np.unique(units_a.patient)) == len(units_a.patient)
    delong = nan  # of a patient with images of two classes the cases are not independent
    if classes == 2 and one_class:
        delong = statistics.delong(label == 1, *(metrics.class_score(u.score, 1) for u in (units_a, units_b))).p
    seed = derive_seed(evaluator.collection.study.seed, "permutation")
    n = rests_on(units_a, classes)
    found = []
    for metric in METRICS:
        difference = pooled_a.values[metric] - pooled_b.values[metric]
        by_fold = [folds[0][k][metric] - folds[1][k][metric] for k in sorted(a)]
        test = statistics.corrected_t(by_fold, share)
        defined, low, high = bool(np.isfinite(difference)), nan, nan
        if defined:
            low, high = _wider(difference, test, pooled_a.drawn[metric] - pooled_b.drawn[metric], n[metric])
        p, only_a, only_b = _patient_test(metric, units_a, units_b, classes, seed)
        found.append(
            Comparison(
                key=key,
                versus=versus,
                metric=metric,
                difference=difference,
                low=low,
                high=high,
                p_corrected_t=test.p if defined else nan,
                p_mcnemar=p if defined else nan,
                p_delong=delong if defined and metric == "auc" else nan,
                primary=metric == declared,
                n_common=len(a),
                n_left_out=left_out,
                n_patients=len(np.unique(units_a.patient)),
                only_arm_right=only_a,
                only_versus_right=only_b,
                mean_fold_difference=test.mean,
                n_tested=int(np.isfinite(by_fold).sum()),
            )
        )
    return found


def _wider(difference: float, test: statistics.TTest, drawn: np.ndarray, n_patients: int) -> tuple[float, float]:
    """The outer limits of the bootstrap interval and of the corrected t interval about the pooled difference.

    drawn: the difference in every resample; n_patients: that the metric rests on. NaN where neither finds any spread.
    """
    low, high = statistics.interval(drawn, n_patients)
    if np.isfinite(test.low):
        low, high = np.fmin(low, test.low + difference - test.mean), np.fmax(high, test.high + difference - test.mean)
    if statistics.blind(low, high):
        return nan, nan
    limits = np.clip([low, high], -1, 1)  # with few folds the t interval reaches beyond any difference
    low, high = np.where(np.abs(limits) < 1e-12, 0, limits)  # what rounding leaves of 0 does not exclude it
    return float(low), float(high)


def _patient_test(
    metric: str, units_a: PerPatient, units_b: PerPatient, n_classes: int, seed: int
) -> tuple[float, int, int]:
    """McNemar on the patients that a rate counts; a mean of rates has no 2 x 2 table and is permuted instead.

    So is accuracy where a patient has images of two classes, and counts twice: all of a patient is swapped together.
    """
    right_a, right_b, label, binary = units_a.right, units_b.right, units_a.label, n_classes == 2
    patients, owner = np.unique(units_a.patient, return_inverse=True)
    weight = np.ones(len(label))
    if binary and metric in ("sensitivity", "specificity"):
        of_class = label == (1 if metric == "sensitivity" else 0)
        return statistics.mcnemar(right_a[of_class], right_b[of_class])
    if metric == "accuracy" and len(patients) == len(label):
        return statistics.mcnemar(right_a, right_b)
    if metric in ("balanced_accuracy", "sensitivity"):
        weight = 1 / (n_classes * np.bincount(label, minlength=n_classes)[label])
    elif metric != "accuracy":
        return nan, 0, 0
    adds = np.bincount(owner, (right_a.astype(float) - right_b) * weight)
    return statistics.permutation(adds, seed), int((adds > 0).sum()), int((adds < 0).sum())


def best_ratios(evaluator: Evaluator, rows: dict[Key, Row]) -> list[BestRatio]:
    """For every arm with several ratios: in each fold and repeat the ratio that did best on validation patients.

    Best: highest value of the primary metric on the validation images, where these define it; among equals the lower
    validation cross-entropy, then the smaller ratio. The test images take no part in the choice, and a fold's choice
    sees training patients of that fold only.
    """
    collection = evaluator.collection
    metric = collection.study.primary.metric
    found = []
    for classifier in collection.study.classifiers:
        for arm in collection.study.arms:
            if len(arm.ratios) < 2:
                continue
            parts = arm_parts(arm.name, collection.study)
            wanted = BASELINES[::-1] if parts.affine else BASELINES  # else the sweep were credited with affine
            base = next((classifier, name, 0.0) for name in wanted if (classifier, name, 0.0) in rows)
            keys = {ratio: (classifier, *cell_of(arm.name, ratio, parts)) for ratio in sorted(arm.ratios)}
            columns = {ratio: collection.cells.get(key, {}) for ratio, key in keys.items()}
            everywhere = set.intersection(*(set(c) for c in columns.values()))
            usable = [k for k in sorted(everywhere) if all(len(c[k].validation_label) for c in columns.values())]
            best = {k: min(_validation_rank(c[k], r, metric) for r, c in columns.items())[-1] for k in usable}
            cells = {k: columns[r][k] for k, r in best.items()}
            planned = max(evaluator.expected[key] for key in keys.values())
            row = evaluator.row_of((classifier, arm.name, nan), cells, planned - len(cells))
            compared = _compare(evaluator, row, cells, rows[base], collection.cells.get(base, {}), "")
            versus = next(c for c in compared if c.metric == metric)
            chosen = {r: sum(b == r for b in best.values()) for r in columns}
            found.append(BestRatio(chosen=chosen, reason="" if cells else _why_none(columns), row=row, versus=versus))
    return found


def _why_none(columns: dict[float, Cells]) -> str:
    """Why no fold and repeat can tell the best ratio."""
    lost = [f"{ratio:g}" for ratio, cells in columns.items() if not cells]
    if lost:
        return f"no cell of ratio {', '.join(lost)}"
    return "no fold and repeat has all ratios with validation scores"


def _validation_rank(cell: Cell, ratio: float, metric: str) -> tuple[float, float, float]:
    """Smaller is better."""
    label, score = cell.validation_label, cell.validation_score
    value = metrics.measure(label, score)[metric]
    loss = float(-np.log(np.clip(score[np.arange(len(label)), label], 1e-12, 1)).mean())
    return -value if np.isfinite(value) else 0.0, loss, ratio
