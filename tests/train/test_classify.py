"""Training of a classifier: data order, best weights, bitwise resume (M10)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.study import Classifier, Compute
from cmrhpc.train import classify
from cmrhpc.train.checkpoint import Checkpoints
from cmrhpc.train.classify import DataOrder, TrainedClassifier, train_classifier
from tests.train import small

COMPUTE = Compute(threads=1)
TINY = Classifier(steps=9, batch=4, validate_every=3, learning_rate=1e-2)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network with batch norm instead of a large one."""

    def build(network: str, channels: int, n_classes: int, seed: int, weights: str = "") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(channels, 4, 3, stride=2),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(16, n_classes),
            )

    monkeypatch.setattr(classify, "build_classifier", build)


def train(settings: Classifier = TINY, init_seed: int = 1, order_seed: int = 2, **more: Any) -> TrainedClassifier:
    x, v = small.images(10), small.images(6, seed=1)
    labels, held = (x.mean((1, 2, 3)) > 0).long(), (v.mean((1, 2, 3)) > 0).long()
    return train_classifier(
        x, labels, v, held, settings, COMPUTE, n_classes=2, init_seed=init_seed, order_seed=order_seed, **more
    )


def content(trained: TrainedClassifier) -> dict[str, torch.Tensor]:
    scores = torch.from_numpy(trained.scores(small.images(5, seed=3)))
    return dict(trained.network.state_dict()) | {"scores": scores}


def test_every_epoch_shows_every_image_once_and_wraps_its_last_batch() -> None:
    order = DataOrder(10, 4, seed=1)
    for _ in range(5):
        epoch = torch.cat([order.next() for _ in range(3)])
        assert sorted(epoch[:10].tolist()) == list(range(10))
        assert torch.equal(epoch[10:], epoch[:2])
    tiny = DataOrder(3, 8, seed=1)
    batch = tiny.next()
    assert len(batch) == 8
    assert torch.equal(batch[:3], batch[3:6])
    whole = DataOrder(8, 4, seed=1)
    assert sorted(whole.next().tolist() + whole.next().tolist()) == list(range(8))


def test_order_depends_on_its_seed_alone() -> None:
    a, b, c = DataOrder(10, 4, seed=1), DataOrder(10, 4, seed=1), DataOrder(10, 4, seed=2)
    first, second, third = ([o.next().tolist() for _ in range(9)] for o in (a, b, c))
    assert first == second != third


@pytest.mark.usefixtures("little")
def test_resume_is_bitwise(tmp_path: Path) -> None:
    logs: tuple[list, list] = ([], [])
    undisturbed = train(log=logs[0].append)

    def again(should_stop: Any) -> TrainedClassifier:
        logs[1].clear()
        checkpoints = Checkpoints(tmp_path, dataclasses.asdict(TINY))
        return train(checkpoints=checkpoints, should_stop=should_stop, log=logs[1].append)

    resumed = small.stopped_and_resumed(again, [1, 2, 3, 5, 8])
    assert small.same(content(undisturbed), content(resumed))
    assert undisturbed.best_step == resumed.best_step
    for entry in logs[0] + logs[1]:
        entry.pop("images_per_second", None)
    assert logs[0] == logs[1]
    assert [e["step"] for e in logs[1]] == [3, 6, 9]


@pytest.mark.usefixtures("little")
def test_speed_is_that_of_the_steps_since_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = small.Clock()
    monkeypatch.setattr("time.monotonic", clock)

    def again(should_stop: Any) -> TrainedClassifier:
        return train(checkpoints=Checkpoints(tmp_path, {}), should_stop=should_stop, progress=clock.tick)

    history = small.stopped_and_resumed(again, [1]).history
    # Of two steps since the resume, then of three; a second passes between two steps.
    assert [entry["images_per_second"] / TINY.batch for entry in history] == pytest.approx([2 / 1, 3 / 3, 3 / 3])


