"""Intervals and tests against worked examples, slow versions, and simulations with known truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cmrhpc.measure import statistics

# ------------------------------------------------------------------------------------------ worked examples


def test_corrected_t_by_hand() -> None:
    """Mean .03, s^2 .00075, J = 5, test/train 1/4: variance .00075 (1/5 + 1/4) = .0003375, t = 1.63299, df 4."""
    found = statistics.corrected_t([0.05, 0.02, 0.03, 0.06, -0.01], 0.25)
    assert found.mean == pytest.approx(0.03, abs=1e-15)
    assert found.standard_error == pytest.approx(math.sqrt(0.0003375), abs=1e-15)
    assert found.t == pytest.approx(1.6329931618554518, abs=1e-12)
    assert (found.df, round(found.p, 4)) == (4, 0.1778)
    half = 2.7764451051977987 * math.sqrt(0.0003375)  # t quantile .975 with 4 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(0.03 - half, abs=1e-12), pytest.approx(0.03 + half, abs=1e-12))


def test_corrected_t_without_correction_is_the_paired_t_test() -> None:
    values = np.random.default_rng(0).normal(0.02, 0.05, 25)
    assert statistics.corrected_t(values, 0.0).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-12)


def test_corrected_t_agrees_with_the_example_of_scikit_learn() -> None:
    """Its page "Statistical comparison of models using grid search" prints, for two support vector machines on 10 x 10
    folds of 100 points: corrected t 0.750, one-sided p 0.227; uncorrected 2.611 and 0.005."""
    from sklearn.datasets import make_moons
    from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
    from sklearn.svm import SVC

    points, label = make_moons(noise=0.352, random_state=1, n_samples=100)
    folds = RepeatedStratifiedKFold(n_splits=10, n_repeats=10, random_state=0)
    auc = {
        kernel: cross_val_score(SVC(kernel=kernel, random_state=0), points, label, cv=folds, scoring="roc_auc")
        for kernel in ("rbf", "linear")
    }
    differences = auc["rbf"] - auc["linear"]
    corrected, naive = statistics.corrected_t(differences, 10 / 90), statistics.corrected_t(differences, 0.0)
    assert (round(corrected.t, 3), round(corrected.p / 2, 3), corrected.df) == (0.750, 0.227, 99)
    assert (round(naive.t, 3), round(naive.p / 2, 3)) == (2.611, 0.005)


@pytest.mark.parametrize(
    ("values", "p"),
    [([0.0] * 5, 1.0), ([0.02] * 5, math.nan), ([0.02], math.nan), ([], math.nan), ([math.nan, 0.1], math.nan)],
)
def test_corrected_t_claims_nothing_without_spread(values: list[float], p: float) -> None:
    assert statistics.corrected_t(values, 0.25).p == pytest.approx(p, nan_ok=True)


def test_corrected_t_leaves_undefined_folds_out() -> None:
    kept = statistics.corrected_t([0.1, 0.2, 0.4], 0.25)
    assert statistics.corrected_t([0.1, math.nan, 0.2, 0.4], 0.25) == kept


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (6, 16, 0.0524787903),  # a common textbook table: exact two-sided binomial, 2 P(X <= 6 | 22, 1/2)
        (0, 5, 0.0625),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (1, 9, 0.021484375),
    ],
)
def test_mcnemar_of_discordant_patients(only_a: int, only_b: int, p: float) -> None:
    right_a = np.r_[np.ones(only_a), np.zeros(only_b), np.ones(30), np.zeros(4)]
    right_b = np.r_[np.zeros(only_a), np.ones(only_b), np.ones(30), np.zeros(4)]
    found = statistics.mcnemar(right_a, right_b)
    assert found[1:] == (only_a, only_b)
    assert found[0] == pytest.approx(p, abs=1e-9)


def test_mcnemar_without_patients_is_undefined() -> None:
    assert math.isnan(statistics.mcnemar(np.zeros(0), np.zeros(0))[0])


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04 times 4 3 2 1, never falling; NaN takes no part."""
    found = statistics.holm([0.01, 0.04, math.nan, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, math.nan, 0.06, 0.02], atol=1e-12)


