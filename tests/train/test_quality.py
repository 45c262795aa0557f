"""Quality guard: fast mode trains as well as float32, by the kernel distance to real images, within what seeds do."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from cmrhpc.data.ingest import ingest
from cmrhpc.data.phantom import write_phantom
from cmrhpc.measure.kernel_distance import feature_distance, features
from cmrhpc.shards import read_shard
from cmrhpc.study import GENERATORS, Affine, Compute, Data, Generator
from cmrhpc.train.gan import train_gan

SEEDS = (1, 2, 3, 4)
GENERATIONS = 250


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["dae-gan", "egan"])
def test_fast_mode_trains_to_the_same_kernel_distance(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmrhpc.train.compute.has_bfloat16", lambda device: True)  # emulated, where it is not
    write_phantom(tmp_path / "raw", 40, 1)
    data = Data(raw=str(tmp_path / "raw"), spacing_mm=2.344, image_size=40)
    ingest(data, ("0", "1"), tmp_path / "raw", tmp_path / "cohort.h5")
    cohort = read_shard(tmp_path / "cohort.h5")
    real = cohort["image"][cohort["label"] == 1]
    real_features = features(real)
    settings = Generator(
        **GENERATORS[kind] | {"base_channels": 8, "generations": GENERATIONS, "batch": 16, "scoring_batch": 32,
        "learning_rate": 1e-3, "ema": 0.99, "expand": False, "log_every": GENERATIONS}
    )  # fmt: skip
    distances: dict[str, list[float]] = {"exact": [], "fast": []}
    untrained = 0.0
    for mode, found in distances.items():
        for seed in SEEDS:
            trained = train_gan(
                torch.from_numpy(real), None, settings, Compute(mode=mode, threads=1), Affine(), n_classes=2, seed=seed
            )
            found.append(feature_distance(features(trained.sample(128, 0).numpy()), real_features))
            untrained = feature_distance(features(np.asarray(trained.untrained)), real_features)
    print(f"{kind}: untrained {untrained:.3f}", {m: [round(d, 4) for d in found] for m, found in distances.items()})
    exact, fast = (statistics.fmean(found) for found in distances.values())
    spread = statistics.fmean(statistics.stdev(found) for found in distances.values())
    assert max(exact, fast) < 0.8 * untrained  # they have learnt something, so that the comparison says something
    assert abs(exact - fast) < 2 * spread
