"""Rates and their limits against truth that was planted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import betainc

from cmrhpc.measure import statistics
from cmrhpc.names import METRICS
from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.collect import collect
from cmrhpc.report.result import evaluate, figure_text, ratio_arms
from cmrhpc.report.rows import Evaluator, share_limits
from tests.report import made
from tests.report.made import read_csv, visible_text


def planted(tmp_path: Path, right, **options) -> list[dict[str, str]]:
    """table.csv of a study in which `right(task, rows)` says which images are read rightly, with score .9."""
    study = made.study(arms="none dae-gan:3", **options)
    one = made.cohort(study, patients=(10, 10), images=1)

    def scores(task, rows):
        p = np.where(right(task, rows), 0.9, 0.1)
        return np.where(one.label[rows, None] == 1, np.c_[1 - p, p], np.c_[p, 1 - p])

    made.write(tmp_path, study, one, scores)
    aggregate(tmp_path)
    return read_csv(tmp_path / "report" / "table.csv")


def test_planted_truth_comes_out(tmp_path: Path) -> None:
    """none reads 5 of the 20 patients wrongly (2 normal, 3 diseased), dae-gan reads all rightly."""
    wrong = (0, 1, 10, 11, 12)
    none, gan = planted(tmp_path, lambda task, rows: (task.arm != "none") | ~np.isin(rows, wrong))
    assert [float(none[m]) for m in METRICS[:4]] == pytest.approx([0.75, 0.7, 0.8, 0.75], abs=1e-12)
    assert [float(gan[m]) for m in METRICS] == [1.0] * 5
    # All patients right: no resample differs, so the limits are exact ones over 20, 10 and 10 patients.
    assert float(gan["accuracy_low"]) == pytest.approx(0.025 ** (1 / 20), abs=1e-12)
    assert float(gan["sensitivity_low"]) == pytest.approx(0.025 ** (1 / 10), abs=1e-12)
    ten = 0.025 ** (1 / 10)
    assert float(gan["balanced_accuracy_low"]) == pytest.approx(1 - math.hypot(1 - ten, 1 - ten) / 2, abs=1e-12)
    # Ten pairs of patients, all ranked rightly.
    assert float(gan["auc_low"]) == pytest.approx(ten, abs=1e-12)
    assert (gan["balanced_accuracy_high"], gan["auc_high"]) == ("1.0", "1.0")
    comparison = next(c for c in read_csv(tmp_path / "report" / "comparisons.csv") if c["metric"] == "accuracy")
    assert float(comparison["difference"]) == pytest.approx(0.25, abs=1e-12)
    assert float(comparison["p_mcnemar"]) == pytest.approx(2 / 2**5, abs=1e-12)
    assert comparison["p_holm"] == ""
    details = read_csv(tmp_path / "report" / "comparison_details.csv")[0]
    assert (details["role"], details["only_arm_right"], details["only_versus_right"]) == ("primary", "5", "0")


def test_a_rate_next_to_0_or_1_has_no_narrower_interval_than_one_that_is_there(tmp_path: Path) -> None:
    """6 normal patients with 20 images each, one of the 120 called normal: specificity 0.8 % is as good as 0 %."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(6, 24), images=1)
    rows = np.r_[np.repeat(np.arange(6), 20), np.arange(6, 30)]
    one.patient, one.label = one.patient[rows], one.label[rows]
    one.split = {key: tuple(mask[rows] for mask in masks) for key, masks in one.split.items()}
    one.ids = np.array([f"r{i + 1:06d}" for i in range(len(rows))])

    def scores(task, rows):
        p = np.where((rows == 0) & (task.arm == "dae-gan"), 0.1, 0.9)
        return np.c_[1 - p, p]

    made.write(tmp_path, study, one, scores)
    none, gan = evaluate(collect(tmp_path)).rows.values()
    limits = {row.key[1]: {m: (f.low, f.high) for m, f in row.figures.items()} for row in (none, gan)}
    assert none.figures["specificity"].value == 0
    assert gan.figures["specificity"].value == pytest.approx(1 / 120)
    assert limits["none"]["specificity"] == (0.0, pytest.approx(1 - 0.025 ** (1 / 6), abs=1e-12))
    # 0.05 of 6 patients: the tails of Clopper-Pearson between whole numbers.
    low, high = limits["dae-gan"]["specificity"]
    assert high > limits["none"]["specificity"][1]
    assert betainc(0.05 + 1, 6 - 0.05, high) == pytest.approx(0.975, abs=1e-9)
    assert 0 <= low < 1e-12
    # Balanced accuracy: the mean of two rates of different patients, each with its own limits.
    expected = (0.5 - (1 - 0.025 ** (1 / 24)) / 2, 0.5 + (1 - 0.025 ** (1 / 6)) / 2)
    assert limits["none"]["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)
    assert limits["dae-gan"]["balanced_accuracy"][1] > 0.72
    assert figure_text("specificity", gan.figures["specificity"]) == "0.8 (0.0–47.0)"


def test_the_interval_of_a_rate_covers_close_to_1_where_a_bootstrap_does_not() -> None:
    """77 patients of one image, each read rightly with chance 0.95: coverage, summed over all counts."""
    n, p, covered, bootstrap = 77, 0.95, 0.0, 0.0
    for right in range(n + 1):
        drawn = np.random.default_rng(right).binomial(n, right / n, 2000) / n
        low, high = share_limits(right / n, drawn, n)
        chance = stats.binom.pmf(right, n, p)
        covered += chance * (low <= p <= high)
        alone = statistics.interval(drawn, n)
        bootstrap += chance * (alone[0] <= p <= alone[1])
    assert bootstrap < 0.93
    assert covered >= 0.95


def test_equal_scores_count_as_the_negative_class(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)
    made.write(tmp_path, study, one, lambda task, rows: np.full((len(rows), 2), 0.5))
    result = aggregate(tmp_path)
    for row in read_csv(tmp_path / "report" / "table.csv"):
        assert [float(row[m]) for m in METRICS[1:]] == [0.0, 1.0, 0.5, 0.5]
    assert "0.0 points accuracy" in result.result.answer
    assert "not distinguishable from no effect (p = 1.000)" in result.result.answer


def test_one_class_folds_leave_blanks_and_the_pooled_value_whole(tmp_path: Path) -> None:
    """Three normal patients in five folds: in some folds nobody is normal."""
    study = made.study(arms="none dae-gan:3", k=5)
    one = made.cohort(study, patients=(3, 12))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    result = aggregate(tmp_path)
    folds = read_csv(tmp_path / "report" / "folds.csv")
    blank = [f for f in folds if f["specificity"] == ""]
    assert len(blank) == 2 * 2 * 2
    assert all(f["auc"] == f["balanced_accuracy"] == "" and f["sensitivity"] == f["accuracy"] for f in blank)
    assert all(row["specificity"] for row in read_csv(tmp_path / "report" / "table.csv"))
    assert any("Only 3 patients of class normal" in w for w in result.result.warnings)


def test_a_cohort_of_one_class_has_no_specificity(tmp_path: Path) -> None:
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study, patients=(0, 12))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    aggregate(tmp_path)
    row = read_csv(tmp_path / "report" / "table.csv")[0]
    assert (row["specificity"], row["balanced_accuracy"], row["auc"]) == ("", "", "")
    assert row["sensitivity"] == row["accuracy"] != ""


