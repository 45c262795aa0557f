"""Comparisons on common folds, the one primary, Holm, best ratio; false positives and power of the whole comparison."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from cmrhpc import plan
from cmrhpc.measure import statistics
from cmrhpc.report.collect import Cell, Collection, Images, collect
from cmrhpc.report.compare import compare_all
from cmrhpc.report.csvfiles import comparison_details_csv
from cmrhpc.report.evaluate import Evaluator
from cmrhpc.report.result import evaluate, verdict
from cmrhpc.report.tables import comparison_lines, table_md
from tests.report import made


def test_a_fold_that_one_arm_lacks_is_left_out_of_both(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)
    made.write(
        tmp_path,
        study,
        one,
        made.noisy_scores(one.label, 2, {}),
        lambda t: t.arm == "dae-gan" and (t.repeat, t.fold) == (1, 2),
    )
    result = evaluate(collect(tmp_path))
    found = result.primary
    assert (found.n_common, found.n_left_out) == (5, 1)
    cells = result.collection.cells
    expected = []
    for repeat in range(2):
        common = [f for f in range(3) if (repeat, f) in cells["resnet50", "dae-gan", 3.0]]
        accuracy = []
        for key in (("resnet50", "dae-gan", 3.0), ("resnet50", "none", 0.0)):
            label = np.concatenate([cells[key][repeat, f].images.label for f in common])
            accuracy.append((np.concatenate([cells[key][repeat, f].score.argmax(1) for f in common]) == label).mean())
        expected.append(accuracy[0] - accuracy[1])
    assert found.difference == pytest.approx(np.mean(expected), abs=1e-12)
    plain = (
        result.rows[found.key].figures["accuracy"].value
        - result.rows["resnet50", "none", 0.0].figures["accuracy"].value
    )
    assert found.difference != pytest.approx(plain, abs=1e-6)
    assert "on the 5 cells (fold and repeat) that both arms have, 1 left out" in result.answer


def test_the_corrected_t_of_a_comparison_is_that_of_its_folds(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {"none": 0.2}))
    result = evaluate(collect(tmp_path))
    folds = [{(f.repeat, f.fold): f.values["accuracy"] for f in result.rows[key].folds} for key in result.rows]
    differences = [folds[1][k] - folds[0][k] for k in sorted(folds[0])]
    shares = [test.sum() / train.sum() for train, _, test in one.split.values()]  # validation images train no weight
    expected = statistics.corrected_t(differences, float(np.mean(shares)))
    assert "validation images are not among them" in table_md(result)
    assert result.primary.p_corrected_t == pytest.approx(expected.p, abs=1e-12)
    assert result.primary.high - result.primary.low >= expected.high - expected.low - 1e-12
    assert result.primary.low <= result.primary.difference <= result.primary.high


def test_an_interval_of_two_folds_is_wide_and_stays_within_what_a_difference_can_be(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3", k=2, repeats=1)
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {"none": 0.2}))
    found = evaluate(collect(tmp_path)).comparisons
    assert all(-1 <= c.low <= c.difference <= c.high <= 1 for c in found)
    assert max(c.high - c.low for c in found) > 0.5


def test_an_interval_of_a_rate_rests_on_the_patients_of_its_class(tmp_path: Path) -> None:
    """6 of 30 patients are normal: the bootstrap interval of specificity is widened for 6, as in the table's rows."""
    study = made.study(arms="none affine dae-gan:3", primary='arm = "dae-gan"\nratio = 3\nmetric = "specificity"')
    one = made.cohort(study, patients=(6, 24))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    evaluator = Evaluator(collect(tmp_path))
    rows = {key: evaluator.row(key) for key in evaluator.collection.keys}
    for metric, n in (("accuracy", 30), ("sensitivity", 24), ("specificity", 6), ("balanced_accuracy", 6), ("auc", 6)):
        for c in (c for c in compare_all(evaluator, rows) if c.metric == metric):
            drawn = rows[c.key].drawn[metric] - rows["resnet50", c.versus, 0.0].drawn[metric]
            low, high = statistics.interval(drawn, n)
            assert c.low <= max(low, -1) + 1e-12
            assert c.high >= min(high, 1) - 1e-12


def offset_scores(one: made.Cohort):
    """In the arm dae-gan every fold ranks its images as none does, but on a scale of its own."""
    base = np.random.default_rng(0).normal(size=len(one.ids)) + 1.2 * one.label

    def scores(task, rows):
        jitter = np.random.default_rng([task.repeat, task.fold]).normal(size=len(rows))
        p = 1 / (1 + np.exp(-(base[rows] + 0.2 * jitter + (task.arm == "dae-gan") * (task.fold - 2) * 1.5)))
        return np.c_[1 - p, p]

    return scores


