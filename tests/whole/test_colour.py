"""A study of three classes in colour without masks, whole: what two classes in grey do not show."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, roc_auc_score

from cmrhpc.planning import STAGES
from cmrhpc.report.result import arm_text, figure_text
from cmrhpc.report.rows import RATES, Figure
from cmrhpc.shards import read_shard
from cmrhpc.stages.classify import training_set
from cmrhpc.workspace import Workspace
from tests.data.raw_folder import write_table
from tests.report.made import visible_text
from tests.whole.conftest import cmrhpc, context_of

CLASSES = ("blue", "green", "red")  # the order in which init numbers them
ARMS = ("none", "acgan", "dae-gan+simgan")
GAN = "base_channels = 4\ngenerations = 2\nbatch = 4\nscoring_batch = 4\nlatent_dim = 8\nmax_ratio = 1\n"
STUDY = f"""
name = "colour"
seed = 3
classes = []
[data]
raw = ""
roi = "whole"
image_size = 16
[folds]
k = 2
repeats = 2
[affine]
factor = 2
[generators.dae-gan]
components = 2
{GAN}
[generators.acgan]
{GAN}
[refiners.simgan]
channels = 4
batch = 4
buffer = 8
steps = 3
pretrain_refiner = 2
pretrain_discriminator = 2
[classifiers.resnet50]
steps = 8
batch = 6
validate_every = 4
learning_rate = 0.001
[compute]
threads = 1
[primary]
classifier = "resnet50"
arm = "dae-gan+simgan"
ratio = 1
[[arms]]
name = "none"
""" + "".join(f'[[arms]]\nname = "{arm}"\nratios = [1]\n' for arm in ARMS[1:])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a finished study: four patients of each class, two PNG each, its colour the strongest."""
    root = tmp_path_factory.mktemp("colour")
    (root / "raw").mkdir()
    rng, rows = np.random.default_rng(0), []
    for label, name in enumerate(CLASSES):
        for image in range(8):
            pixels = rng.integers(0, 100, (16, 16, 3))
            pixels[..., 2 - label] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / "raw" / f"{name}{image}.png")
            rows.append({"image": f"{name}{image}.png", "label": name, "patient": f"{name}{image // 2}"})
    write_table(root / "raw", [row | {"window_low": "0", "window_high": "255"} for row in rows])
    (root / "colour.toml").write_text(STUDY)
    cmrhpc("init", root / "ws", "--study", root / "colour.toml", "--raw", root / "raw", "--channels", 3)
    cmrhpc("run", root / "ws")
    return root / "ws"


def confusions(study: Path, arm: str) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """From the predictions of an arm: confusion counts (2, K, K) per repeat, and labels and scores per repeat."""
    folder = study / "predictions" / arm / ("ratio0" if arm == "none" else "ratio1") / "resnet50"
    labels, scores = [], []
    for repeat in range(2):
        shards = [read_shard(folder / f"fold{fold}_repeat{repeat}.h5") for fold in range(2)]
        labels.append(np.concatenate([shard["label"] for shard in shards]))
        scores.append(np.concatenate([shard["score"] for shard in shards]))
    pairs = zip(labels, scores, strict=True)
    counts = np.stack([confusion_matrix(label, score.argmax(1), labels=[0, 1, 2]) for label, score in pairs])
    return counts, labels, scores


def test_every_task_is_done_and_nothing_leaks(study: Path) -> None:
    stages = json.loads(cmrhpc("plan", study, "--json").stdout)["stages"]
    # 4 folds and repeats; dae-gan and simgan per class, acgan once; three arms.
    assert {stage: stages[stage]["done"] for stage in STAGES} == dict(zip(STAGES, (1, 16, 12, 12, 1), strict=True))
    assert all(stages[stage]["missing"] == 0 for stage in STAGES)
    assert "no patient is in training and in test of the same fold" in cmrhpc("verify", study).stdout


