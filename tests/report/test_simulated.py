"""False positives and power of the whole comparison, by simulation."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cmrhpc import planning
from cmrhpc.measure import statistics
from cmrhpc.report.collect import Asked, Cell, Collection, Images
from cmrhpc.report.compare import compare_all
from cmrhpc.report.rows import Evaluator
from tests.report import made

SHARED = {"hard": 0.6, "suits": 0.5, "image": 0.3, "went": 0.2, "noise": 0.2}  # standard deviations of the margin
BASE = 0.7  # margin of the arm none; above 0 an image is read rightly


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
    hard, suits = rng.normal(0, SHARED["hard"], 40), rng.normal(0, SHARED["suits"], (2, 40))
    image = rng.normal(0, SHARED["image"], 160)
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
                went, noise = rng.normal(0, SHARED["went"]), rng.normal(0, SHARED["noise"], 160)
                margin = BASE + a * effect + went + hard[patient] + suits[a, patient] + image + noise
                p = 1 / (1 + np.exp(-(margin * sign)[rows]))
                task = planning.Task("classify", repeat, fold, arm=arm, ratio=3.0 * a, classifier="resnet50")
                n_train = round(0.8 * (160 - len(rows)))  # a fifth is for validation
                cell = Cell(
                    task=task,
                    shard=None,  # type: ignore[arg-type]
                    images=images,
                    score=np.c_[1 - p, p],
                    n_train=n_train,
                    validation_label=np.zeros(0, np.int64),
                    validation_score=np.zeros((0, 2)),
                    best_step=0,
                )
                cells.setdefault(("resnet50", arm, 3.0 * a), {})[repeat, fold] = cell
    names = [f"p{i}" for i in range(40)]
    ids = np.array([f"r{i}".encode() for i in range(160)])
    expected = planning.tasks(study, "classify")
    return Collection(
        root=Path(),
        study=study,
        study_from="",
        expected=expected,
        cells=cells,
        missing={},
        refused={},
        unasked=[],
        ids=ids,
        image_label=label,
        image_patient=patient,
        patients=names,
        leaks=[],
        unchecked_ids=0,
        made_checked=0,
        made_unchecked=0,
        normalised=None,
        primaries=Counter({study.primary: len(expected)}),
        asked=Asked(Path(), study, {}),
    )


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
    """200 studies without effect. Per image, McNemar calls far more than the 5 % it claims.

    The comparison claims at most 5 % and calls fewer: these arms differ less from fold to fold than the correction
    allows for, and p and interval must agree.
    """
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


def moments(effect: float) -> tuple[float, float, float]:
    """Of the difference of accuracy in a fold of 8 patients, 4 images each: mean, variance, covariance with all folds
    of the other repeat together. From the normal law of the margins; nothing is drawn."""
    variance = {name: sd**2 for name, sd in SHARED.items()}
    total = sum(variance.values())
    means = np.array([BASE, BASE + effect])
    rate = stats.norm.cdf(means / math.sqrt(total))

    def covariance(arm: int, other: int, *shared: str) -> float:
        """Of two images read rightly, one by each arm, whose margins share what is named."""
        c = sum(variance[name] for name in shared if arm == other or name in ("hard", "image"))
        both = stats.multivariate_normal([0, 0], [[total, c], [c, total]], allow_singular=True).cdf(means[[arm, other]])
        return float(both - rate[arm] * rate[other])

    def of_difference(*shared: str) -> float:
        return covariance(1, 1, *shared) + covariance(0, 0, *shared) - 2 * covariance(0, 1, *shared)

    images, patients = 4, 8
    n = images * patients
    same = of_difference("hard", "suits", "image", "went", "noise")
    near = of_difference("hard", "suits", "went")
    far = of_difference("went")
    one_fold = (same + (images - 1) * near + (n - images) * far) / n
    again = (of_difference("hard", "suits", "image") + (images - 1) * of_difference("hard", "suits")) / n
    return float(rate[1] - rate[0]), one_fold, again


def test_a_planted_effect_is_found_with_the_power_of_theory() -> None:
    """Mean m and variance V of the mean difference follow from how the studies are made, and so does the expected s^2
    of the folds, J / (J - 1) (variance of a fold - V): t is nearly a noncentral t about m / sqrt(V), shrunk."""
    j, rho, effect, studies = 10, 0.25 / 0.8, 1.1, 150
    mean, one_fold, again = moments(effect)
    of_mean = (j * one_fold + j * again) / j**2  # every fold overlaps with all of the other repeat together once
    spread = (one_fold - of_mean) * j / (j - 1)
    ratio = math.sqrt(of_mean / (spread * (1 / j + rho)))
    expected = stats.nct.sf(stats.t.ppf(0.975, j - 1) / ratio, j - 1, mean / math.sqrt(of_mean))
    assert 0.3 < expected < 0.95
    found, means = [], []
    for seed in range(studies):
        primary, differences, _ = compared(1000 + seed, effect)
        found.append(primary.p_corrected_t < 0.05)
        means.append(differences.mean())
    assert np.mean(means) == pytest.approx(mean, abs=4 * math.sqrt(of_mean / studies))
    assert np.var(means, ddof=1) == pytest.approx(of_mean, rel=0.4)
    assert np.mean(found) == pytest.approx(expected, abs=0.1)