@pytest.mark.device
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_resume_of_a_real_network_is_bitwise(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr("tests.train.test_classify.COMPUTE", dataclasses.replace(COMPUTE, mode=mode))
    settings = dataclasses.replace(TINY, network="resnet50", steps=3, validate_every=2, batch=2)
    undisturbed = train(settings, device=device)

    def again(should_stop: Any) -> TrainedClassifier:
        return train(settings, device=device, checkpoints=Checkpoints(tmp_path, {}), should_stop=should_stop)

    assert small.same(content(undisturbed), content(small.stopped_and_resumed(again, [1, 2])))


@pytest.mark.usefixtures("little")
def test_the_best_validation_weights_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.7, 0.5, 0.5, 0.6])
    states: list[dict[str, torch.Tensor]] = []
    real = classify._logits

    def planted(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Logits (d, -d) for every image, so that the loss of class 0 is log(1 + exp(-2 d)) = the planted one."""
        model.eval()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        d = -0.5 * math.log(math.expm1(next(losses)))
        return torch.tensor([[d, -d]], dtype=torch.float64).expand(len(images), 2)

    monkeypatch.setattr(classify, "_logits", planted)
    x = small.images(10)
    zeros = torch.zeros(10, dtype=torch.long)
    settings = dataclasses.replace(TINY, steps=10)
    trained = train_classifier(x, zeros, x, zeros, settings, COMPUTE, n_classes=2, init_seed=1, order_seed=2)
    monkeypatch.setattr(classify, "_logits", real)
    assert [h["step"] for h in trained.history] == [3, 6, 9, 10]  # the last step is validated too
    assert [h["validation_loss"] for h in trained.history] == pytest.approx([0.7, 0.5, 0.5, 0.6], abs=1e-9)
    assert trained.best_step == 6  # the earliest of equal ones
    assert small.same(dict(trained.network.state_dict()), states[1])
    assert not small.same(dict(trained.network.state_dict()), states[2])


@pytest.mark.usefixtures("little")
def test_history_and_scores_against_numpy() -> None:
    trained = train()
    last = trained.history[-1]
    v = small.images(6, seed=1)
    truth = (v.mean((1, 2, 3)) > 0).long().numpy()
    best = next(h for h in trained.history if h["step"] == trained.best_step)
    scores = trained.scores(v)
    assert scores.dtype == np.float64
    assert scores.shape == (6, 2)
    assert np.allclose(scores.sum(1), 1, atol=1e-12)
    assert best["validation_loss"] == pytest.approx(float(-np.log(scores[range(6), truth]).mean()), abs=1e-9)
    assert best["validation_accuracy"] == pytest.approx(float((scores.argmax(1) == truth).mean()))
    assert last["step"] == 9
    assert trained.best_step == min(trained.history, key=lambda h: h["validation_loss"])["step"]


@pytest.mark.usefixtures("little")
def test_optimizer_is_rmsprop_of_the_written_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step from the initial weights: w - lr * g / (sqrt((1 - alpha) g^2) + eps), alpha = 0.99, eps = 1e-8."""
    settings = dataclasses.replace(TINY, steps=1, validate_every=1)
    x, labels = small.images(10), torch.arange(10) % 2
    initial = classify.build_classifier("", 1, 2, 1)
    index = DataOrder(10, 4, seed=2).next()
    loss = nn.functional.cross_entropy(initial(x[index]), labels[index])
    gradient = torch.autograd.grad(loss, list(initial.parameters()))
    trained = train_classifier(x, labels, x, labels, settings, COMPUTE, n_classes=2, init_seed=1, order_seed=2)
    for before, g, after in zip(initial.parameters(), gradient, trained.network.parameters(), strict=True):
        if g.abs().max() < 1e-6:  # the bias before batch norm: its gradient is rounding
            continue
        expected = before - 1e-2 * g / ((0.01 * g * g).sqrt() + 1e-8)
        assert torch.allclose(after, expected.detach(), atol=1e-4)


@pytest.mark.usefixtures("little")
def test_seeds_are_independent() -> None:
    a, b, c = train(), train(init_seed=9), train(order_seed=9)
    assert not small.same(content(a), content(b))
    assert not small.same(content(a), content(c))
    assert small.same(content(a), content(train()))


@pytest.mark.usefixtures("little")
def test_refusals() -> None:
    x, labels = small.images(4), torch.arange(4) % 2
    args = {"n_classes": 2, "init_seed": 1, "order_seed": 2}
    with pytest.raises(BadInput):
        train_classifier(x[:0], labels[:0], x, labels, TINY, COMPUTE, **args)
    with pytest.raises(BadInput):
        train_classifier(x, labels, x[:0], labels[:0], TINY, COMPUTE, **args)
    with pytest.raises(CmrhpcError, match="not finite"):
        train_classifier(x * math.nan, labels, x, labels, TINY, COMPUTE, **args)