def test_a_repeat_with_missing_folds_is_weighted_by_what_a_metric_counts_there(tmp_path: Path) -> None:
    """Repeat 0 is whole and all right, of repeat 1 one fold is there and all wrong."""
    study = made.study(arms="none dae-gan:3")
    one = made.cohort(study)

    def scores(task, rows):
        return np.eye(2)[one.label[rows] if task.repeat == 0 else 1 - one.label[rows]]

    made.write(tmp_path, study, one, scores, skip=lambda task: task.repeat == 1 and task.fold > 0)
    evaluator = Evaluator(collect(tmp_path))
    row = evaluator.row(("resnet50", "none", 0.0))
    part = one.split[1, 0][2]
    owner = np.unique(one.patient, return_inverse=True)[1]
    for metric, counted in (
        ("accuracy", one.label >= 0),
        ("sensitivity", one.label == 1),
        ("specificity", one.label == 0),
    ):
        expected = counted.sum() / (counted.sum() + (counted & part).sum())
        assert row.figures[metric].value == pytest.approx(expected, abs=1e-12)
        weight = evaluator.weights[:5][:, owner]  # of each image in each resample
        drawn = weight[:, counted].sum(1) / (weight[:, counted].sum(1) + weight[:, counted & part].sum(1))
        assert row.pooled is not None
        assert row.pooled.drawn[metric][:5] == pytest.approx(drawn, abs=1e-12)
    expected = len(one.ids) / (len(one.ids) + part.sum())
    assert row.figures["auc"].value == pytest.approx(expected, abs=1e-12)
    page = visible_text((aggregate(tmp_path).folder / "index.html").read_text())
    assert (
        "a repeat with missing folds is weighted by its number of test images, for sensitivity by the positive" in page
    )


def test_a_curve_begins_at_the_arm_without_synthetic_images(tmp_path: Path) -> None:
    study = made.study(arms="none affine dae-gan:1,3 dae-gan+affine:1,3")
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {"affine": 2.0}))
    result = evaluate(collect(tmp_path))
    for arm, curve in ratio_arms(result)["resnet50"]:
        base = "affine" if arm.endswith("+affine") else "none"
        assert [ratio for ratio, _ in curve] == [0.0, 1.0, 3.0]
        assert curve[0][1] is result.rows["resnet50", base, 0.0]


def test_intervals_do_not_depend_on_what_else_the_study_holds(tmp_path: Path) -> None:
    """The same patients are drawn for every arm: taking an arm away changes no other row."""
    study = made.study()
    one = made.cohort(study)
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 2, {}))
    whole = evaluate(collect(tmp_path)).rows
    (tmp_path / "study.toml").write_text(made.toml(arms="none dae-gan:3"))
    fewer = evaluate(collect(tmp_path)).rows
    assert all(whole[key].figures == row.figures for key, row in fewer.items())
