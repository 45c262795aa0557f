"""Studies of more than two classes: the figures of each class and what their limits rest on."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.collect import collect
from cmrhpc.report.result import evaluate, figure_text
from tests.report import made
from tests.report.made import read_csv


def test_a_perfect_multi_class_arm_has_exact_limits(tmp_path: Path) -> None:
    """No resample of it differs, so without them accuracy, recalls and AUC had no interval at all."""
    study = made.study(arms="none dae-gan:3", classes=("a", "b", "c"))
    one = made.cohort(study, patients=(5, 6, 7))
    made.write(tmp_path, study, one, lambda task, rows: np.eye(3)[one.label[rows]])
    row = evaluate(collect(tmp_path)).rows["resnet50", "none", 0.0]
    assert (row.figures["accuracy"].low, row.figures["accuracy"].high) == (pytest.approx(0.025 ** (1 / 18)), 1)
    recall = [1 - 0.025 ** (1 / n) for n in (5, 6, 7)]
    assert [1 - f.low for f in row.per_class["recall"]] == pytest.approx(recall)
    assert [1 - f.low for f in row.per_class["precision"]] == pytest.approx(recall)
    for name in ("sensitivity", "balanced_accuracy"):
        assert row.figures[name].low == pytest.approx(1 - math.hypot(*recall) / 3)
    assert (row.figures["auc"].low, row.figures["auc"].high) == (pytest.approx(0.025 ** (1 / 5)), 1)
    assert math.isnan(row.figures["specificity"].low)


def test_a_recall_rests_on_the_patients_of_the_class_and_a_precision_on_those_called_so(tmp_path: Path) -> None:
    """One of 20 patients of class a is called b. So close to 1 the lower limits are those of Clopper and Pearson."""
    study = made.study(arms="none dae-gan:3", classes=("a", "b", "c"))
    one = made.cohort(study, patients=(20, 20, 20))
    called = np.where(one.patient == one.patient[0], 1, one.label)
    made.write(tmp_path, study, one, lambda task, rows: np.eye(3)[called[rows]])
    row = evaluate(collect(tmp_path)).rows["resnet50", "none", 0.0]
    for name, label, counted, patients in (("recall", 0, one.label, 20), ("precision", 1, called, 21)):
        among = counted == label
        right = (called == one.label)[among].mean() * patients
        assert len(set(one.patient[among])) == patients < among.sum()
        assert 0.9 * patients < right < patients
        low = stats.beta.ppf(0.025, right, patients - right + 1)
        assert row.per_class[name][label].low == pytest.approx(low, abs=1e-9)


def test_multi_class_studies_add_per_class_figures(tmp_path: Path) -> None:
    classes = ("=nv", "mel|a", "<b>bcc</b>")
    study = made.study(arms="none dae-gan:3", classes=classes)
    one = made.cohort(study, patients=(8, 8, 9))
    made.write(tmp_path, study, one, made.noisy_scores(one.label, 3, {}))
    aggregate(tmp_path)
    rows = read_csv(tmp_path / "report" / "classes.csv")
    assert [row["class"] for row in rows] == ["'=nv", "mel|a", "<b>bcc</b>"] * 2
    parts = []
    for path in sorted((tmp_path / "predictions" / "none").rglob("*.h5")):
        with h5py.File(path) as file:
            parts.append((file["label"][()], file["score"][()].argmax(1)))
    label, predicted = (np.concatenate(values) for values in zip(*parts, strict=True))
    expected, counts = sk.precision_recall_fscore_support(label, predicted), sk.confusion_matrix(label, predicted)
    for i, row in enumerate(rows[:3]):
        for j, name in enumerate(("precision", "recall", "f1")):
            assert float(row[name]) == pytest.approx(expected[j][i], abs=1e-12)
        found = [float(row[f"predicted_{k}"]) for k in range(3)]
        assert found == pytest.approx((counts[i] / 2).tolist(), abs=1e-12)
    row = evaluate(collect(tmp_path)).rows["resnet50", "none", 0.0]
    text = figure_text("recall", row.per_class["recall"][0])
    assert [float(rows[0][f"recall_{end}"]) for end in ("low", "high")] == [
        getattr(row.per_class["recall"][0], end) for end in ("low", "high")
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert f">{text}</td>" in page
    assert "<h3>ROC curves</h3>" in page
    assert "&lt;b&gt;bcc&lt;/b&gt;" in page
    assert "<b>bcc" not in page
    assert "published row" not in page


def test_a_class_called_once_rightly_has_no_precision_from_that_repeat_alone(tmp_path: Path) -> None:
    """Of 8 images of class 2 one is called so, in repeat 0, and 3 of class 1 are, in repeat 1: precision 1 of 4."""
    study = made.study(arms="none dae-gan:3", classes=("a", "b", "c"))
    one = made.cohort(study, patients=(8, 8, 8), images=1)

    def scores(task, rows):
        called = np.zeros(len(rows), int)
        called[rows == 16 if task.repeat == 0 else np.isin(rows, (8, 9, 10))] = 2
        return np.eye(3)[called]

    made.write(tmp_path, study, one, scores)
    aggregate(tmp_path)
    row = read_csv(tmp_path / "report" / "classes.csv")[2]
    assert [float(row[name]) for name in ("precision", "recall", "f1")] == [0.25, 1 / 16, 0.1]
