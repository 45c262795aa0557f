"""One classifier on the training set of one arm and fold -> predictions for every test image of the fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from cmrhpc import shards
from cmrhpc.data.selection import held_out_images, training_images
from cmrhpc.errors import BadInput
from cmrhpc.hashing import canonical, sha256_file
from cmrhpc.names import PREDICTIONS_SCHEMA
from cmrhpc.planning import COHORT, FOLDS, WEIGHTS, images_wanted
from cmrhpc.seeds import derive_seed
from cmrhpc.stages.context import Context
from cmrhpc.stages.device import about, choose_device
from cmrhpc.stages.training import TrainingLog, checkpoints
from cmrhpc.study import arm_parts
from cmrhpc.train.affine import expand
from cmrhpc.train.classify import train_classifier


@dataclass(frozen=True)
class TrainingSet:
    """images (N, C, H, W) float32 in [-1, 1], labels (N,) int64, ids of the real ones, count of the others."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: list[str]
    n_added: int


def training_set(context: Context) -> TrainingSet:
    """The arm's training set: real, then per class the first ratio x n synthetic (or repeated) images, then affine.

    `repeat-real` repeats the images of a class in an order that is drawn once for all ratios.
    Raises BadInput when a shard holds fewer images than the ratio asks for.
    """
    study, task = context.workspace.study, context.task
    parts = arm_parts(task.arm, study)
    real = training_images(context.inputs[COHORT], context.inputs[FOLDS], task.repeat, task.fold)
    images, labels = [real.images], [real.labels]
    made = {p: s for p, s in context.inputs.items() if p not in (COHORT, FOLDS)}
    for label in range(len(study.classes)):
        own = np.flatnonzero(real.labels == label)
        count = images_wanted(task.ratio, len(own))
        if not count or not (parts.generator or parts.repeat_real):
            continue
        if parts.repeat_real:
            seed = derive_seed(study.seed, "repeat-real", task.fold, task.repeat, label)
            images.append(real.images[np.resize(np.random.default_rng(seed).permutation(own), count)])
        else:
            images.append(_first_images(made.values(), label, count))
            if len(images[-1]) < count:
                what = f"{len(images[-1])} images of class {label}, ratio {task.ratio:g} needs {count}"
                raise BadInput(what, ", ".join(made), "raise max_ratio of the generator")
        labels.append(np.full(count, label, np.int64))
    pictures, classes = torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
    n_added = len(pictures) - len(real.images)
    if parts.affine:
        # The seed does not know the arm; the moves of an arm also depend on how many images it has.
        draws = torch.Generator().manual_seed(derive_seed(study.seed, "affine", task.fold, task.repeat))
        pictures = expand(pictures, study.affine.factor, draws)
        classes = classes.repeat(study.affine.factor)
    return TrainingSet(pictures, classes, real.ids, n_added)


def _first_images(made: Iterable[shards.Shard], label: int, count: int) -> np.ndarray:
    """The first `count` images of a class, or as many as there are, of shards that each hold one class or all."""
    found: list[np.ndarray] = []
    for shard in made:
        rows = np.flatnonzero(shard["label"] == label)[: count - sum(map(len, found))]
        if len(rows):  # the images of other classes are not read
            found.append(shard.read("image", slice(int(rows[0]), int(rows[-1]) + 1))[rows - rows[0]])
    return np.concatenate(found or [np.empty(0, np.float32)])


def classify(context: Context) -> None:
    """Train with the arm-independent seeds, restore the best validation step, predict the fold's test images."""
    study, task = context.workspace.study, context.task
    cohort, folds = context.inputs[COHORT], context.inputs[FOLDS]
    train = training_set(context)
    validation = held_out_images(cohort, folds, task.repeat, task.fold, "validation")
    test = held_out_images(cohort, folds, task.repeat, task.fold, "test")
    settings = study.classifiers[task.classifier]
    if settings.weights:
        weights = context.workspace.weights(task.classifier)
        try:
            context.beside[WEIGHTS] = sha256_file(weights)
        except OSError as error:
            what = f"cannot read the weights {settings.weights}: {error.strerror or error}"
            raise BadInput(what, str(weights), "give a safetensors file") from None
        settings = dataclasses.replace(settings, weights=str(weights))
    log = TrainingLog()
    device = choose_device(study.compute)
    trained = train_classifier(
        train.images,
        train.labels,
        torch.from_numpy(validation.images),
        torch.from_numpy(validation.labels),
        settings,
        study.compute,
        n_classes=len(study.classes),
        init_seed=derive_seed(context.seed, "init"),
        order_seed=derive_seed(context.seed, "order"),
        device=device,
        log=log,
        checkpoints=checkpoints(context),
        should_stop=context.should_stop,
        progress=context.progress,
    )
    history = trained.history
    context.write(
        {
            "id": shards.text_array(test.ids),
            "patient": shards.text_array(test.patients),
            "label": test.labels,
            "score": trained.scores(torch.from_numpy(test.images)),
            "train_id": shards.text_array(train.ids),
            "validation_id": shards.text_array(validation.ids),
            "validation_label": validation.labels,
            "validation_score": trained.scores(torch.from_numpy(validation.images)),
            "history_step": np.array([row["step"] for row in history], np.int64),
            "history_train_loss": np.array([row["train_loss"] for row in history], np.float64),
            "history_validation_loss": np.array([row["validation_loss"] for row in history], np.float64),
            "history_validation_accuracy": np.array([row["validation_accuracy"] for row in history], np.float64),
        },
        schema=PREDICTIONS_SCHEMA,
        attributes={
            "classes": list(study.classes),
            "best_step": trained.best_step,
            "n_train_real": len(train.ids),
            "n_train_added": train.n_added,
        },
        companions={".jsonl": log.text().encode()},
        # For reading this folder alone; not content, because other settings of the study do not decide this result.
        info=about(study.compute, device, own_convolutions=False) | {"study": canonical(study.to_share())},
    )
    checkpoints(context).clear()
