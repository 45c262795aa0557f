"""One generator on the training patients of one fold -> its synthetic images."""

from __future__ import annotations

import numpy as np
import torch

from cmrhpc import pictures, shards
from cmrhpc.data.selection import training_images
from cmrhpc.names import IMAGES_SCHEMA
from cmrhpc.planning import COHORT, FOLDS, images_wanted
from cmrhpc.seeds import derive_seed
from cmrhpc.stages.context import Context
from cmrhpc.stages.device import about, choose_device
from cmrhpc.stages.training import TrainingLog, checkpoints, weights_bytes
from cmrhpc.train.gan import train_gan


def synthesize(context: Context) -> None:
    """Train, sample `max_ratio` images per real training image and class, write the shard and its companions."""
    study, task = context.workspace.study, context.task
    settings = study.generators[task.generator]
    real = training_images(context.inputs[COHORT], context.inputs[FOLDS], task.repeat, task.fold, task.label)
    log = TrainingLog()
    device = choose_device(study.compute)
    trained = train_gan(
        torch.from_numpy(real.images),
        torch.from_numpy(real.labels) if settings.conditional else None,
        settings,
        study.compute,
        study.affine,
        n_classes=len(study.classes),
        seed=context.seed,
        device=device,
        log=log,
        checkpoints=checkpoints(context),
        should_stop=context.should_stop,
        progress=context.progress,
    )
    images, labels = [], []
    for label in range(len(study.classes)) if task.label is None else [task.label]:
        count = images_wanted(settings.max_ratio, int((real.labels == label).sum()))
        seed = derive_seed(context.seed, "sample", label)
        images.append(trained.sample(count, seed, label if settings.conditional else None).numpy())
        labels.append(np.full(count, label, np.int64))
    context.write(
        {
            "image": np.concatenate(images),
            "label": np.concatenate(labels),
            "untrained": trained.untrained.numpy(),
            "train_id": shards.text_array(real.ids),
        },
        schema=IMAGES_SCHEMA,
        companions={
            ".safetensors": weights_bytes(trained.weights()),
            ".jsonl": log.text().encode(),
            ".png": pictures.grid(trained.grid.numpy(), columns=8, scale=2),
        },
        info=about(study.compute, device),
    )
    checkpoints(context).clear()