def test_mcnemar_and_holm_agree_with_statsmodels() -> None:
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 40)) < np.array([[0.8], [0.6]])
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert statistics.mcnemar(a, b)[0] == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)
    p = rng.random(12) ** 3
    np.testing.assert_allclose(statistics.holm(p), multipletests(p, method="holm")[1], atol=1e-12)


def slow_delong(positive: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """From the definition: psi of every pair, then the covariances of its means over rows and columns."""
    auc, rows, columns = [], [], []
    for score in (a, b):
        up, down = score[positive], score[~positive]
        psi = [[1.0 if u > d else 0.5 if u == d else 0.0 for d in down] for u in up]
        rows.append([sum(line) / len(down) for line in psi])
        columns.append([sum(line[j] for line in psi) / len(up) for j in range(len(down))])
        auc.append(sum(rows[-1]) / len(up))

    def covariance(x: list[float], y: list[float]) -> float:
        mx, my = sum(x) / len(x), sum(y) / len(y)
        return sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True)) / (len(x) - 1)

    s = [[covariance(v[i], v[j]) for i in (0, 1) for j in (0, 1)] for v in (rows, columns)]
    m, n = len(rows[0]), len(columns[0])
    variance = (s[0][0] + s[0][3] - 2 * s[0][1]) / m + (s[1][0] + s[1][3] - 2 * s[1][1]) / n
    return auc[0], auc[1], math.sqrt(variance)


@pytest.mark.parametrize("ties", [False, True])
def test_delong_agrees_with_the_slow_version(ties: bool) -> None:
    rng = np.random.default_rng(5)
    positive = np.arange(40) < 15
    a, b = (rng.normal(size=40) + positive for _ in range(2))
    if ties:
        a, b = np.round(a), np.round(b)
    found = statistics.delong(positive, a, b)
    auc_a, auc_b, error = slow_delong(positive, a, b)
    assert (found.auc_a, found.auc_b) == (pytest.approx(auc_a, abs=1e-12), pytest.approx(auc_b, abs=1e-12))
    assert found.standard_error == pytest.approx(error, abs=1e-12)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(auc_a - auc_b) / error), abs=1e-12)


def test_delong_by_hand() -> None:
    """a ranks all pairs right. b: positives 4, 2, 1 against negatives 3, 0, so it wins 2, 1, 1 of 2 pairs.

    AUC 1 and 4/6. Placements of b: positives 1, .5, .5, negatives 1/3, 1. Variance of the difference: that of b,
    (1/12)/3 + (2/9)/2 = 5/36, so z = (1/3) / sqrt(5/36) = 2 / sqrt(5).
    """
    positive = np.array([True, True, True, False, False])
    found = statistics.delong(positive, np.array([5.0, 6, 7, 1, 2]), np.array([4.0, 2, 1, 3, 0]))
    assert (found.auc_a, found.auc_b) == (1.0, pytest.approx(4 / 6, abs=1e-12))
    assert found.z == pytest.approx(2 / math.sqrt(5), abs=1e-12)


# DeLong, DeLong and Clarke-Pearson's own example: patients with ovarian cancer and intestinal obstruction. Albumin,
# total protein, K-G score, and the outcome of surgery; the 43 of 49 patients with all three.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


@pytest.mark.parametrize(
    ("column", "auc", "error", "chi_square", "p"),
    [(0, 0.7366, 0.0953, 0.0127, 0.9102), (1, 0.6478, 0.1046, 0.5554, 0.4561)],
)
def test_delong_agrees_with_the_published_ovarian_cancer_example(
    column: int, auc: float, error: float, chi_square: float, p: float
) -> None:
    """Against the K-G score (AUC .7258), as the SAS/STAT manual prints it ("Comparing Receiver Operating Characteristic
    Curves"): areas, standard errors of their differences, chi-squares and p values to four places."""
    table = np.array(OVARIAN.split(), float).reshape(-1, 4)
    assert table.shape == (43, 4)
    found = statistics.delong(table[:, 3] == 1, table[:, column], -table[:, 2])
    assert (round(found.auc_a, 4), round(found.auc_b, 4)) == (auc, 0.7258)
    assert round(found.standard_error, 4) == error
    assert (round(found.z**2, 4), round(found.p, 4)) == (chi_square, p)


