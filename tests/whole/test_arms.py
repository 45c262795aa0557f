"""What each kind of arm trains its classifier on, from the shards of a real run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cmrhpc.data.selection import training_images
from cmrhpc.errors import Incomplete
from cmrhpc.planning import COHORT, FOLDS, inputs
from cmrhpc.shards import read_shard
from cmrhpc.stages.classify import TrainingSet, training_set
from cmrhpc.stages.task import Context, run_task
from cmrhpc.workspace import Workspace

ACGAN = """
[generators.acgan]
base_channels = 4
generations = 3
batch = 4
scoring_batch = 4
latent_dim = 8
max_ratio = 2
"""
ARMS = """
[[arms]]
name = "repeat-real"
ratios = [1.5]
[[arms]]
name = "acgan"
ratios = [1]
[[arms]]
name = "acgan+simgan"
ratios = [1]
[primary]"""


@pytest.fixture(scope="module")
def workspace(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The finished study with three more arms, their generator and refiners of fold 0 trained."""
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("arms") / "ws", symlinks=True))
    text = (root / "study.toml").read_text().replace("[refiners.simgan]", f"{ACGAN}[refiners.simgan]")
    (root / "study.toml").write_text(text.replace("[primary]", ARMS))
    found = Workspace(root)
    for stage in ("synthesize", "refine"):
        for index, task in enumerate(found.tasks(stage)):
            if task.generator == "acgan" and task.fold == 0:
                run_task(found, stage, index)
    return found


def trained_on(workspace: Workspace, arm: str) -> TrainingSet:
    """The training set of an arm in fold 0."""
    task = next(t for t in workspace.tasks("classify") if t.arm == arm and t.fold == 0)
    shards = {path: read_shard(workspace.path(path)) for path in inputs(workspace.study, task)}
    return training_set(Context(workspace, task, shards, lambda: False, lambda *_: None))


@pytest.fixture(scope="module")
def real(workspace: Workspace) -> tuple[torch.Tensor, np.ndarray]:
    cohort, folds = (read_shard(workspace.path(name)) for name in (COHORT, FOLDS))
    found = training_images(cohort, folds, 0, 0)
    return torch.from_numpy(found.images), found.labels


def test_repeat_real_adds_the_real_images_of_the_class_in_turn(workspace: Workspace, real) -> None:  # type: ignore[no-untyped-def]
    images, labels = real
    made = trained_on(workspace, "repeat-real")
    n = len(images)
    assert torch.equal(made.images[:n], images)
    assert made.n_added == len(made.images) - n
    for label in (0, 1):
        own = images[labels == label]
        added = made.images[n:][made.labels[n:] == label]
        assert len(added) == math.ceil(1.5 * len(own))
        assert torch.equal(added, torch.cat([own, own])[: len(added)])


@pytest.mark.parametrize("arm", ["acgan", "acgan+simgan"])
def test_one_conditional_model_gives_each_class_its_own(workspace: Workspace, real, arm: str) -> None:  # type: ignore[no-untyped-def]
    images, labels = real
    made, n = trained_on(workspace, arm), len(images)
    synthetic = read_shard(workspace.path("synthetic/acgan/fold0_repeat0_classes.h5"))
    assert synthetic["label"].tolist() == [c for c in (0, 1) for _ in range(2 * (labels == c).sum())]
    assert torch.equal(made.images[:n], images)
    for label in (0, 1):
        added = made.images[n:][made.labels[n:] == label]
        own = torch.from_numpy(synthetic["image"][synthetic["label"] == label][: len(added)])
        assert len(added) == (labels == label).sum()
        assert torch.equal(added, own) == (arm == "acgan")


def test_affine_moves_every_image_and_adds_none(workspace: Workspace, real) -> None:  # type: ignore[no-untyped-def]
    images, labels = real
    made = trained_on(workspace, "affine")
    assert (len(made.images), made.n_added) == (2 * len(images), 0)
    assert made.labels.tolist() == labels.tolist() * 2


def test_weights_to_start_from_are_an_input(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from cmrhpc.nets.classifiers import build_classifier

    root = Path(shutil.copytree(finished, tmp_path / "ws", symlinks=True))
    text = (root / "study.toml").read_text()
    (root / "study.toml").write_text(
        text.replace("[classifiers.resnet50]", '[classifiers.resnet50]\nweights = "../start.safetensors"')
    )
    for seed in (1, 2):  # somebody puts other weights there
        save_file(build_classifier("resnet50", 1, 2, seed).state_dict(), tmp_path / "start.safetensors")
        found = Workspace(root)
        state = found.states(("classify",))["classify"][0]
        why = {1: "settings changed", 2: "the weights that resnet50 starts from changed"}
        assert state.reason.startswith(why[seed])
        assert not state.done
        run_task(found, "classify", 0)
        assert Workspace(root).states(("classify",))["classify"][0].done
    (tmp_path / "start.safetensors").unlink()  # where it is not at hand, it is not compared
    assert Workspace(root).states(("classify",))["classify"][0].done


def test_a_task_of_an_older_study_does_not_replace_what_was_done_anew(finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "ws", symlinks=True))
    text = (root / "study.toml").read_text()
    (root / "study.toml").write_text(
        text.replace("[classifiers.resnet50]", "[classifiers.resnet50]\nlearning_rate = 0.002")
    )
    assert (root / "study.toml").read_text() != text
    older = Workspace(root)
    (root / "study.toml").write_text(text)  # and the shard of this study is there
    path = root / older.tasks("classify")[0].output
    before = read_shard(path).content_sha256
    with pytest.raises(Incomplete, match="this result is dropped"):
        run_task(older, "classify", 0)
    assert read_shard(path).content_sha256 == before
    (root / "study.toml").write_text("in the middle of an edit")
    run_task(older, "classify", 0)
    assert read_shard(path).content_sha256 != before
