"""Cross-validation folds by patient, stratified by class (METHODS M2).

Patients of each class are dealt out one by one, the rarest class first, each to the fold that has the fewest patients
of that class so far. So folds differ by at most one patient per class, and every test fold holds every class whenever a
class has as many patients as there are folds. scikit-learn's StratifiedGroupKFold balances image counts instead and
promises neither. (Where a patient has images of several classes both are best effort, and what is lacking is told.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cmrhpc.errors import BadInput
from cmrhpc.seeds import derive_seed
from cmrhpc.study import Folds

PARTS = ("train", "validation", "test")
ATTEMPTS = 200


@dataclass(frozen=True)
class Split:
    """Ids of one fold, each part in the order of the cohort; every id of the cohort is in exactly one part."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def check_counts(
    groups: Sequence[str], label: np.ndarray, folds: Folds, n_classes: int, classes: Sequence[str] = ()
) -> None:
    """Raises BadInput when a class has no image, or fewer patients (images, with group_by image) than folds.

    groups, label: one entry per image. classes: names for the message; without, a class is named by its index.
    """
    unit = "images" if folds.group_by == "image" else "patients"
    for index in range(n_classes):
        name = classes[index] if classes else str(index)
        count = len({group for group, own in zip(groups, label.tolist(), strict=True) if own == index})
        if count == 0:
            mend = "every class of the study needs images: mend the table, or `classes` in study.toml"
            raise BadInput(f'no image of class "{name}"', "column label", mend)
        if count < folds.k:
            mend = f"set k to {count} or less" if count >= 2 else "add patients: the class needs two at least"
            units = unit.removesuffix("s") if count == 1 else unit
            what = f'class "{name}" has {count} {units}, fewer than the {folds.k} folds'
            raise BadInput(what, "study.toml [folds] k", mend)


def make_folds(
    ids: Sequence[str],
    patient: Sequence[str],
    label: np.ndarray,
    folds: Folds,
    n_classes: int,
    seed: int,
    classes: Sequence[str] = (),
) -> tuple[dict[tuple[int, int], Split], list[str]]:
    """All splits of a study, (repeat, fold) -> Split, and warnings about classes that a part lacks.

    ids, patient, label: one entry per image, label an index below n_classes; a patient's images may differ in label.
    Every image is tested exactly once per repeat. Validation patients are cut from the training patients of the fold,
    the same share of every class, at least one where the class has two, and never its last one: then the validation set
    lacks the class. group_by "image" treats every image as a patient of its own, as the papers do.

    Raises BadInput for a class with fewer patients than folds, and for a fold whose validation set would be empty. The
    result depends on the arguments alone.
    """
    label = np.asarray(label)
    groups = list(ids) if folds.group_by == "image" else list(patient)
    check_counts(groups, label, folds, n_classes, classes)
    names = list(dict.fromkeys(groups))
    where = {name: index for index, name in enumerate(names)}
    member = np.array([where[name] for name in groups])
    counts = np.zeros((len(names), n_classes), np.int64)
    np.add.at(counts, (member, label), 1)
    splits: dict[tuple[int, int], Split] = {}
    warnings: list[str] = []
    for repeat in range(folds.repeats):
        test_fold = _deal(counts, folds.k, derive_seed(seed, "test", repeat))
        for fold in range(folds.k):
            rng = np.random.default_rng(derive_seed(seed, "validation", repeat, fold))
            held = _cut(counts * (test_fold != fold)[:, None], folds.validation_fraction, rng)
            if not held.any():
                unit = "image" if folds.group_by == "image" else "patient"
                what = f"repeat {repeat} fold {fold}: the validation set is empty, no class can spare a training {unit}"
                raise BadInput(what, "study.toml [folds]", _more_to_train_on(counts, folds))
            part = np.where(test_fold == fold, 2, np.where(held, 1, 0))[member]
            chosen = [tuple(ids[i] for i in np.flatnonzero(part == p).tolist()) for p in range(3)]
            splits[repeat, fold] = Split(chosen[0], chosen[1], chosen[2])
            for p, name in enumerate(PARTS):
                absent = [c for c in range(n_classes) if not (label[part == p] == c).any()]
                for title in (classes[c] if classes else str(c) for c in absent):
                    warnings.append(f'repeat {repeat} fold {fold}: the {name} set has no image of class "{title}"')
    return splits, warnings


def _more_to_train_on(counts: np.ndarray, folds: Folds) -> str:
    """How every class gets a second training patient: more of them, or more folds, which test fewer at a time."""
    most = int((counts > 0).sum(axis=0).min())
    mend = "add patients, so that a class has two in each training set"
    return f"{mend}, or set k to {most}" if most > folds.k else mend


def _deal(counts: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Test fold of each patient; counts (patients, classes) of images."""
    best = np.zeros(0, np.int64)
    fewest = np.inf
    for attempt in range(ATTEMPTS):
        fold = _deal_once(counts, k, np.random.default_rng(derive_seed(seed, attempt)))
        held = np.stack([(counts[fold == f] > 0).sum(axis=0) for f in range(k)])
        missing = int((held == 0).sum())
        if missing < fewest:
            best, fewest = fold, missing
        if missing == 0:  # only patients with images of several classes can make this fail
            break
    return best


def _deal_once(counts: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    fold = np.full(len(counts), -1)
    per_class, images = np.zeros((k, counts.shape[1]), np.int64), np.zeros(k, np.int64)
    order = rng.permutation(len(counts))
    tie = rng.permutation(k)  # so that no fold is always the first
    for c in np.argsort((counts > 0).sum(axis=0), kind="stable"):
        for group in order[(counts[order, c] > 0) & (fold[order] < 0)]:
            patients = per_class.sum(axis=1)
            f = min(range(k), key=lambda f: (per_class[f, c], patients[f], images[f], tie[f]))
            fold[group] = f
            per_class[f] += counts[group] > 0
            images[f] += counts[group].sum()
    return fold


def _cut(counts: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which training patients go to validation; counts (patients, classes) is zero for test patients."""
    has = counts > 0
    total = has.sum(axis=0)
    cut = np.zeros_like(total)  # patients held so far, per class
    held = np.zeros(len(counts), bool)
    order = rng.permutation(len(counts))
    for c in np.argsort(total, kind="stable"):
        wanted = min(max(1, round(fraction * total[c])), total[c] - 1)
        for group in order[has[order, c] & ~held[order]]:
            if cut[c] >= wanted:
                break
            if (total - cut)[has[group]].min() >= 2:
                held[group] = True
                cut += has[group]
    return held