def test_delong_of_equal_or_too_few_cases() -> None:
    positive, score = np.array([True, True, False, False]), np.array([0.9, 0.2, 0.3, 0.1])
    assert statistics.delong(positive, score, score).p == 1.0
    assert math.isnan(statistics.delong(np.array([True, False, False]), score[:3], -score[:3]).p)
    assert math.isnan(statistics.delong(np.ones(4, bool), score, score).auc_a)


def test_permutation_counts_all_swaps_of_few_patients() -> None:
    values = np.array([0.2, 0.1, 0.0, 0.3, -0.1, 0.25])
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    assert statistics.permutation(values, 0) == pytest.approx(np.mean([s >= 0.75 - 1e-12 for s in sums]), abs=1e-12)
    assert statistics.permutation(np.zeros(9), 0) == 1.0


def test_permutation_never_says_that_chance_is_impossible() -> None:
    """30 equal differences: the observed swap is one of those that count."""
    assert statistics.permutation(np.ones(30), 0, draws=500) == pytest.approx(1 / 501)


def test_permutation_of_equal_weights_is_the_exact_binomial() -> None:
    values = np.r_[np.ones(15), -np.ones(5)]
    assert statistics.permutation(values, 3) == pytest.approx(stats.binomtest(5, 20).pvalue, abs=0.006)


