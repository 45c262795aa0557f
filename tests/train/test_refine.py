"""Training of a refiner: the history buffer fills, bitwise resume, phases, log (M9)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.study import Affine, Compute, Refiner
from cmrhpc.train import refine
from cmrhpc.train.checkpoint import Checkpoints
from cmrhpc.train.refine import HistoryBuffer, TrainedRefiner, train_refiner
from tests.train import small

COMPUTE = Compute(threads=1)
TINY = Refiner(
    channels=4, batch=4, buffer=10, steps=4, pretrain_refiner=3, pretrain_discriminator=3, momentum=0.5, log_every=2
)


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 1, 2, 2).clone()


def names(images: torch.Tensor) -> list[int]:
    return [int(x) for x in images[:, 0, 0, 0]]


def exchange(buffer: HistoryBuffer, fresh: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return buffer.exchange(fresh, buffer.draw(len(fresh), rng))


def test_buffer_fills_and_then_exchanges_halves() -> None:
    buffer, rng = HistoryBuffer(10, (1, 2, 2), torch.device("cpu")), torch.Generator().manual_seed(0)
    # While it fills, all are fresh and all are kept, up to the capacity.
    for step in range(3):
        fresh = numbered(100 * step, 4)
        assert torch.equal(exchange(buffer, fresh, rng), fresh)
        assert buffer.filled == min(10, 4 * (step + 1))
    assert names(buffer.images) == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201]
    # Then half comes from the buffer, half is fresh, and the other fresh half takes the places that were emptied.
    for step in range(3, 30):
        before = names(buffer.images)
        fresh = numbered(100 * step, 4)
        batch = names(exchange(buffer, fresh, rng))
        old, new = batch[:2], batch[2:]
        assert len(set(old)) == 2
        assert set(old) <= set(before)
        assert new == [100 * step, 100 * step + 1]
        places = [before.index(x) for x in old]
        after = names(buffer.images)
        assert [after[p] for p in places] == [100 * step + 2, 100 * step + 3]
        assert all(after[p] == before[p] for p in range(10) if p not in places)
        assert buffer.full
    assert max(names(buffer.images)) >= 2900  # nothing was thrown away


def test_buffer_with_odd_batches() -> None:
    buffer, rng = HistoryBuffer(4, (1, 2, 2), torch.device("cpu")), torch.Generator().manual_seed(0)
    exchange(buffer, numbered(0, 5), rng)
    assert names(buffer.images) == [0, 1, 2, 3]
    batch = names(exchange(buffer, numbered(10, 5), rng))
    assert len(batch) == 5
    assert batch[2:] == [10, 11, 12]
    assert sorted(set(names(buffer.images)) - {0, 1, 2, 3}) == [13, 14]


def train(settings: Refiner, **more: Any) -> TrainedRefiner:
    return train_refiner(small.images(9), small.images(6, seed=1), settings, COMPUTE, Affine(2), seed=3, **more)


def content(trained: TrainedRefiner) -> dict[str, torch.Tensor]:
    return trained.weights() | {"images": trained.refine(small.images(70, seed=2))}


@pytest.mark.device
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("settings", [TINY, dataclasses.replace(TINY, momentum=0.0, pretrain="self", expand=True)])
def test_resume_is_bitwise(
    settings: Refiner, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr("tests.train.test_refine.COMPUTE", dataclasses.replace(COMPUTE, mode=mode))
    logs: tuple[list, list] = ([], [])
    undisturbed = train(settings, device=device, log=logs[0].append)

    def again(should_stop: Any) -> TrainedRefiner:
        logs[1].clear()
        checkpoints = Checkpoints(tmp_path, dataclasses.asdict(settings))
        more = {"checkpoints": checkpoints, "should_stop": should_stop, "log": logs[1].append}
        return train(settings, device=device, **more)

    resumed = small.stopped_and_resumed(again, [1, 3, 5, 8, 9])
    assert small.same(content(undisturbed), content(resumed))
    for entry in logs[0] + logs[1]:
        del entry["steps_per_second"]
    assert logs[0] == logs[1]


def test_speed_is_that_of_the_steps_since_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = small.Clock()
    monkeypatch.setattr("time.monotonic", clock)
    entries: list[dict[str, Any]] = []

    def again(should_stop: Any) -> TrainedRefiner:
        entries.clear()
        more = {"checkpoints": Checkpoints(tmp_path, {}), "should_stop": should_stop, "progress": clock.tick}
        return train(dataclasses.replace(TINY, log_every=3), log=entries.append, **more)

    small.stopped_and_resumed(again, [4])
    # Of three, of two since the resume, of three, of one; a second passes between two steps.
    assert [entry["steps_per_second"] for entry in entries] == pytest.approx([3 / 2, 2 / 1, 3 / 3, 1 / 1])


def test_the_buffer_fills_in_training_and_its_images_reach_d(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[HistoryBuffer] = []
    init = HistoryBuffer.__init__

    def spy(self: HistoryBuffer, *args: Any) -> None:
        init(self, *args)
        buffers.append(self)

    monkeypatch.setattr(HistoryBuffer, "__init__", spy)
    entries: list[dict[str, Any]] = []
    train(TINY, log=entries.append)
    assert [e["buffer_filled"] for e in entries] == [0, 4, 10, 10, 10]
    assert buffers[0].full
    assert all(bool(image.any()) for image in buffers[0].images)


def test_phases_update_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    pair = refine.simgan_pair

    def spy(*args: Any) -> Any:
        made.append(pair(*args))
        return made[-1]

    monkeypatch.setattr(refine, "simgan_pair", spy)
    seen: list[tuple[bool, bool]] = []
    last: list[torch.Tensor] = []

    def watch(step: int, total: int) -> None:
        now = [torch.cat([p.detach().flatten().clone() for p in net.parameters()]) for net in made[0]]
        if last:
            seen.append((not torch.equal(now[0], last[0]), not torch.equal(now[1], last[1])))
        last[:] = now

    train(TINY, progress=watch)
    assert seen == [(True, False)] * 2 + [(False, True)] * 3 + [(True, True)] * 4


def test_pretraining_on_l1_alone_leaves_d_out() -> None:
    entries: list[dict[str, Any]] = []
    train(dataclasses.replace(TINY, pretrain="self", log_every=3), log=entries.append)
    assert "loss_refiner_adversarial" not in entries[0]
    assert "loss_refiner_self" in entries[0]
    entries.clear()
    train(dataclasses.replace(TINY, log_every=3), log=entries.append)
    assert "loss_refiner_adversarial" in entries[0]


def test_log_prints_lambda_in_both_reductions() -> None:
    entries: list[dict[str, Any]] = []
    train(TINY, log=entries.append)
    assert entries[-1]["lambda_on_pixel_mean"] == 0.5
    assert entries[-1]["lambda_on_pixel_sum"] == pytest.approx(0.5 / 16**2)
    assert [e["step"] for e in entries] == [2, 4, 6, 8, 10]
    assert [e["phase"] for e in entries[:3]] == ["pretrain refiner", *["pretrain discriminator"] * 2]


def test_refined_images_do_not_depend_on_their_company() -> None:
    trained = train(TINY)
    x = small.images(70, seed=2)
    out = trained.refine(x)
    assert out.shape == x.shape
    assert out.abs().max() <= 1
    assert out.dtype == torch.float32
    assert torch.allclose(trained.refine(x[3:5]), out[3:5], atol=1e-6)
    assert trained.refine(x[:0]).shape == (0, 1, 16, 16)


def test_a_large_lambda_keeps_the_images() -> None:
    x, y = small.images(16), small.images(16, seed=1)
    kept = dataclasses.replace(
        TINY, lambda_l1=100.0, pretrain_refiner=200, pretrain="self", learning_rate=1e-3, momentum=0.0, log_every=1000
    )
    before = dataclasses.replace(kept, pretrain_refiner=0, pretrain_discriminator=0, steps=1, learning_rate=1e-8)
    far = (train_refiner(x, y, before, COMPUTE, Affine(), seed=3).refine(x) - x).abs().mean()
    near = (train_refiner(x, y, kept, COMPUTE, Affine(), seed=3).refine(x) - x).abs().mean()
    assert near < 0.8 * far  # R starts near the identity, so that there is not far to go


def test_refusals() -> None:
    with pytest.raises(BadInput):
        train_refiner(small.images(0), small.images(4), TINY, COMPUTE, Affine(), seed=1)
    with pytest.raises(BadInput):
        train_refiner(small.images(4), small.images(4, size=20), TINY, COMPUTE, Affine(), seed=1)
    bad = small.images(6)
    bad[:] = math.nan
    with pytest.raises(CmrhpcError, match="not finite"):
        train_refiner(bad, small.images(4), TINY, COMPUTE, Affine(), seed=1)
