"""What each kind of arm trains its classifier on, from the shards of a real run."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmrhpc import validity
from cmrhpc.data.selection import training_images
from cmrhpc.errors import BadInput, Incomplete
from cmrhpc.planning import COHORT, FOLDS, inputs
from cmrhpc.shards import Shard, read_shard
from cmrhpc.stages.classify import TrainingSet, classify, training_set
from cmrhpc.stages.context import Context
from cmrhpc.stages.task import run_task
from cmrhpc.stages.training import checkpoints
from cmrhpc.workspace import Workspace
from tests.whole.conftest import context_of

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
ratios = [0.5, 1.5]
[[arms]]
name = "acgan"
ratios = [1]
[[arms]]
name = "acgan+affine"
ratios = [1]
[[arms]]
name = "acgan+simgan"
ratios = [1]
[[arms]]
name = "acgan+simgan+affine"
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


def trained_on(workspace: Workspace, arm: str, ratio: float | None = None) -> TrainingSet:
    """The training set of an arm in fold 0, at its first ratio where none is told."""
    return training_set(context_of(workspace, arm, ratio=ratio))


@pytest.fixture(scope="module")
def real(workspace: Workspace) -> tuple[torch.Tensor, np.ndarray]:
    cohort, folds = (read_shard(workspace.path(name)) for name in (COHORT, FOLDS))
    found = training_images(cohort, folds, 0, 0)
    return torch.from_numpy(found.images), found.labels


def test_repeat_real_adds_the_real_images_of_the_class_in_an_order_of_its_own(workspace: Workspace, real) -> None:  # type: ignore[no-untyped-def]
    images, labels = real
    made = trained_on(workspace, "repeat-real", 1.5)
    n = len(images)
    assert torch.equal(made.images[:n], images)
    assert made.n_added == len(made.images) - n
    for label in (0, 1):
        own = images[labels == label]
        added = made.images[n:][made.labels[n:] == label]
        assert len(added) == math.ceil(1.5 * len(own))
        first, again = added[: len(own)].flatten(1), added[len(own) :].flatten(1)
        assert sorted(first.tolist()) == sorted(own.flatten(1).tolist())  # each once before any comes twice
        assert not torch.equal(first, own.flatten(1))  # the table's first images are not favoured
        assert torch.equal(again, first[: len(again)])


def test_ratios_of_repeat_real_are_nested(workspace: Workspace) -> None:
    half, more = (trained_on(workspace, "repeat-real", ratio) for ratio in (0.5, 1.5))
    n = len(half.images) - half.n_added
    for label in (0, 1):
        few, many = (made.images[n:][made.labels[n:] == label] for made in (half, more))
        assert 0 < len(few) < len(many)
        assert torch.equal(few, many[: len(few)])


def test_each_synthetic_image_is_read_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    read, found = Shard.read_many, Counter[str]()

    def counting(shard: Shard, names: Iterable[str], rows: object = slice(None)) -> dict[str, np.ndarray]:
        got = read(shard, names, rows)
        found[shard.task["stage"]] += len(got.get("image", ()))
        return got

    monkeypatch.setattr(Shard, "read_many", counting)
    for arm in ("dae-gan", "acgan"):
        found.clear()
        added = trained_on(workspace, arm).n_added
        assert added > 0
        assert found["synthesize"] == added


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


def test_arms_of_one_size_move_their_real_images_alike(workspace: Workspace, real) -> None:  # type: ignore[no-untyped-def]
    n = len(real[0])
    one, other = (trained_on(workspace, f"{arm}+affine").images for arm in ("acgan", "acgan+simgan"))
    per_copy = len(one) // 2
    for copy in (slice(0, n), slice(per_copy, per_copy + n)):
        assert torch.equal(one[copy], other[copy])
    assert not torch.equal(one, other)


def test_arms_start_from_the_same_weights_and_see_batches_in_the_same_order(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    seeds: dict[tuple[str, int], tuple[int, int]] = {}

    def train(*_: object, init_seed: int, order_seed: int, **__: object) -> None:
        seeds[here] = (init_seed, order_seed)
        raise Asked

    monkeypatch.setattr("cmrhpc.stages.classify.train_classifier", train)
    for here in [(arm, fold) for arm in ("none", "affine", "dae-gan", "dae-gan+simgan") for fold in (0, 1)]:
        with pytest.raises(Asked):
            classify(context_of(workspace, *here))
    assert {len({told for (_, f), told in seeds.items() if f == fold}) for fold in (0, 1)} == {1}
    assert seeds["none", 0] != seeds["none", 1]


def test_every_model_of_a_class_is_trained_on_that_class_of_its_fold_alone(workspace: Workspace) -> None:
    cohort, folds = (read_shard(workspace.path(name)) for name in (COHORT, FOLDS))
    seen = 0
    for stage in ("synthesize", "refine"):
        for task in workspace.tasks(stage):
            if workspace.path(task.output).is_file():
                wanted = training_images(cohort, folds, task.repeat, task.fold, task.label).ids
                made_from = read_shard(workspace.path(task.output)).strings("train_id")
                assert sorted(made_from) == sorted(wanted), task.title
                seen += task.label is not None
    assert seen > 8


def test_a_checkpoint_of_other_data_is_refused(workspace: Workspace) -> None:
    task = next(t for t in workspace.tasks("synthesize") if t.label == 0)
    shards = {path: read_shard(workspace.path(path)) for path in inputs(workspace.study, task)}
    before = Context(workspace, task, shards, lambda: False, lambda *_: None)
    after = Context(workspace, task, shards | {COHORT: shards[FOLDS]}, lambda: False, lambda *_: None)
    checkpoints(before).save(1, {"x": torch.zeros(1)}, {})
    try:
        assert checkpoints(before).newest()
        with pytest.raises(BadInput, match=r"cohort\.h5"):
            checkpoints(after).newest()
    finally:
        checkpoints(before).clear()


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
        state = validity.states(found, ("classify",))["classify"][0]
        why = {1: "settings changed", 2: "the weights that resnet50 starts from changed"}
        assert state.reason.startswith(why[seed])
        assert not state.done
        run_task(found, "classify", 0)
        assert validity.states(Workspace(root), ("classify",))["classify"][0].done
    (tmp_path / "start.safetensors").unlink()  # where it is not at hand, it is not compared
    assert validity.states(Workspace(root), ("classify",))["classify"][0].done


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
