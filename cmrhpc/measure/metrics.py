"""Classification metrics from (label, score) per image ([DAE] 13-15; METHODS M10, M12).

The predicted class is the one with the highest score; among equal scores the lowest class index, which in a binary
study is the negative class. A metric that the labels do not define (a class is absent) is NaN and never 0 or 1.
With more than two classes sensitivity, specificity and AUC are unweighted means over classes, each against the rest.
"""

from __future__ import annotations

import numpy as np

from cmrhpc.errors import BadInput, Damage

IDENTITY_TOLERANCE = 1e-12
MAX_PAIRS = 1_000_000  # pairs of patients that are held in memory


def check_scores(label: np.ndarray, score: np.ndarray) -> str:
    """Empty when label (N,) in 0..K-1 and score (N, K) finite can be measured, otherwise what is wrong, in words."""
    if score.ndim != 2 or label.shape != score.shape[:1]:
        return f"labels of shape {label.shape} do not fit scores of shape {score.shape}"
    if score.shape[1] < 2:
        return "scores of fewer than two classes"
    if len(label) == 0:
        return "no image"
    bad = ~np.isfinite(score).all(axis=1)
    if bad.any():
        return f"scores of {int(bad.sum())} of {len(bad)} images are not finite"
    if label.min() < 0 or label.max() >= score.shape[1]:
        return f"labels outside 0 to {score.shape[1] - 1}"
    return ""


def predicted_class(score: np.ndarray) -> np.ndarray:
    """Class index (N,) with the highest of scores (N, K); the lowest index among equals."""
    return np.asarray(score).argmax(axis=1)


