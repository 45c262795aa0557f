"""One refiner on the synthetic images of one class and fold -> the same images, refined."""

from __future__ import annotations

import torch

from cmrhpc import pictures, shards
from cmrhpc.data.selection import training_images
from cmrhpc.names import IMAGES_SCHEMA
from cmrhpc.planning import COHORT, FOLDS
from cmrhpc.stages.context import Context
from cmrhpc.stages.device import about, choose_device
from cmrhpc.stages.training import TrainingLog, checkpoints, weights_bytes
from cmrhpc.train.refine import train_refiner


def refine(context: Context) -> None:
    """Train on the class's synthetic and real training images, refine every synthetic image, write the shard."""
    study, task = context.workspace.study, context.task
    real = training_images(context.inputs[COHORT], context.inputs[FOLDS], task.repeat, task.fold, task.label)
    source = next(shard for path, shard in context.inputs.items() if path not in (COHORT, FOLDS))
    of_class = source["label"] == task.label
    synthetic = torch.from_numpy(source["image"][of_class])
    log = TrainingLog()
    device = choose_device(study.compute)
    trained = train_refiner(
        synthetic,
        torch.from_numpy(real.images),
        study.refiners[task.refiner],
        study.compute,
        study.affine,
        seed=context.seed,
        device=device,
        log=log,
        checkpoints=checkpoints(context),
        should_stop=context.should_stop,
        progress=context.progress,
    )
    refined = trained.refine(synthetic)
    # Rows of the picture alternate: eight synthetic images, below them the same eight refined.
    pairs = [part for i in range(0, min(32, len(refined)), 8) for part in (synthetic[i : i + 8], refined[i : i + 8])]
    context.write(
        {
            "image": refined.numpy(),
            "label": source["label"][of_class],
            "train_id": shards.text_array(real.ids),
        },
        schema=IMAGES_SCHEMA,
        companions={
            ".safetensors": weights_bytes(trained.weights()),
            ".jsonl": log.text().encode(),
            ".png": pictures.grid(torch.cat(pairs).numpy(), columns=8, scale=2),
        },
        info=about(study.compute, device),
    )
    checkpoints(context).clear()
