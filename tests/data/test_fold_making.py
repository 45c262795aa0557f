"""Folds: every image tested once, patients never cross, classes in every part. Properties over random cohorts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cmrhpc.data.folds import Split, make_folds
from cmrhpc.errors import BadInput
from cmrhpc.seeds import derive_seed
from cmrhpc.study import Folds


def cohort(per_class: list[int], seed: int, most: int = 4) -> tuple[list[str], list[str], np.ndarray]:
    """ids, patients, labels of a shuffled cohort; every patient has one class and 1 to `most` images."""
    rng = np.random.default_rng(seed)
    people = [(f"p{c}_{n}", c) for c, count in enumerate(per_class) for n in range(count)]
    images = [person for person in people for _ in range(int(rng.integers(1, most + 1)))]
    rng.shuffle(images)
    ids = [f"r{i + 1:06d}" for i in range(len(images))]
    return ids, [str(name) for name, _ in images], np.array([int(c) for _, c in images])


def groups(split: Split, patient_of: dict[str, str]) -> list[set[str]]:
    return [{patient_of[i] for i in part} for part in (split.train, split.validation, split.test)]


def test_every_fold_of_every_repeat_draws_its_own_validation_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def seed_of(*parts: object) -> int:
        asked.append(parts)
        return derive_seed(*parts)  # type: ignore[arg-type]

    monkeypatch.setattr("cmrhpc.data.folds.derive_seed", seed_of)
    ids, patients, labels = cohort([8, 8], 1)
    make_folds(ids, patients, labels, Folds(k=3, repeats=2), 2, 5)
    drawn = [parts for parts in asked if "validation" in parts]
    assert len(drawn) == len(set(drawn)) == 2 * 3


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(5, 14), min_size=2, max_size=4),
    st.integers(2, 5),
    st.integers(1, 3),
    st.floats(0.05, 0.5),
    st.integers(0, 2**32),
)
def test_properties_of_every_split(per_class: list[int], k: int, repeats: int, fraction: float, seed: int) -> None:
    ids, patients, labels = cohort(per_class, seed)
    folds = Folds(k=k, repeats=repeats, validation_fraction=fraction)
    splits, warnings = make_folds(ids, patients, labels, folds, len(per_class), seed)
    patient_of, label_of = dict(zip(ids, patients, strict=True)), dict(zip(ids, labels.tolist(), strict=True))
    class_of = {p: label_of[i] for i, p in patient_of.items()}
    assert sorted(splits) == [(r, f) for r in range(repeats) for f in range(k)]
    assert not warnings  # five patients per class and at most five folds leave three to train on
    for repeat in range(repeats):
        tested = [i for f in range(k) for i in splits[repeat, f].test]
        assert sorted(tested) == ids  # exactly once
        for c, count in enumerate(per_class):
            sizes = [sum(class_of[p] == c for p in groups(splits[repeat, f], patient_of)[2]) for f in range(k)]
            assert max(sizes) - min(sizes) <= 1  # stratified to the patient
            assert sum(sizes) == count
    for split in splits.values():
        train, validation, test = groups(split, patient_of)
        assert len(train | validation | test) == len(train) + len(validation) + len(test)
        assert sorted(split.train + split.validation + split.test) == ids
        assert list(split.train) == sorted(split.train)  # in the order of the cohort
        for c in range(len(per_class)):
            here = [sum(class_of[p] == c for p in part) for part in (train, validation, test)]
            assert min(here) >= 1
            assert here[1] == min(max(1, round(fraction * (here[0] + here[1]))), here[0] + here[1] - 1)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(8, 30), st.integers(2, 4), st.integers(2, 3), st.integers(0, 2**32))
def test_patients_with_images_of_several_classes_stay_whole(people: int, k: int, n_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients = [f"p{int(rng.integers(people))}" for _ in range(people * 3)] + [f"q{c}" for c in range(n_classes)] * k
    labels = rng.integers(0, n_classes, len(patients))
    ids = [f"r{i:06d}" for i in range(len(patients))]
    try:
        splits, warnings = make_folds(ids, patients, labels, Folds(k=k, repeats=1), n_classes, seed)
    except BadInput:
        return
    patient_of = dict(zip(ids, patients, strict=True))
    assert sorted(i for f in range(k) for i in splits[0, f].test) == ids
    for (repeat, fold), split in splits.items():
        train, validation, test = groups(split, patient_of)
        assert len(train | validation | test) == len(train) + len(validation) + len(test)
        for name, part in (("train", split.train), ("validation", split.validation), ("test", split.test)):
            for c in set(range(n_classes)) - {int(labels[ids.index(i)]) for i in part}:
                assert f'repeat {repeat} fold {fold}: the {name} set has no image of class "{c}"' in warnings


def test_the_same_arguments_give_the_same_folds_and_repeats_differ() -> None:
    ids, patients, labels = cohort([7, 9], 3)
    first, _ = make_folds(ids, patients, labels, Folds(k=3, repeats=4), 2, 5)
    again, _ = make_folds(ids, patients, labels, Folds(k=3, repeats=4), 2, 5)
    more, _ = make_folds(ids, patients, labels, Folds(k=3, repeats=6), 2, 5)
    other, _ = make_folds(ids, patients, labels, Folds(k=3, repeats=4), 2, 6)
    assert first == again
    assert all(more[place] == split for place, split in first.items())  # more repeats change no earlier one
    assert first != other
    assert len({split.test for split in first.values()}) == 12


def test_by_image_reproduces_the_papers_and_crosses_patients() -> None:
    ids, patients, labels = cohort([3, 3], 1, most=12)
    splits, _ = make_folds(ids, patients, labels, Folds(k=5, repeats=1, group_by="image"), 2, 0)
    assert sorted(i for f in range(5) for i in splits[0, f].test) == ids
    patient_of = dict(zip(ids, patients, strict=True))
    train, _, test = groups(splits[0, 0], patient_of)
    assert train & test


def test_a_class_with_one_training_patient_keeps_it_and_says_so() -> None:
    ids, patients, labels = cohort([2, 8], 0)
    splits, warnings = make_folds(ids, patients, labels, Folds(k=2, repeats=1), 2, 0, ("rare", "common"))
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    for split in splits.values():
        assert {label_of[i] for i in split.train} == {0, 1}
        assert {label_of[i] for i in split.validation} == {1}
    assert warnings == [f'repeat 0 fold {f}: the validation set has no image of class "rare"' for f in range(2)]


@pytest.mark.parametrize("group_by", ["patient", "image"])
def test_an_empty_validation_set_is_bad_input(group_by: str) -> None:
    """Two patients of each class in two folds leave one each to train on, which the validation set cannot take."""
    ids, patients, labels = cohort([2, 2], 0, most=1)
    with pytest.raises(BadInput, match="repeat 0 fold 0: the validation set is empty") as caught:
        make_folds(ids, patients, labels, Folds(k=2, group_by=group_by), 2, 0)
    assert caught.value.exit_code == 3
    assert caught.value.mend == "add patients, so that a class has two in each training set"


def test_more_folds_help_an_empty_validation_set_where_patients_have_both_classes() -> None:
    patients = [f"p{n}" for n in range(3) for _ in range(2)]
    ids, labels = [f"r{i}" for i in range(6)], np.array([0, 1] * 3)
    with pytest.raises(BadInput, match="validation set") as caught:
        make_folds(ids, patients, labels, Folds(k=2), 2, 0)
    assert caught.value.mend.endswith("or set k to 3")
    splits, _ = make_folds(ids, patients, labels, Folds(k=3), 2, 0)
    assert all(split.validation for split in splits.values())


def test_more_folds_than_patients_of_a_class_is_bad_input() -> None:
    ids, patients, labels = cohort([3, 9], 0)
    with pytest.raises(BadInput, match='class "rare" has 3 patients, fewer than the 4 folds') as caught:
        make_folds(ids, patients, labels, Folds(k=4), 2, 0, ("rare", "common"))
    assert caught.value.exit_code == 3
    with pytest.raises(BadInput, match='no image of class "2"'):
        make_folds(ids, patients, labels, Folds(k=2), 3, 0)


def test_image_counts_are_balanced_where_patients_allow() -> None:
    """Patients of 1 to 30 images: no fold gets nearly all of them."""
    rng = np.random.default_rng(0)
    patients = [f"p{n}" for n in range(40) for _ in range(int(rng.integers(1, 31)))]
    labels = np.array([int(p[1:]) % 2 for p in patients])
    ids = [f"r{i:06d}" for i in range(len(patients))]
    splits, _ = make_folds(ids, patients, labels, Folds(k=5, repeats=5), 2, 0)
    shares = [len(split.test) / len(ids) for split in splits.values()]
    assert 0.1 < min(shares) <= max(shares) < 0.32
