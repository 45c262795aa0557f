"""Small inputs that the training tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmrhpc.errors import Checkpointed
from cmrhpc.train.evolution import Draws


def images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth random images (count, 1, size, size) in [-1, 1]."""
    coarse = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))


def draws(
    rng: torch.Generator,
    *,
    dtype: torch.dtype,
    mixup: bool,
    passes: int,
    steps: int = 1,
    batch: int = 6,
    scoring: int = 7,
    latent: int = 5,
    size: int = 16,
    device: str = "cpu",
) -> Draws:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype).to(device)

    return Draws(
        real=normal(steps, batch, 1, size, size).tanh(),
        noise=normal(steps, batch, latent),
        lam=torch.rand(steps, batch, generator=rng, dtype=dtype).to(device) if mixup else None,
        training_noise=normal(passes, batch, latent),
        scoring_real=normal(scoring, 1, size, size).tanh(),
        scoring_noise=normal(scoring, latent),
    )


def stopped_and_resumed(train, steps: list[int]):  # type: ignore[no-untyped-def]
    """Call train(should_stop) until it ends, asking it to stop after each of `steps` (counted over all calls)."""
    done = 0
    for stop in steps:
        left = stop - done

        def should_stop(left: int = left, seen: list[int] = []) -> bool:  # noqa: B006  (a new list per definition)
            seen.append(1)
            return len(seen) >= left

        with pytest.raises(Checkpointed) as stopped:
            train(should_stop)
        assert stopped.value.exit_code == 75
        done = stop
    return train(lambda: False)


class Clock:
    """Stands for `time.monotonic`: a second passes with every step of a training and nothing else takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, done: int, total: int) -> None:
        self.now += 1.0


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