def test_the_answer_says_what_p_tests_and_that_it_disagrees_with_the_interval(tmp_path: Path) -> None:
    """Every fold's own AUC is the same in both arms, the pooled one is not."""
    study = made.study(arms="none dae-gan:3", k=5, primary='arm = "dae-gan"\nratio = 3\nmetric = "auc"')
    one = made.cohort(study, patients=(30, 60))
    made.write(tmp_path, study, one, offset_scores(one))
    result = evaluate(collect(tmp_path))
    primary = result.primary
    assert primary.high < -0.01
    assert primary.p_corrected_t == 1.0
    assert (primary.mean_fold_difference, primary.n_tested) == (pytest.approx(0, abs=1e-12), 10)
    assert result.answer.endswith(
        "; not distinguishable from no effect; interval and p disagree (p = 1.000); "
        "p tests the mean of the folds' own differences, 0.0 points."
    )
    lines = list(csv.DictReader(comparison_details_csv(result).splitlines()))
    told = next(line for line in lines if line["role"] == "primary")
    assert (float(told["mean_fold_difference"]), told["n_tested"]) == (pytest.approx(0, abs=1e-12), "10")


def test_arms_that_read_every_image_alike_have_no_interval(tmp_path: Path) -> None:
    """A bootstrap that finds no spread is blind: no interval, and not one of width zero."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)
    made.write(tmp_path, study, one, lambda task, rows: np.tile([0.2, 0.8], (len(rows), 1)))
    result = evaluate(collect(tmp_path))
    assert all(math.isnan(c.low) and math.isnan(c.high) and not c.distinguishable for c in result.comparisons)
    assert result.answer == (
        "ratio 3 of dae-gan: 0.0 points accuracy, no interval; not distinguishable from no effect (p = 1.000)."
    )
    assert all(line[5] == "–" for line in comparison_lines(result))


def test_folds_that_all_differ_equally_are_not_called_few(tmp_path: Path) -> None:
    """none reads all images rightly, dae-gan calls all diseased: specificity falls by 100 points in every fold."""
    study = made.study(arms="none dae-gan:3", primary='arm = "dae-gan"\nratio = 3\nmetric = "specificity"')
    one = made.cohort(study)

    def scores(task, rows):
        p = np.where((one.label[rows] == 1) | (task.arm == "dae-gan"), 0.9, 0.1)
        return np.c_[1 - p, p]

    made.write(tmp_path, study, one, scores)
    result = evaluate(collect(tmp_path))
    assert result.answer == (
        "ratio 3 of dae-gan: -100.0 points specificity, no interval; all folds differ equally, no spread to test by."
    )
    assert verdict(replace(result.primary, n_tested=1)) == "no test is possible on so few folds"


def test_one_primary_and_holm_over_the_others_of_a_classifier_and_metric(tmp_path: Path) -> None:
    study = made.study(classifiers="resnet50 xception", primary='arm = "dae-gan"\nratio = 1\nversus = "affine"')
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {"none": 0.1, "dae-gan": 1.5}))
    found = evaluate(collect(tmp_path)).comparisons
    pairs = {(c.key[1], c.key[2], c.versus) for c in found}
    assert pairs == {("affine", 0.0, "none"), *(("dae-gan", r, v) for r in (1.0, 3.0) for v in ("none", "affine"))}
    assert [(c.key, c.versus, c.metric) for c in found if c.primary] == [
        (("resnet50", "dae-gan", 1.0), "affine", "accuracy")
    ]
    for classifier in study.classifiers:
        for metric in ("accuracy", "sensitivity", "specificity", "balanced_accuracy", "auc"):
            family = [c for c in found if (c.key[0], c.metric) == (classifier, metric) and not c.primary]
            assert len(family) == (4 if (classifier, metric) == ("resnet50", "accuracy") else 5)
            adjusted = multipletests([c.p_corrected_t for c in family], method="holm")[1]
            assert [c.p_holm for c in family] == pytest.approx(adjusted.tolist(), abs=1e-12)
            assert all(math.isfinite(c.p_delong) == (metric == "auc") for c in family)
            assert all(math.isfinite(c.p_mcnemar) == (metric != "auc") for c in family)


def test_a_primary_that_was_not_computed_has_no_answer(tmp_path: Path) -> None:
    study = made.study()
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}), lambda t: (t.arm, t.ratio) == ("dae-gan", 3))
    result = evaluate(collect(tmp_path))
    assert result.answer == "ratio 3 of dae-gan: no answer, no fold has both arms yet."
    assert result.rows["resnet50", "dae-gan", 3.0].n_missing == 6


def test_best_ratio_is_chosen_on_validation_and_measured_on_test(tmp_path: Path) -> None:
    """On validation patients ratio 1 is best in repeat 0 and ratio 3 in repeat 1; on test patients it is 3 always."""
    study = made.study()
    one = made.cohort(study)

    def scores(task, rows):
        validation = bool(one.split[task.repeat, task.fold][1][rows].all())
        good = (task.ratio == (1 if task.repeat == 0 else 3)) if validation else task.ratio == 3
        p = np.full(len(rows), 0.9 if good else 0.2)
        return np.where(one.label[rows, None] == 1, np.c_[1 - p, p], np.c_[p, 1 - p])

    made.write(tmp_path, study, one, scores)
    result = evaluate(collect(tmp_path))
    (best,) = result.best
    assert (best.arm, best.chosen, best.n_common) == ("dae-gan", {0.0: 0, 1.0: 3, 3.0: 3}, 6)
    assert best.pooled.values["accuracy"] == pytest.approx(0.5, abs=1e-12)  # repeat 0 is all wrong, repeat 1 all right
    assert result.rows["resnet50", "dae-gan", 3.0].figures["accuracy"].value == 1.0


# ----------------------------------------------------------------------- simulation of the whole comparison


def simulated(seed: int, effect: float) -> Collection:
    """12 normal and 28 diseased patients of 4 near-alike images, 5 folds x 2 repeats, two arms, trained anew each time.

    What the arms differ in by chance: how each training went, and which patients an arm happens to suit. `effect`
    moves the arm dae-gan towards the truth.
    """
    rng = np.random.default_rng(seed)
    study = made.study(arms="none dae-gan:3", k=5, repeats=2, seed=seed)
    of_patient = np.repeat([0, 1], [12, 28])
    patient = np.repeat(np.arange(40), 4)
    label, sign = of_patient[patient], 2 * of_patient[patient] - 1
    hard, suits = rng.normal(0, 0.6, 40), rng.normal(0, 0.5, (2, 40))
    image = rng.normal(0, 0.3, 160)
    cells: dict = {}
    for repeat in range(2):
        fold_of = np.empty(40, int)
        for k in (0, 1):
            own = rng.permutation(np.flatnonzero(of_patient == k))
            fold_of[own] = np.arange(len(own)) % 5
        for fold in range(5):
            rows = np.flatnonzero(fold_of[patient] == fold)
            images = Images(rows, label[rows], patient[rows])
            for a, arm in enumerate(("none", "dae-gan")):
                went = rng.normal(0, 0.2)
                margin = 0.7 + a * effect + went + hard[patient] + suits[a, patient] + image + rng.normal(0, 0.2, 160)
                p = 1 / (1 + np.exp(-(margin * sign)[rows]))
                task = plan.Task("classify", repeat, fold, arm=arm, ratio=3.0 * a, classifier="resnet50")
                nothing = (np.zeros(0, np.int64), np.zeros((0, 2)))
                cell = Cell(task, None, images, np.c_[1 - p, p], 160 - len(rows), *nothing, 0)  # type: ignore[arg-type]
                cells.setdefault(("resnet50", arm, 3.0 * a), {})[repeat, fold] = cell
    names = [f"p{i}" for i in range(40)]
    ids = np.array([f"r{i}".encode() for i in range(160)])
    expected = plan.tasks(study, "classify")
    return Collection(Path(), study, "", expected, cells, {}, {}, [], ids, label, patient, names, [], 0)


def compared(seed: int, effect: float):
    collection = simulated(seed, effect)
    evaluator = Evaluator(collection)
    evaluator.weights = evaluator.weights[:400]
    rows = {key: evaluator.row(key) for key in collection.keys}
    found = compare_all(evaluator, rows)
    primary = next(c for c in found if c.primary)
    folds = [rows[key].folds for key in (primary.key, ("resnet50", "none", 0.0))]
    differences = [a.values["accuracy"] - b.values["accuracy"] for a, b in zip(*folds, strict=True)]
    return primary, np.array(differences), collection


def test_no_effect_is_called_an_effect_no_more_often_than_claimed() -> None:
    """200 studies without effect. Per image, McNemar calls far more than the 5 % it claims."""
    called, naive = [], []
    for seed in range(200):
        primary, _, collection = compared(seed, effect=0.0)
        called.append(primary.distinguishable)
        right = []
        for cells in collection.cells.values():
            right.append(np.concatenate([c.score.argmax(1) == c.images.label for _, c in sorted(cells.items())]))
        naive.append(statistics.mcnemar(*right)[0] < 0.05)
    assert np.mean(called) <= 0.05
    assert np.mean(naive) > 0.3


def test_a_planted_effect_is_found_with_the_power_of_theory() -> None:
    """Power of the corrected t on J nearly independent differences: noncentral t, shrunk by the correction."""
    found, means, spreads, j = [], [], [], 10
    for seed in range(120):
        primary, differences, _ = compared(1000 + seed, effect=1.1)
        found.append(primary.p_corrected_t < 0.05)
        means.append(differences.mean())
        spreads.append(differences.var(ddof=1))
    # Theory: t = T sqrt((1/J) / (1/J + rho)) where T is noncentral with the true variance of the mean.
    shrink = math.sqrt((1 / j) / (1 / j + 0.25))
    centre = np.mean(means) / np.std(means, ddof=1) * math.sqrt(np.var(means, ddof=1) / (np.mean(spreads) / j))
    expected = stats.nct.sf(stats.t.ppf(0.975, j - 1) / shrink, j - 1, centre)
    assert 0.3 < expected < 0.99
    assert np.mean(found) == pytest.approx(expected, abs=0.15)
