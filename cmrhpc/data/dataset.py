"""A torch Dataset over any shard that holds images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

from cmrhpc.errors import BadInput
from cmrhpc.shards import read_shard


class ShardDataset(Dataset[tuple[torch.Tensor, int]]):
    """Images of a cohort, synthetic or refined shard, held in memory.

    Items: image (C, H, W) float32 in [-1, 1], label int. Raises BadInput for a damaged shard or one without images.

    For example `torch.utils.data.DataLoader(ShardDataset("ws/cohort.h5"), batch_size=32, shuffle=True)`.
    """

    def __init__(self, path: str | Path):
        shard = read_shard(Path(path))
        if "image" not in shard or "label" not in shard:
            mend = "name cohort.h5, or a shard below synthetic/ or refined/"
            raise BadInput(f'a shard of schema "{shard.schema}" holds no images', str(path), mend)
        self.images = torch.from_numpy(shard["image"])
        self.labels = torch.from_numpy(shard["label"])
        self.classes: list[str] = list(shard.attributes.get("classes", []))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])