def test_exact_limits_are_clopper_pearson() -> None:
    for right, n in ((0, 6), (6, 6), (3, 10)):
        expected = stats.binomtest(right, n).proportion_ci(0.95, method="exact")
        assert statistics.exact_limits(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


# ------------------------------------------------------------------------------------------------ bootstrap


def test_bootstrap_standard_error_is_that_of_patients_not_of_images() -> None:
    """40 patients whose 10 images are all alike: the error is that of 40 coin flips, not of 400."""
    right = np.arange(40) < 28
    weights = statistics.patient_weights(40, seed=1)
    assert (weights.sum(1) == 40).all()
    assert weights.shape == (statistics.DRAWS, 40)
    share = (weights @ (10.0 * right)) / (weights @ np.full(40, 10.0))
    assert share.std() == pytest.approx(math.sqrt(0.7 * 0.3 / 40), rel=0.05)


def test_interval_approaches_the_plain_percentiles() -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    assert statistics.interval(values, 100_000) == pytest.approx((-1.96, 1.96), abs=0.02)
    wide = statistics.interval(values, 6)
    assert wide[1] == pytest.approx(math.sqrt(6 / 5) * 2.5706, abs=0.05)
    assert np.isnan(statistics.interval(np.full(9, np.nan), 6)).all()


def test_interval_covers_with_six_patients_where_the_plain_one_does_not() -> None:
    """Specificity on 6 patients of beta-distributed difficulty, 7 to 30 images each; 600 studies."""
    rng = np.random.default_rng(3)
    covered = plain = 0
    for _ in range(600):
        images = rng.integers(7, 31, 6)
        right = rng.binomial(images, rng.beta(3, 2, 6))
        drawn = rng.multinomial(6, np.full(6, 1 / 6), 400)
        values = (drawn @ right) / (drawn @ images)
        low, high = statistics.interval(values, 6)
        covered += low <= 0.6 <= high
        plain += np.quantile(values, 0.025) <= 0.6 <= np.quantile(values, 0.975)
    assert 0.91 <= covered / 600 <= 0.98
    assert plain / 600 < 0.92


# -------------------------------------------------------------------------- false positives and power, exactly


def fold_differences(rng: np.random.Generator, studies: int, j: int, rho: float, effect: float) -> np.ndarray:
    """(studies, j) differences of J folds that share training patients: unit variance, correlation rho."""
    shared, own = rng.normal(size=(studies, 1)), rng.normal(size=(studies, j))
    return effect + math.sqrt(rho) * shared + math.sqrt(1 - rho) * own


@pytest.mark.parametrize("j", [5, 25])
def test_corrected_t_keeps_its_false_positive_rate_where_the_naive_one_fails(j: int) -> None:
    """Nadeau and Bengio: correlation n_test / (n_test + n_train) makes the corrected statistic a t of J - 1."""
    rng = np.random.default_rng(j)
    rows = fold_differences(rng, 4000, j, rho=0.2, effect=0.0)
    corrected = np.mean([statistics.corrected_t(row, 0.25).p < 0.05 for row in rows])
    naive = np.mean(stats.ttest_1samp(rows, 0, axis=1).pvalue < 0.05)
    assert corrected == pytest.approx(0.05, abs=3.5 * math.sqrt(0.05 * 0.95 / 4000))
    assert naive > 0.11


def test_corrected_t_has_the_power_of_theory() -> None:
    """Noncentral t: the mean has variance rho + (1 - rho) / J."""
    j, rho, effect = 25, 0.2, 1.3
    rows = fold_differences(np.random.default_rng(9), 3000, j, rho, effect)
    found = np.mean([statistics.corrected_t(row, rho / (1 - rho)).p < 0.05 for row in rows])
    centre, limit = effect / math.sqrt(rho + (1 - rho) / j), stats.t.ppf(0.975, j - 1)
    expected = stats.nct.sf(limit, j - 1, centre) + stats.nct.cdf(-limit, j - 1, centre)
    assert 0.6 < expected < 0.95
    assert found == pytest.approx(expected, abs=3.5 * math.sqrt(expected * (1 - expected) / 3000))


def patients_read(rng: np.random.Generator, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """60 patients with 6 near-copies of an image: right or wrong per image for two arms, and the patient's row."""
    owner = np.repeat(np.arange(60), 6)
    shared, own = rng.normal(size=60), rng.normal(size=(2, 60))
    margin = 0.5 + 0.8 * shared + 0.7 * own + np.array([[0.0], [effect]])
    right = margin[:, owner] + 0.3 * rng.normal(size=(2, 360)) > 0
    return right[0], right[1], owner


def test_mcnemar_on_patients_keeps_its_rate_where_images_do_not() -> None:
    rng = np.random.default_rng(2)
    per_patient, per_image = [], []
    for _ in range(600):
        a, b, owner = patients_read(rng, effect=0.0)
        votes = [np.bincount(owner, side) > 3 for side in (a, b)]
        per_patient.append(statistics.mcnemar(*votes)[0] < 0.05)
        per_image.append(statistics.mcnemar(a, b)[0] < 0.05)
    assert np.mean(per_patient) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    assert np.mean(per_image) > 0.2


def test_mcnemar_has_the_power_of_the_binomial() -> None:
    """Discordant with probability .3, then .8 to .2: exact power by summing over all tables of 80 patients."""
    n, discordant, share = 80, 0.3, 0.8
    expected = 0.0
    for d in range(n + 1):
        for a in range(d + 1):
            if d and stats.binomtest(a, d).pvalue < 0.05:
                expected += stats.binom.pmf(d, n, discordant) * stats.binom.pmf(a, d, share)
    rng, found = np.random.default_rng(4), 0
    for _ in range(800):
        kind = rng.choice(3, n, p=[discordant * share, discordant * (1 - share), 1 - discordant])
        found += statistics.mcnemar(kind != 1, kind != 0)[0] < 0.05
    assert found / 800 == pytest.approx(expected, abs=3.5 * math.sqrt(expected * (1 - expected) / 800))


@pytest.mark.parametrize("effect", [0.0, 0.9])
def test_delong_rate_and_power_are_those_of_theory(effect: float) -> None:
    """Two readers of the same 120 patients; power from the normal law with the mean standard error."""
    rng, p, errors, gaps = np.random.default_rng(6), [], [], []
    positive = np.arange(120) < 60
    for _ in range(800):
        common = rng.normal(size=120)
        a = common + rng.normal(size=120) + (1.0 + effect) * positive
        b = common + rng.normal(size=120) + 1.0 * positive
        found = statistics.delong(positive, a, b)
        p.append(found.p < 0.05)
        errors.append(found.standard_error)
        gaps.append(found.auc_a - found.auc_b)
    centre = np.mean(gaps) / np.mean(errors) if effect else 0.0
    expected = stats.norm.sf(1.96 - centre) + stats.norm.cdf(-1.96 - centre)
    assert np.mean(p) == pytest.approx(expected, abs=0.03 if not effect else 0.05)
