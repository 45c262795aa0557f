"""Intervals and tests for cross-validated classifiers on few patients.

What is resampled, permuted or counted is always the patient: images of one patient are near copies, and a test that
takes them for independent calls chance an effect. Folds share training patients and repeats share all patients, so a
plain t test over them does the same; the corrected one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # bootstrap resamples; the Monte Carlo error of a 95 % limit is then about 0.05 standard errors
TAIL = 0.025  # on each side of a 95 % interval


# ---------------------------------------------------------------------------------------------- bootstrap


def patient_weights(n_patients: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """How often each patient is drawn (draws, n_patients): with replacement, all images of a patient along."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=draws).astype(float)


def interval(drawn: np.ndarray, n_patients: int) -> tuple[float, float]:
    """Expanded percentile interval of bootstrap values (draws,), undefined draws left out; (nan, nan) if none is left.

    n_patients: patients that the value rests on. The plain percentile interval is too narrow for few patients by the
    ratio of the normal to the t quantile and by sqrt((n - 1) / n); widening the percentiles by both mends it
    (Hesterberg, The American Statistician 69, 2015, section 3.3). From about 100 patients on the two agree.
    """
    from scipy import stats

    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0 or n_patients < 2:
        return float("nan"), float("nan")
    tail = stats.norm.cdf(np.sqrt(n_patients / (n_patients - 1)) * stats.t.ppf(TAIL, n_patients - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def blind(low: float, high: float) -> bool:
    """Both limits agree: no patient differs from another in what is measured, so resampling them tells nothing."""
    return abs(high - low) < 1e-12


def exact_limits(right: float, n: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share of n patients, of whom a mean over images or repeats has `right` right."""
    from scipy import stats

    if n < 1:
        return float("nan"), float("nan")
    low = 0.0 if right == 0 else float(stats.beta.ppf(TAIL, right, n - right + 1))
    high = 1.0 if right == n else float(stats.beta.ppf(1 - TAIL, right + 1, n - right))
    return low, high


# ------------------------------------------------------------------------------------- corrected resampled t


@dataclass(frozen=True)
class TTest:
    """Corrected resampled t test of a mean difference; NaN where it cannot be computed."""

    mean: float
    standard_error: float
    t: float
    df: int
    p: float
    low: float
    high: float


def corrected_t(differences: Sequence[float] | np.ndarray, test_to_train: float) -> TTest:
    """Nadeau-Bengio corrected resampled t test over J = folds x repeats differences (two-sided).

    Variance of the mean = s^2 (1/J + n_test/n_train), df = J - 1 (Nadeau and Bengio, Machine Learning 52, 2003,
    section 4.1; Bouckaert and Frank 2004 for repeated cross-validation). Undefined differences are left out.
    All differences zero: p = 1. Equal and not zero, or J < 2: p is NaN, there is no spread to judge by.
    """
    from scipy import stats

    found = np.asarray(differences, float)
    found = found[np.isfinite(found)]
    count, nan = len(found), float("nan")
    if count < 2:
        return TTest(float(found.mean()) if count else nan, nan, nan, max(count - 1, 0), nan, nan, nan)
    mean, variance, df = float(found.mean()), float(found.var(ddof=1)), count - 1
    if np.ptp(found) < 1e-12:
        none = abs(mean) < 1e-12
        return TTest(mean, 0.0, 0.0 if none else nan, df, 1.0 if none else nan, nan, nan)
    error = float(np.sqrt(variance * (1 / count + test_to_train)))
    t = mean / error
    reach = float(stats.t.ppf(1 - TAIL, df)) * error
    return TTest(mean, error, t, df, float(2 * stats.t.sf(abs(t), df)), mean - reach, mean + reach)


# -------------------------------------------------------------------------------------- paired, per patient


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> tuple[float, int, int]:
    """Exact McNemar test on one prediction per patient: (p, patients only a has right, patients only b has right).

    right_a, right_b (P,) bool, same patients in the same order. No discordant patient: p = 1; no patient: NaN.
    """
    from scipy import stats

    a, b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    if len(a) == 0:
        return float("nan"), 0, 0
    p = 2 * float(stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))
    return min(p, 1.0), only_a, only_b


def permutation(differences: np.ndarray, seed: int, draws: int = 20_000) -> float:
    """Two-sided p of sum(differences) when the two arms of each patient are swapped at random.

    differences (P,): what the patient adds to metric(a) - metric(b). With at most 14 patients that differ all swaps
    are counted (exact), otherwise `draws` random ones, the observed one among them.
    """
    found = np.asarray(differences, float)
    found = found[found != 0]
    if len(found) == 0:
        return 1.0
    observed = abs(found.sum())
    if len(found) <= 14:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(found))[:, None] >> np.arange(len(found))) & 1)
        return float((np.abs(signs @ found) >= observed - 1e-12).mean())
    flips = np.random.default_rng(seed).integers(0, 2, (draws, len(found)), dtype=np.int8)
    sums = found.sum() - 2 * (flips @ found)
    return float((1 + (np.abs(sums) >= observed - 1e-12).sum()) / (1 + draws))


# -------------------------------------------------------------------------------------------------- DeLong


@dataclass(frozen=True)
class DeLong:
    """Two correlated AUCs on the same cases and the test of their difference."""

    auc_a: float
    auc_b: float
    standard_error: float
    z: float
    p: float


def _placements(positive: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC, and per positive and per negative case its share of pairs won, from midranks."""
    from scipy.stats import rankdata

    up, down = score[positive], score[~positive]
    ranks = rankdata(np.r_[up, down])
    over_down = (ranks[: len(up)] - rankdata(up)) / len(down)
    under_up = 1 - (ranks[len(up) :] - rankdata(down)) / len(up)
    return float(over_down.mean()), over_down, under_up


def delong(positive: np.ndarray, score_a: np.ndarray, score_b: np.ndarray) -> DeLong:
    """DeLong test of two correlated AUCs (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988), by midranks.

    positive (P,) bool, scores (P,), one row per independent case: give patients, not images. Fewer than two positive or
    negative cases: the test is NaN. Equal placements: p = 1. Differing AUCs without variance: p is NaN.
    """
    from scipy import stats

    positive, nan = np.asarray(positive, bool), float("nan")
    n_up, n_down = int(positive.sum()), int((~positive).sum())
    if min(n_up, n_down) < 1:
        return DeLong(nan, nan, nan, nan, nan)
    auc_a, up_a, down_a = _placements(positive, np.asarray(score_a, float))
    auc_b, up_b, down_b = _placements(positive, np.asarray(score_b, float))
    if min(n_up, n_down) < 2:
        return DeLong(auc_a, auc_b, nan, nan, nan)
    variance = np.var(up_a - up_b, ddof=1) / n_up + np.var(down_a - down_b, ddof=1) / n_down
    error, difference = float(np.sqrt(variance)), auc_a - auc_b
    if error < 1e-12:
        same = abs(difference) < 1e-12
        return DeLong(auc_a, auc_b, 0.0, 0.0 if same else nan, 1.0 if same else nan)
    z = difference / error
    return DeLong(auc_a, auc_b, error, z, float(2 * stats.norm.sf(abs(z))))


# ---------------------------------------------------------------------------------------------------- Holm


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm-adjusted p values of one family: the i-th smallest of m times m + 1 - i, never falling, at most 1.

    NaN where the input is NaN: such a test takes no part (Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    p = np.asarray(p_values, float)
    there = np.flatnonzero(np.isfinite(p))
    order = there[np.argsort(p[there], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted
