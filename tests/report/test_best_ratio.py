"""The best ratio of an arm: chosen on validation patients, measured on test patients."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from cmrhpc.report.aggregate import aggregate
from cmrhpc.report.collect import collect
from cmrhpc.report.result import evaluate, points
from tests.report import made
from tests.report.made import visible_text


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
    assert (best.row.key[1], best.chosen, len(best.row.folds)) == ("dae-gan", {0.0: 0, 1.0: 3, 3.0: 3}, 6)
    found = best.row.figures["accuracy"]
    assert found.value == pytest.approx(0.5, abs=1e-12)  # repeat 0 is all wrong, repeat 1 all right
    assert result.rows["resnet50", "dae-gan", 3.0].figures["accuracy"].value == 1.0


def test_best_ratio_has_an_interval_and_is_compared_with_none(tmp_path: Path) -> None:
    """On validation ratio 3 is always best, so its row and its difference must come out again."""
    study = made.study(primary='arm = "dae-gan"\nratio = 3\nmetric = "balanced_accuracy"')
    one = made.cohort(study)
    noisy = made.noisy_scores(one.label, 2, {})

    def scores(task, rows):
        if not one.split[task.repeat, task.fold][1][rows].all():
            return noisy(task, rows)
        right = np.eye(2)[one.label[rows]] * 0.8 + 0.1
        return right if task.ratio == 3 else 1 - right

    made.write(tmp_path, study, one, scores)
    result = aggregate(tmp_path).result
    (best,) = result.best
    assert best.chosen == {0.0: 0, 1.0: 0, 3.0: 6}
    assert best.row.figures == result.rows["resnet50", "dae-gan", 3.0].figures
    names = ("difference", "low", "high", "p_corrected_t", "n_common")
    assert [getattr(best.versus, n) for n in names] == [getattr(result.primary, n) for n in names]
    (told,) = csv.DictReader((tmp_path / "report" / "best_ratio.csv").read_text().splitlines())
    assert (told["versus"], told["metric"]) == ("none", "balanced_accuracy")
    assert float(told["difference_low"]) == result.primary.low
    low, high = (100 * float(told[f"balanced_accuracy_{end}"]) for end in ("low", "high"))
    difference = points(result.primary.difference, sign=True)
    for name in ("index.html", "table.md"):
        text = visible_text((tmp_path / "report" / name).read_text())
        assert re.search(rf"ratio 3: 6 times.*\({low:.1f}–{high:.1f}\)", text)
        assert f"{difference} ({points(result.primary.low)} to {points(result.primary.high)}) against none" in text
        assert "best validation balanced accuracy, the primary metric" in text


def test_the_best_ratio_of_an_arm_with_affine_is_not_credited_with_affine(tmp_path: Path) -> None:
    """Synthetic images change nothing; affine on top makes every image right, with or without them."""
    study = made.study(arms="none affine dae-gan:0,1,3 dae-gan+affine:0,1,3")
    one = made.cohort(study)
    right, weak = np.eye(2)[one.label] * 0.8 + 0.1, np.tile([0.2, 0.8], (len(one.label), 1))
    made.write(tmp_path, study, one, lambda task, rows: (right if task.arm.endswith("affine") else weak)[rows])
    aggregate(tmp_path)
    told = list(csv.DictReader((tmp_path / "report" / "best_ratio.csv").read_text().splitlines()))
    assert [(b["arm"], b["versus"], float(b["difference"])) for b in told] == [
        ("dae-gan", "none", 0.0),
        ("dae-gan+affine", "affine", 0.0),
    ]
    for name in ("index.html", "table.md"):
        text = visible_text((tmp_path / "report" / name).read_text())
        assert "accuracy difference, points" in text
        assert re.search(r"dae-gan .*0\.0 \(–\) against none.* dae-gan\+affine .*0\.0 \(–\) against affine", text)


def test_a_best_ratio_that_cannot_be_chosen_is_listed_with_the_reason(tmp_path: Path) -> None:
    study = made.study()
    one = made.cohort(study)
    scores = made.noisy_scores(one.label, 2, {})
    made.write(tmp_path, study, one, scores, skip=lambda t: (t.arm, t.ratio) == ("dae-gan", 1))
    aggregate(tmp_path)
    for name in ("index.html", "table.md", "best_ratio.csv"):
        text = (tmp_path / "report" / name).read_text()
        assert "none can be chosen: no cell of ratio 1" in text
        assert "– (–)" not in text


def test_the_ratio_is_chosen_by_the_primary_metric(tmp_path: Path) -> None:
    """Ratio 1 calls all diseased, which is right more often; ratio 3 calls all normal.

    Where no validation patient is normal specificity is undefined, and the lower loss is that of ratio 1.
    """
    for metric in ("accuracy", "specificity"):
        root = tmp_path / metric
        study = made.study(arms="none dae-gan:1,3", primary=f'arm = "dae-gan"\nratio = 3\nmetric = "{metric}"')
        one = made.cohort(study, patients=(6, 30))
        calls = {0.0: [0.3, 0.7], 1.0: [0.3, 0.7], 3.0: [0.7, 0.3]}
        made.write(root, study, one, lambda task, rows, calls=calls: np.tile(calls[task.ratio], (len(rows), 1)))
        (best,) = evaluate(collect(root)).best
        normal = sum((one.label[validation] == 0).any() for _, validation, _ in one.split.values())
        assert 0 < normal < 6
        assert best.chosen == ({1.0: 6, 3.0: 0} if metric == "accuracy" else {1.0: 6 - normal, 3.0: normal})
