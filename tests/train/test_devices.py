"""What holds on the CPU and on a GPU alike; `make test-gpu` runs it where there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmrhpc.study import Compute
from cmrhpc.train.checkpoint import Checkpoints
from cmrhpc.train.compute import setup_compute
from tests.train import small, test_classify, test_evolution, test_gan, test_refine

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")),
]
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", DEVICES)]


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_fast_step_equals_the_plain_step(kind: str, device: str) -> None:
    setup_compute(Compute(threads=1))  # deterministic, as in a task
    plain, fast = test_evolution.make(kind, torch.float64, device=device, survivors=2, gamma=0.3)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        drawn = small.draws(rng, dtype=torch.float64, mixup=True, passes=1)
        parts = {f.name: getattr(drawn, f.name) for f in dataclasses.fields(drawn)}
        draws = dataclasses.replace(drawn, **{n: t.to(device) for n, t in parts.items() if isinstance(t, torch.Tensor)})
        slow, quick = plain.generation(draws), fast.generation(draws)
        for name in ("loss_d", "loss_g", "f_q", "f_d"):
            assert torch.allclose(getattr(slow, name), getattr(quick, name), rtol=0, atol=1e-9)
        assert slow.order.tolist() == quick.order.tolist()
        assert test_evolution.distance(plain, fast) < 1e-10
        test_evolution.put_in_step(plain, fast)


def resumed_is_undisturbed(train: Callable[..., Any], content: Callable[[Any], Any], folder: Path) -> None:
    undisturbed = content(train())

    def again(should_stop: Callable[[], bool]) -> Any:
        return train(checkpoints=Checkpoints(folder, {}), should_stop=should_stop)

    assert small.same(undisturbed, content(small.stopped_and_resumed(again, [1, 3])))


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["dae-gan", "egan", "small data", "small data acgan"])
def test_generator_resumes_bitwise(
    name: str, mode: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_gan, "COMPUTE", dataclasses.replace(test_gan.COMPUTE, mode=mode))
    settings = test_gan.VARIANTS[name]
    resumed_is_undisturbed(lambda **more: test_gan.train(settings, device=device, **more), test_gan.content, tmp_path)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_refiner_resumes_bitwise(mode: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_refine, "COMPUTE", dataclasses.replace(test_refine.COMPUTE, mode=mode))
    train = test_refine.train
    resumed_is_undisturbed(lambda **m: train(test_refine.TINY, device=device, **m), test_refine.content, tmp_path)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("network", ["resnet50", "xception"])
def test_classifier_resumes_bitwise(
    network: str, mode: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_classify, "COMPUTE", dataclasses.replace(test_classify.COMPUTE, mode=mode))
    monkeypatch.setattr(small, "images", lambda count, size=40, seed=0, images=small.images: images(count, size, seed))
    settings = dataclasses.replace(test_classify.TINY, network=network, steps=4, validate_every=2, batch=2)
    train = test_classify.train
    resumed_is_undisturbed(lambda **m: train(settings, device=device, **m), test_classify.content, tmp_path)
