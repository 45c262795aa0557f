"""Comparisons on common folds, the one primary, and Holm."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from cmrhpc import planning
from cmrhpc.measure import statistics
from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.collect import collect
from cmrhpc.report.compare import _wider, compare_all
from cmrhpc.report.csvfiles import comparison_details_csv
from cmrhpc.report.result import evaluate, verdict
from cmrhpc.report.rows import Evaluator
from cmrhpc.report.tables import best_lines, comparison_lines, table_md
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
    expected, sizes = [], []
    for repeat in range(2):
        common = [f for f in range(3) if (repeat, f) in cells["resnet50", "dae-gan", 3.0]]
        accuracy = []
        for key in (("resnet50", "dae-gan", 3.0), ("resnet50", "none", 0.0)):
            label = np.concatenate([cells[key][repeat, f].images.label for f in common])
            accuracy.append((np.concatenate([cells[key][repeat, f].score.argmax(1) for f in common]) == label).mean())
        expected.append(accuracy[0] - accuracy[1])
        sizes.append(len(label))
    assert found.difference == pytest.approx(np.average(expected, weights=sizes), abs=1e-12)
    plain = (
        result.rows[found.key].figures["accuracy"].value
        - result.rows["resnet50", "none", 0.0].figures["accuracy"].value
    )
    assert found.difference != pytest.approx(plain, abs=1e-6)
    assert "on 5 of 6 cells (fold and repeat), which both arms have, of 24 patients" in result.answer


def test_a_cell_that_both_arms_lack_is_left_out_as_well(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:1,3")
    one = made.cohort(study)
    gone = {("none", 1, 2), ("dae-gan", 1, 2), ("dae-gan", 0, 0)}
    scores = made.noisy_scores(one.label, 2, {})
    made.write(tmp_path, study, one, scores, skip=lambda t: (t.arm, t.repeat, t.fold) in gone)
    result = evaluate(collect(tmp_path))
    assert (result.primary.n_common, result.primary.n_left_out) == (4, 2)
    assert "on 4 of 6 cells" in result.answer
    assert {line[9] for line in comparison_lines(result)} == {"4 of 6 cells"}
    assert [line[-1] for line in best_lines(result)] == ["4 of 6 cells"]


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
    """6 of 30 tested patients are normal: the bootstrap interval of specificity is widened for 6, as in a row.

    One fold alone, so that there is no t interval beside it.
    """
    study = made.study(arms="none affine dae-gan:3", k=2)
    one = made.cohort(study, patients=(12, 48))
    scores = made.noisy_scores(one.label, 2, {})
    made.write(tmp_path, study, one, scores, skip=lambda task: (task.repeat, task.fold) != (0, 0))
    evaluator = Evaluator(collect(tmp_path))
    rows = {key: evaluator.row(key) for key in evaluator.collection.keys}
    for metric, n in (("accuracy", 30), ("sensitivity", 24), ("specificity", 6), ("balanced_accuracy", 6), ("auc", 6)):
        for c in (c for c in compare_all(evaluator, rows) if c.metric == metric):
            drawn = rows[c.key].pooled.drawn[metric] - rows["resnet50", c.versus, 0.0].pooled.drawn[metric]
            assert (c.low, c.high) == pytest.approx(np.clip(statistics.interval(drawn, n), -1, 1).tolist(), abs=1e-12)


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
    # Both against no effect, in opposite directions: neither better nor worse.
    assert verdict(replace(primary, p_corrected_t=0.01, mean_fold_difference=-0.1)).endswith("no effect: worse")
    turned = verdict(replace(primary, p_corrected_t=0.01, mean_fold_difference=0.1))
    assert turned == "not distinguishable from no effect; interval and p disagree"
    lines = list(csv.DictReader(comparison_details_csv(result).splitlines()))
    told = next(line for line in lines if line["role"] == "primary")
    assert (float(told["mean_fold_difference"]), told["n_tested"]) == (pytest.approx(0, abs=1e-12), "10")


def test_what_rounding_leaves_of_a_limit_of_0_does_not_exclude_0() -> None:
    test = statistics.corrected_t([0.1], 0.25)  # one fold: no t interval beside the bootstrap
    low, high = _wider(0.1, test, np.r_[np.full(1000, 5e-17), np.full(1000, 0.2)], 40)
    assert (low, high) == (0.0, 0.2)


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
    result = evaluate(collect(tmp_path))
    found = result.comparisons
    by_chance = [c for c in found if c.excludes_zero and not c.primary and c.p_corrected_t < 0.05 <= c.p_holm]
    assert by_chance
    assert not any(c.distinguishable for c in by_chance)
    assert all(c.deciding_p == c.p_holm for c in by_chance)
    assert "an interval without 0 may stand beside the reading that an exploratory difference" in table_md(result)
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


def test_synthetic_images_are_compared_with_as_many_real_ones_repeated(tmp_path: Path) -> None:
    """Repeating helps as much as dae-gan does: against none it seems to help, against repeat-real it does not."""
    arms = "none affine repeat-real:1,3 repeat-real+affine:3 dae-gan:3 dae-gan+affine:1,3 dae-gan+simgan:4"
    study = made.study(arms=arms)
    one = made.cohort(study)
    right, weak = np.eye(2)[one.label] * 0.8 + 0.1, np.tile([0.2, 0.8], (len(one.label), 1))
    helped = ("repeat-real", "dae-gan")
    made.write(tmp_path, study, one, lambda task, rows: (right if task.arm in helped else weak)[rows])
    found = [c for c in evaluate(collect(tmp_path)).comparisons if c.metric == "accuracy"]
    control = {(c.key[1], c.key[2], c.versus): c.difference for c in found if c.versus.startswith("repeat-real")}
    assert set(control) == {("dae-gan", 3.0, "repeat-real"), ("dae-gan+affine", 3.0, "repeat-real+affine")}
    assert control["dae-gan", 3.0, "repeat-real"] == 0
    (primary,) = (c for c in found if c.primary)
    assert (primary.key[1], primary.versus) == ("dae-gan", "none")
    assert primary.difference > 0.2
    words = "Synthetic images are compared with repeat-real too, at the same ratio."
    assert words in table_md(evaluate(collect(tmp_path)))
    # One Holm family over all but the primary.
    exploratory = [c for c in found if not c.primary]
    adjusted = statistics.holm([c.p_corrected_t for c in exploratory])
    np.testing.assert_array_equal([c.p_holm for c in exploratory], adjusted)
    assert len(exploratory) == 16


def test_a_patient_with_images_of_both_classes_is_one_patient_in_every_test(tmp_path: Path) -> None:
    """24 patients with one image of each class; only the arm dae-gan reads both images of 6 of them rightly.

    The swap of a patient moves both images: of 2^6 swaps 2 are as far from 0 as what was found, not 2 of 2^12.
    """
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(12, 12), images=1)
    one.patient, one.label = np.repeat(one.patient, 2), np.tile([0, 1], 24)
    one.split = {place: tuple(np.repeat(mask, 2) for mask in masks) for place, masks in one.split.items()}
    one.ids = np.array([f"r{i + 1:06d}" for i in range(48)])
    made.write(
        tmp_path,
        study,
        one,
        lambda task, rows: np.eye(2)[
            np.where((rows < 12) & (task.arm == "none"), 1 - one.label[rows], one.label[rows])
        ],
    )
    found = {c.metric: c for c in evaluate(collect(tmp_path)).comparisons}
    for metric, p in (("accuracy", 2 / 2**6), ("balanced_accuracy", 2 / 2**6), ("sensitivity", 2 / 2**6)):
        assert found[metric].p_mcnemar == pytest.approx(p, abs=1e-12)
        assert (found[metric].only_arm_right, found[metric].only_versus_right) == (6, 0)
        assert found[metric].n_patients == 24
    assert math.isnan(found["auc"].p_delong)
    assert math.isfinite(found["auc"].difference)


def test_patients_of_a_rate_are_those_of_its_class(tmp_path: Path) -> None:
    """The arm dae-gan reads 7 diseased patients better than none, and every normal one alike."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(10, 14), images=1)
    better = np.flatnonzero(one.label == 1)[:7]

    def scores(task: planning.Task, rows: np.ndarray) -> np.ndarray:
        wrong = np.isin(rows, better) & (task.arm == "none")
        return np.eye(2)[np.where(wrong, 1 - one.label[rows], one.label[rows])]

    made.write(tmp_path, study, one, scores)
    found = {c.metric: c for c in evaluate(collect(tmp_path)).comparisons}
    assert (found["sensitivity"].only_arm_right, found["sensitivity"].only_versus_right) == (7, 0)
    assert found["sensitivity"].p_mcnemar == pytest.approx(stats.binomtest(0, 7).pvalue)
    assert (found["specificity"].only_arm_right, found["specificity"].only_versus_right) == (0, 0)
    assert found["specificity"].p_mcnemar == 1.0