def test_images_keep_their_colours_on_the_way_to_every_shard(study: Path) -> None:
    cohort = read_shard(study / "cohort.h5")
    assert cohort.attributes["classes"] == list(CLASSES)
    assert cohort.shapes["image"] == (24, 3, 16, 16)
    assert not cohort["mask"].any()
    with Image.open(study.parent / "raw" / "green3.png") as picture:
        pixels = np.asarray(picture)
    row = cohort.strings("id").index("r000012")
    np.testing.assert_allclose(cohort["image"][row], pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    trained_on = training_set(context_of(Workspace(study), "none"))  # what enters a network has colours in this order
    rows = [cohort.strings("id").index(one) for one in trained_on.ids]
    np.testing.assert_array_equal(trained_on.images.numpy(), cohort["image"][rows])
    paths = [*(study / "synthetic").rglob("*.h5"), *(study / "refined").rglob("*.h5")]
    assert len(paths) == 16 + 12
    for path in paths:
        made = read_shard(path)
        wanted = [made.task["label"]] if made.task["label"] is not None else [0, 1, 2]
        assert sorted(set(made["label"].tolist())) == wanted
        assert made["image"].shape[1:] == (3, 16, 16)
        assert (np.ptp(made["image"], axis=1).max((1, 2)) > 0).all()  # three channels and not one thrice


@pytest.mark.parametrize("arm", ARMS)
def test_every_image_is_tested_once_per_repeat(study: Path, arm: str) -> None:
    cohort = read_shard(study / "cohort.h5")
    label_of = dict(zip(cohort.strings("id"), cohort["label"].tolist(), strict=True))
    for repeat in range(2):
        shards = [read_shard(path) for path in (study / "predictions" / arm).rglob(f"*_repeat{repeat}.h5")]
        tested = [(one, label) for s in shards for one, label in zip(s.strings("id"), s["label"].tolist(), strict=True)]
        assert sorted(tested) == sorted(label_of.items())
        for shard in shards:
            assert shard["score"].shape[1] == 3
            np.testing.assert_allclose(shard["score"].sum(1), 1)


@pytest.mark.parametrize("arm", ARMS)
def test_the_tables_are_those_of_the_predictions(study: Path, arm: str) -> None:
    counts, labels, scores = confusions(study, arm)
    true, called, hit = counts.sum(2), counts.sum(1), np.diagonal(counts, axis1=1, axis2=2)
    spared = 1 - (called - hit) / (24 - true)
    expected = {
        "accuracy": hit.sum() / 48,
        "sensitivity": (hit / true).mean(),
        "specificity": spared.mean(),
        "balanced_accuracy": (hit / true).mean(),
        "auc": np.mean([roc_auc_score(*one, multi_class="ovr") for one in zip(labels, scores, strict=True)]),
    }
    (row,) = (row for row in csv.DictReader((study / "report/table.csv").open()) if row["arm"] == arm)
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=1e-12)
    assert (row["n_folds"], row["n_repeats"], row["n_missing"]) == ("2", "2", "0")

    page = visible_text((study / "report/index.html").read_text())
    rows = [row for row in csv.DictReader((study / "report/classes.csv").open()) if row["arm"] == arm]
    assert [row["class"] for row in rows] == list(CLASSES)
    for k, row in enumerate(rows):
        found, all_called = hit.sum(0)[k], called.sum(0)[k]
        assert float(row["recall"]) == pytest.approx(found / 16)
        precision = float(row["precision"] or "nan")  # empty where the class is never called
        assert precision == pytest.approx(found / all_called if all_called else np.nan, nan_ok=True)
        assert float(row["f1"]) == pytest.approx(2 * found / (16 + all_called))
        assert [float(row[f"predicted_{c}"]) for c in range(3)] == counts.mean(0)[k].tolist()
        figures = {m: Figure(*(float(row[m + end] or "nan") for end in ("", "_low", "_high"))) for m in RATES}
        told = " ".join(figure_text(name, figure) for name, figure in figures.items())
        assert f"resnet50 {arm_text(arm, float(row['ratio']))} {CLASSES[k]} {told}" in page
