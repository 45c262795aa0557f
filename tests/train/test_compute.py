"""Which arithmetic a training uses: bfloat16 only in fast mode, and only on a device that computes in it by itself."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from cmrhpc.study import Affine, Classifier, Compute, Generator
from cmrhpc.train import compute
from cmrhpc.train.classify import Training
from cmrhpc.train.gan import train_gan
from tests.train import small

CPU = torch.device("cpu")
TINY = Generator(base_channels=2, latent_dim=4, components=2, generations=2, batch=4, scoring_batch=4, log_every=2)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the x86 flags of /proc/cpuinfo")
def test_bfloat16_is_native_where_the_processor_lists_it() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert compute.has_bfloat16(CPU) == bool({"avx512_bf16", "amx_bf16"} & set(flags))


@pytest.mark.device
def test_bfloat16_is_native_on_gpus_from_ampere_on(device: str) -> None:
    if device == "cpu":
        pytest.skip("only CUDA has a compute capability: pytest -m device --device cuda")
    assert compute.has_bfloat16(torch.device(device)) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize("native", [True, False])
def test_fast_mode_is_float32_where_bfloat16_is_emulated(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_bfloat16", lambda device: native)
    weights = []
    for mode in ("exact", "fast"):
        about = Compute(mode=mode, threads=1)
        trained = train_gan(small.images(6), None, TINY, about, Affine(factor=2), n_classes=2, seed=1, device=CPU)
        weights.append(trained.weights())
        assert compute.uses_bfloat16(about, CPU) == (native and mode == "fast")
    assert small.same(*weights) != native


@pytest.mark.parametrize("native", [True, False])
def test_so_it_is_for_classifiers(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_bfloat16", lambda device: native)
    losses = []
    for mode in ("exact", "fast"):
        images, labels = small.images(4), torch.arange(4) % 2
        training = Training(images, labels, Classifier(batch=4), Compute(mode=mode, threads=1), 2, 0, CPU)
        losses.append(float(training.step(torch.arange(4))))
    assert (losses[0] != losses[1]) == native
