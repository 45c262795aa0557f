"""The one way into training: right images in the right order, and no leak gets through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cmrhpc.data import selection
from cmrhpc.data.dataset import ShardDataset
from cmrhpc.data.folds import PARTS, make_folds
from cmrhpc.data.selection import held_out_images, training_images
from cmrhpc.errors import BadInput, Damage
from cmrhpc.shards import Shard, read_shard, text_array, write_shard
from cmrhpc.study import Folds

N = 24
LABELS = np.arange(N) // 2 % 2
PATIENTS = [f"p{i // 2:04d}" for i in range(N)]
IDS = [f"r{i + 1:06d}" for i in range(N)]
RAW = {"task": {}, "settings": {}, "inputs": {}, "seed": 0}


@pytest.fixture
def cohort(tmp_path: Path) -> Shard:
    images = np.random.default_rng(0).uniform(-1, 1, (N, 1, 6, 5)).astype(np.float32)
    datasets = {"image": images, "label": LABELS, "patient": text_array(PATIENTS), "id": text_array(IDS)}
    write_shard(tmp_path / "cohort.h5", datasets, schema="cohort-1", attributes={"classes": ["0", "1"]}, **RAW)
    return read_shard(tmp_path / "cohort.h5")


def folds_shard(folder: Path, parts: dict[str, list[str]] | None = None, group_by: str = "patient") -> Shard:
    splits, _ = make_folds(IDS, PATIENTS, LABELS, Folds(k=3, repeats=1, group_by=group_by), 2, 0)
    datasets = {f"repeat0_fold{f}_{p}": text_array(getattr(splits[0, f], p)) for f in range(3) for p in PARTS}
    datasets |= {f"repeat0_fold0_{name}": text_array(ids) for name, ids in (parts or {}).items()}
    write_shard(folder / "folds.h5", datasets, schema="folds-1", attributes={"group_by": group_by}, **RAW)
    return read_shard(folder / "folds.h5")


@pytest.mark.parametrize("block", [4096, 5])
def test_images_labels_and_ids_belong_together(
    tmp_path: Path, cohort: Shard, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "BLOCK", block)
    folds = folds_shard(tmp_path)
    train = training_images(cohort, folds, 0, 1)
    test = held_out_images(cohort, folds, 0, 1, "test")
    validation = held_out_images(cohort, folds, 0, 1, "validation")
    assert sorted(train.ids + test.ids + validation.ids) == IDS
    for part in (train, test, validation):
        rows = [IDS.index(i) for i in part.ids]
        assert rows == sorted(rows)
        assert np.array_equal(part.images, cohort["image"][rows])
        assert part.labels.tolist() == LABELS[rows].tolist()
        assert part.patients == [PATIENTS[i] for i in rows]
    of_class = training_images(cohort, folds, 0, 1, label=1)
    assert set(of_class.labels.tolist()) == {1}
    assert of_class.ids == [i for i in train.ids if LABELS[IDS.index(i)] == 1]


def test_an_empty_validation_part_is_empty_arrays(tmp_path: Path, cohort: Shard) -> None:
    split = folds_shard(tmp_path)
    train = split.strings("repeat0_fold0_train") + split.strings("repeat0_fold0_validation")
    folds = folds_shard(tmp_path, {"train": train, "validation": []})
    assert held_out_images(cohort, folds, 0, 0, "validation").images.shape == (0, 1, 6, 5)


def leaks(folds: Shard) -> dict[str, dict[str, list[str]]]:
    train, validation, test = (folds.strings(f"repeat0_fold0_{part}") for part in PARTS)
    sibling = IDS[IDS.index(test[0]) ^ 1]  # the other image of the same patient
    return {
        "test image in training": {"train": [*train, test[0]]},
        "sibling in training": {"train": [*train, sibling], "test": [i for i in test if i != sibling]},
        "sibling in validation": {"validation": [*validation, sibling], "test": [i for i in test if i != sibling]},
        "training patient in validation": {"train": train[1:], "validation": [*validation, train[0]]},
        "unknown id": {"train": [*train[:-1], "r999999"]},
        "lost id": {"train": train[:-1]},
        "id twice": {"train": [*train, train[0]]},
    }


@pytest.mark.parametrize("leak", range(7))
def test_a_planted_leak_is_damage(tmp_path: Path, cohort: Shard, leak: int) -> None:
    name, parts = list(leaks(folds_shard(tmp_path)).items())[leak]
    folds = folds_shard(tmp_path, parts)
    for call in (
        lambda: training_images(cohort, folds, 0, 0),
        lambda: training_images(cohort, folds, 0, 0, label=0),
        lambda: held_out_images(cohort, folds, 0, 0, "test"),
        lambda: held_out_images(cohort, folds, 0, 0, "validation"),
    ):
        with pytest.raises(Damage, match="leak") as caught:
            call()
        assert caught.value.exit_code == 5, name
    training_images(cohort, folds, 0, 1)  # the other folds are sound


def test_folds_by_image_may_share_patients_but_no_image(tmp_path: Path, cohort: Shard) -> None:
    folds = folds_shard(tmp_path, group_by="image")
    train, test = training_images(cohort, folds, 0, 0), held_out_images(cohort, folds, 0, 0, "test")
    assert set(train.patients) & set(test.patients)
    assert not set(train.ids) & set(test.ids)
    planted = folds_shard(tmp_path, {"train": [*train.ids, test.ids[0]]}, group_by="image")
    with pytest.raises(Damage):
        training_images(cohort, planted, 0, 0)


def test_an_absent_fold_is_damage(tmp_path: Path, cohort: Shard) -> None:
    with pytest.raises(Damage, match="do not hold repeat 0 fold 7"):
        training_images(cohort, folds_shard(tmp_path), 0, 7)


def test_torch_dataset_over_a_shard(tmp_path: Path, cohort: Shard) -> None:
    data = ShardDataset(cohort.path)
    assert len(data) == N
    image, label = data[3]
    assert np.array_equal(image.numpy(), cohort["image"][3])
    assert (label, type(label)) == (1, int)
    assert data.classes == ["0", "1"]
    with pytest.raises(BadInput, match="holds no images"):
        ShardDataset(folds_shard(tmp_path).path)
