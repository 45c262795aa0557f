"""Metrics against scikit-learn and against slow versions written out from [DAE] 13-15."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cmrhpc.errors import BadInput, Damage
from cmrhpc.measure import metrics


def drawn(seed: int, n: int = 60, k: int = 2, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.r_[np.arange(k), rng.integers(0, k, n - k)]
    logit = rng.normal(size=(n, k)) + 1.2 * np.eye(k)[label]
    if ties:
        logit = np.round(logit)
    score = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
    return label, score


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_agree_with_scikit_learn(seed: int, ties: bool) -> None:
    label, score = drawn(seed, ties=ties)
    predicted = score.argmax(1)
    found = metrics.measure(label, score)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(label, predicted), abs=1e-12)
    assert found["sensitivity"] == pytest.approx(sk.recall_score(label, predicted), abs=1e-12)
    assert found["specificity"] == pytest.approx(sk.recall_score(label, predicted, pos_label=0), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(label, predicted), abs=1e-12)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(label, score[:, 1]), abs=1e-12)


def test_binary_metrics_are_the_formulas_of_the_paper() -> None:
    label, score = drawn(3)
    tp = sum(y == 1 and s[1] > s[0] for y, s in zip(label, score, strict=True))
    tn = sum(y == 0 and s[1] <= s[0] for y, s in zip(label, score, strict=True))
    fp = sum(y == 0 and s[1] > s[0] for y, s in zip(label, score, strict=True))
    fn = sum(y == 1 and s[1] <= s[0] for y, s in zip(label, score, strict=True))
    found = metrics.measure(label, score)
    assert found["accuracy"] == pytest.approx((tp + tn) / (tp + tn + fp + fn), abs=1e-15)
    assert found["sensitivity"] == pytest.approx(tp / (tp + fn), abs=1e-15)
    assert found["specificity"] == pytest.approx(tn / (tn + fp), abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_multi_class_metrics_agree_with_scikit_learn(seed: int) -> None:
    label, score = drawn(seed, n=90, k=4)
    predicted = score.argmax(1)
    found = metrics.measure(label, score)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(label, predicted), abs=1e-12)
    assert found["sensitivity"] == pytest.approx(sk.recall_score(label, predicted, average="macro"), abs=1e-12)
    expected = np.mean([sk.recall_score(label != k, predicted != k) for k in range(4)])
    assert found["specificity"] == pytest.approx(expected, abs=1e-12)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(label, score, multi_class="ovr"), abs=1e-12)
    counts = metrics.confusion(label, predicted, 4)
    assert (counts == sk.confusion_matrix(label, predicted)).all()
    precision, recall, f1, _ = sk.precision_recall_fscore_support(label, predicted, zero_division=np.nan)
    per_class = metrics.per_class(counts)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(per_class[name], expected, atol=1e-12)


def test_equal_scores_give_the_lower_class_and_half_a_win() -> None:
    label, score = np.array([0, 1, 1, 0]), np.full((4, 2), 0.5)
    found = metrics.measure(label, score)
    assert (metrics.predicted_class(score) == 0).all()
    assert (found["sensitivity"], found["specificity"], found["auc"]) == (0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("only", "defined", "undefined"), [(1, "sensitivity", "specificity"), (0, "specificity", "sensitivity")]
)
def test_one_class_leaves_the_other_rate_undefined(only: int, defined: str, undefined: str) -> None:
    label, score = np.full(5, only), np.array([[0.4, 0.6]] * 3 + [[0.7, 0.3]] * 2)
    found = metrics.measure(label, score)
    assert found[defined] == found["accuracy"] == pytest.approx(0.6 if only else 0.4)
    assert np.isnan([found[undefined], found["balanced_accuracy"], found["auc"]]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda label, score: (label, np.where(np.arange(60)[:, None] == 4, np.nan, score)),
            "1 of 60 images are not finite",
        ),
        (lambda label, score: (label, score * np.inf), "not finite"),
        (lambda label, score: (label + 1, score), "labels outside"),
        (lambda label, score: (label - 1, score), "labels outside"),
        (lambda label, score: (label[:-1], score), "do not fit"),
        (lambda label, score: (label[:0], score[:0]), "no image"),
        (lambda label, score: (label, score[:, :1]), "fewer than two classes"),
    ],
)
def test_what_cannot_be_measured_is_bad_input(change, says: str) -> None:
    label, score = change(*drawn(0))
    with pytest.raises(BadInput, match=says):
        metrics.measure(label, score)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=4, max_size=4).filter(lambda c: sum(c) > 0))
def test_accuracy_is_the_prevalence_weighted_recall_of_any_counts(flat: list[int]) -> None:
    counts = np.array(flat).reshape(2, 2)
    metrics.check_identity(counts)
    n, p = counts.sum(1)
    found = metrics.rates(counts)
    weighted = np.nansum([found["sensitivity"] * p, found["specificity"] * n]) / (n + p)
    assert float(found["accuracy"]) == pytest.approx(weighted, abs=1e-12)


def test_a_wrong_accuracy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = metrics.rates
    monkeypatch.setattr(metrics, "rates", lambda counts: right(counts) | {"accuracy": right(counts)["accuracy"] + 1e-9})
    with pytest.raises(Damage, match="prevalence-weighted"):
        metrics.check_identity(np.array([[50, 27], [3, 218]]))


def test_published_first_row_fails_the_identity_as_stated() -> None:
    """METHODS M12: .9674 and .6964 with 221 and 77 images give .8974, and .7664 with the classes swapped."""
    assert pytest.approx(0.8974, abs=5e-5) == 0.9674 * 221 / 298 + 0.6964 * 77 / 298
    assert pytest.approx(0.7664, abs=5e-5) == 0.9674 * 77 / 298 + 0.6964 * 221 / 298


def test_auc_is_the_share_of_pairs_won() -> None:
    label, score = drawn(1, n=30, ties=True)
    up, down = score[label == 1, 1], score[label == 0, 1]
    pairs = [(u > d) + 0.5 * (u == d) for u in up for d in down]
    assert float(metrics.auc(label == 1, score[:, 1])) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_roc_curve_agrees_with_scikit_learn(ties: bool) -> None:
    label, score = drawn(6, ties=ties)
    x, y, _ = sk.roc_curve(label, score[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(metrics.roc(label == 1, score[:, 1]), (x, y), atol=1e-12)


def test_weighted_auc_is_the_auc_of_repeated_images() -> None:
    label, score = drawn(2, n=40, ties=True)
    weights = np.random.default_rng(0).integers(0, 4, (6, 40))
    found = metrics.auc(label == 1, score[:, 1], weights)
    for row, value in zip(weights, found, strict=True):
        again = np.repeat(np.arange(40), row)
        assert value == pytest.approx(sk.roc_auc_score(label[again], score[again, 1]), abs=1e-12)


@pytest.mark.parametrize("limit", [1, 10**6])
def test_patient_weighted_auc_agrees_with_the_plain_one_both_ways(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(metrics, "MAX_PAIRS", limit)
    label, score = drawn(4, n=50, ties=True)
    rng = np.random.default_rng(1)
    owner, weights = rng.integers(0, 12, 50), rng.integers(0, 3, (40, 12)).astype(float)
    expected = metrics.auc(label == 1, score[:, 1], weights[:, owner])
    np.testing.assert_allclose(metrics.clustered_auc(label == 1, score[:, 1], owner, weights), expected, atol=1e-12)


def test_scores_of_1_are_ranked_as_those_near_0_are() -> None:
    """A softmax in float64 ends at 1 where it is 40 or 50 ahead, and never at 0: both sides must be ranked alike."""
    label, ahead = np.array([0, 1, 0, 1, 1, 0]), np.array([40.0, 50.0, 45.0, 60.0, 42.0, -3.0])
    positive, negative = np.exp(-np.logaddexp(0, -ahead)), np.exp(-np.logaddexp(0, ahead))
    assert (positive == 1).sum() == 5
    expected = sk.roc_auc_score(label, ahead)
    assert metrics.measure(label, np.c_[negative, positive])["auc"] == pytest.approx(expected, abs=1e-12)
    assert metrics.measure(1 - label, np.c_[positive, negative])["auc"] == pytest.approx(expected, abs=1e-12)
    x, y = metrics.roc(label == 1, metrics.class_score(np.c_[negative, positive], 1))
    assert sk.auc(x, y) == pytest.approx(expected, abs=1e-12)
    with np.errstate(all="raise"):  # another score of 0 is no reason for a warning or an infinity
        eye = metrics.class_score(np.eye(2), 1)
    assert np.isfinite(eye).all()