def confusion(label: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts (K, K): row is the true class, column the predicted one."""
    flat = np.asarray(label) * n_classes + np.asarray(predicted)
    return np.bincount(flat, minlength=n_classes**2).reshape(n_classes, n_classes)


def rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """accuracy, sensitivity, specificity, balanced_accuracy from confusion counts (..., K, K), over the last two axes.

    Counts may be weights (bootstrap). A rate without denominator is NaN.
    """
    counts = np.asarray(counts, float)
    n_classes = counts.shape[-1]
    total = counts.sum((-2, -1))
    true, called = counts.sum(-1), counts.sum(-2)  # images of the class, images called so
    hit = np.einsum("...kk->...k", counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = hit.sum(-1) / total
        recall = hit / true
        rest = total[..., None] - true
        spared = (rest - (called - hit)) / rest  # one class against the rest: share of the rest that is not called so
    if n_classes == 2:
        sensitivity, specificity = recall[..., 1], recall[..., 0]
    else:
        sensitivity, specificity = recall.mean(-1), spared.mean(-1)
    return {
        "accuracy": accuracy,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "balanced_accuracy": recall.mean(-1),
    }


def check_identity(counts: np.ndarray) -> None:
    """Assert accuracy = recall of each class weighted by its prevalence, to 1e-12 (binary: sensitivity, specificity).

    counts (K, K). Raises Damage when it fails: then a number of the table would be wrong.
    """
    counts = np.asarray(counts, float)
    prevalence = counts.sum(1) / counts.sum()
    measured = rates(counts)
    if counts.shape[0] == 2:
        recall = np.array([measured["specificity"], measured["sensitivity"]])
    else:
        with np.errstate(invalid="ignore"):
            recall = np.diag(counts) / counts.sum(1)
    weighted = float((prevalence * np.nan_to_num(recall))[prevalence > 0].sum())
    if not abs(weighted - float(measured["accuracy"])) <= IDENTITY_TOLERANCE:
        raise Damage(f"accuracy {float(measured['accuracy'])!r} is not the prevalence-weighted recall {weighted!r}")


def auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    positive (N,) bool, score (N,), weights (B, N) or (N,) of each image (default 1). Returns (B,) or a scalar; NaN
    where the weights leave no positive or no negative.
    """
    positive, score = np.asarray(positive, bool), np.asarray(score, float)
    order = np.argsort(score, kind="stable")
    weights = np.ones(len(score)) if weights is None else np.asarray(weights, float)
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # first of each group of equal scores
    ordered = weights[..., order]
    up = np.add.reduceat(ordered * positive[order], starts, axis=-1)
    down = np.add.reduceat(ordered * ~positive[order], starts, axis=-1)
    below = np.cumsum(down, axis=-1) - down / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((up * below).sum(-1) / (up.sum(-1) * down.sum(-1)))


def roc(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the ROC curve from (0, 0) to (1, 1): share of negatives, share of positives at or above a score."""
    from sklearn.metrics import roc_curve

    negatives, positives, _ = roc_curve(np.asarray(positive, bool), score, drop_intermediate=False)
    return negatives, positives


def clustered_auc(positive: np.ndarray, score: np.ndarray, owner: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`auc` (B,) where image i weighs weights[:, owner[i]]; weights (B, P) of patients, owner (N,) in 0..P-1.

    Few patients: pairs won are counted once per pair of patients, and a draw is then a small bilinear form.
    """
    positive, score, owner = np.asarray(positive, bool), np.asarray(score, float), np.asarray(owner)
    if not positive.any() or positive.all():
        return np.full(len(weights), np.nan)
    sides = []
    for side in (positive, ~positive):
        order = np.flatnonzero(side)[np.argsort(owner[side], kind="stable")]
        patients, starts, counts = np.unique(owner[order], return_index=True, return_counts=True)
        sides.append((score[order], patients, starts, counts))
    (up, up_patients, up_starts, up_counts), (down, down_patients, down_starts, down_counts) = sides
    if len(up_patients) * len(down_patients) > MAX_PAIRS or len(up) * len(down) > 16 * MAX_PAIRS:
        chunk = max(1, 4 * MAX_PAIRS // len(score))
        parts = np.split(weights, range(chunk, len(weights), chunk))
        return np.concatenate([auc(positive, score, part[:, owner]) for part in parts])
    won = (up[:, None] > down) + 0.5 * (up[:, None] == down)
    pairs = np.add.reduceat(np.add.reduceat(won, down_starts, axis=1), up_starts, axis=0)
    of_up, of_down = weights[:, up_patients], weights[:, down_patients]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((of_up @ pairs) * of_down).sum(1) / ((of_up @ up_counts) * (of_down @ down_counts))


def class_score(score: np.ndarray, k: int) -> np.ndarray:
    """What images are ranked by for class k (N,): its softmax score of scores (N, K).

    A softmax of 36 and more ahead is 1 in float64, where all of these would tie; near 0 none do. So among scores of 1
    those go first whose other classes' scores are lower.
    """
    own, rest = score[:, k], score.sum(1, where=np.arange(score.shape[1]) != k)
    return np.where(own == 1, 1 - np.log(np.maximum(rest, np.finfo(float).smallest_subnormal)), own)


def class_auc(
    label: np.ndarray, score: np.ndarray, owner: np.ndarray | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUC of scores (N, K): of the positive class in a binary study, otherwise the mean over classes against the rest.

    With owner (N,) and weights (B, P) as `clustered_auc`.
    """

    def one(k: int) -> np.ndarray:
        if owner is None or weights is None:
            return auc(label == k, class_score(score, k))
        return clustered_auc(label == k, class_score(score, k), owner, weights)

    return one(1) if score.shape[1] == 2 else np.mean([one(k) for k in range(score.shape[1])], axis=0)


def measure(label: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """All METRICS of label (N,) and score (N, K), fractions in [0, 1]. Raises BadInput for NaN scores or bad labels."""
    label, score = np.asarray(label), np.asarray(score, float)
    wrong = check_scores(label, score)
    if wrong:
        raise BadInput(wrong, "scores", "compute this shard again")
    counts = confusion(label, predicted_class(score), score.shape[1])
    check_identity(counts)
    found = {name: float(value) for name, value in rates(counts).items()}
    return found | {"auc": float(class_auc(label, score))}


def per_class(counts: np.ndarray) -> dict[str, np.ndarray]:
    """precision, recall and f1 (..., K) from confusion counts (..., K, K), each class against the rest.

    NaN when undefined. F1 = 2 TP / (2 TP + FP + FN): a class that is there and never called has precision NaN and F1 0.
    """
    counts = np.asarray(counts, float)
    hit, true, called = np.einsum("...kk->...k", counts), counts.sum(-1), counts.sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"precision": hit / called, "recall": hit / true, "f1": 2 * hit / (true + called)}
