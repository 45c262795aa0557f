"""The shipped demo, whole: its generators must have learned something, by a distance that was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cmrhpc.measure.kernel_distance import feature_distance, features
from cmrhpc.shards import read_shard
from tests.whole.conftest import cmrhpc


@pytest.mark.slow
def test_the_demo_beats_its_own_untrained_generators_five_fold(tmp_path: Path) -> None:
    cmrhpc("phantom", tmp_path / "raw", "--patients", "80", "--seed", "1")
    cmrhpc("init", tmp_path / "ws", "--study", "demo", "--raw", tmp_path / "raw")
    cmrhpc("run", tmp_path / "ws", timeout=3600)
    root = tmp_path / "ws"
    cohort, folds = read_shard(root / "cohort.h5"), read_shard(root / "folds.h5")
    ids, labels, images = np.array(cohort.strings("id")), cohort["label"], cohort["image"]
    shards = sorted((root / "synthetic" / "dae-gan").glob("*.h5"))
    assert len(shards) == 4
    for path in shards:
        made = read_shard(path)
        test = np.isin(ids, folds.strings(f"repeat0_fold{made.task['fold']}_test")) & (labels == made.task["label"])
        held_out = features(images[test])
        trained, untrained = (feature_distance(features(made[name]), held_out) for name in ("image", "untrained"))
        print(f"{path.stem}: untrained {untrained:.4f}, trained {trained:.4f}")
        assert trained < untrained / 5