def test_the_interval_of_t_is_moved_to_the_pooled_difference() -> None:
    """Folds of unequal size: the mean of their differences is not the pooled one."""
    test = statistics.corrected_t([0.3, 0.1, 0.2, 0.05], 0.25)
    low, high = _wider(0.12, test, np.zeros(50), 20)
    assert (low, high) == pytest.approx((test.low - test.mean + 0.12, test.high - test.mean + 0.12))


def test_a_difference_that_is_undefined_has_no_p(tmp_path: Path) -> None:
    """All patients diseased: balanced accuracy is undefined, though patients differ."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(0, 24))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {"none": 0.1, "dae-gan": 2.0}))
    found = {c.metric: c for c in evaluate(collect(tmp_path)).comparisons}
    assert 0 < found["accuracy"].p_mcnemar < 1
    undefined = found["balanced_accuracy"]
    assert math.isnan(undefined.difference)
    assert all(math.isnan(p) for p in (undefined.p_corrected_t, undefined.p_mcnemar, undefined.p_delong))


def test_a_primary_that_was_not_computed_has_no_answer(tmp_path: Path) -> None:
    study = made.study()
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}), lambda t: (t.arm, t.ratio) == ("dae-gan", 3))
    result = evaluate(collect(tmp_path))
    assert result.answer == "ratio 3 of dae-gan: no answer, no fold has both arms yet."
    assert result.rows["resnet50", "dae-gan", 3.0].n_missing == 6


def test_the_primary_metric_is_drawn_as_well_as_accuracy(tmp_path: Path) -> None:
    """Specificity is undefined in some folds; its figures are drawn all the same."""
    study = made.study(primary='arm = "dae-gan"\nratio = 3\nmetric = "specificity"', k=5)
    one = made.cohort(study, patients=(3, 12))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    page = (aggregate(tmp_path).folder / "index.html").read_text()
    names = {path.name for path in (tmp_path / "report" / "figures").glob("*.png")}
    for kind in ("ratio_curve", "folds"):
        assert {f"{kind}.png", f"{kind}_specificity.png"} <= names
    assert {"accuracy.png", "specificity.png"} <= names
    headings = [page.index(f"<h3>{title}</h3>") for title in ("Specificity per arm", "Accuracy per arm")]
    assert headings == sorted(headings)
    assert "<h3>Fold by fold: specificity</h3>" in page
