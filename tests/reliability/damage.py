"""Shards of the small study by name, and one that lies about its content."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cmrhpc import shards

SYNTHETIC = "synthetic/dae-gan/fold0_repeat0_class0"
REFINED = "refined/simgan/dae-gan/fold1_repeat0_class1"
PREDICTION = "predictions/none/ratio0/resnet50/fold0_repeat0"


def forge(root: Path, name: str, **changes: np.ndarray) -> None:
    """The shard again with other datasets, hashes and stamp right: only what it says can give it away."""
    shard = shards.read_shard(root / name)
    shards.write_shard(
        root / name,
        {dataset: shard[dataset] for dataset in shard.names} | changes,
        schema=shard.schema,
        task=shard.task,
        settings=shard.settings,
        inputs=shard.inputs,
        seed=shard.seed,
        attributes=shard.attributes,
        companions={Path(file).suffix: (root / name).with_name(file).read_bytes() for file in shard.files},
        info=shard.info,
    )
