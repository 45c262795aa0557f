"""A recorded step against the plain one.

The recording here is of torch's operations on the same memory, as a CUDA graph is one of kernels: what Python decided
while it was made stays decided.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cmrhpc.nets.convolution import without_kernels
from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.nets.simgan import simgan_pair
from cmrhpc.nets.spectral import add_spectral_norm
from cmrhpc.study import Classifier, Compute, Generator, Refiner
from cmrhpc.train import recorded
from cmrhpc.train.classify import Training
from cmrhpc.train.compute import setup_compute
from cmrhpc.train.diffaugment import Views
from cmrhpc.train.evolution import Evolution
from cmrhpc.train.gan import Average
from cmrhpc.train.gan_log import GanLog
from cmrhpc.train.recorded import Recorded
from cmrhpc.train.refine import HistoryBuffer, Rows, Updates
from tests.train import small

PAIRS = {"residual": residual_pair, "dcgan": dcgan_pair}


@pytest.fixture(autouse=True)
def _pytorchs_convolutions() -> Iterator[None]:
    """As on a GPU: a recording sees PyTorch's operations alone."""
    with without_kernels():
        yield


def recording(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """`cuda_graph` for the CPU."""
    kinds: list[Any] = []

    def run() -> list[Tensor]:
        kinds.append(step())
        return list(recorded._tensors(kinds[-1]))

    traced = make_fx(run)()
    outputs = recorded._copied(kinds[-1])

    def replay() -> None:
        with torch.no_grad():
            for here, made in zip(recorded._tensors(outputs), traced(), strict=True):
                here.copy_(made)

    return replay, outputs


def evolution(kind: str, device: str = "cpu", **settings: Any) -> Evolution:
    g, d = PAIRS[kind](16, 1, 5, 4, torch.Generator().manual_seed(0))
    if settings.pop("spectral", False):
        add_spectral_norm(d, torch.Generator().manual_seed(0))
    g, d = (n.to(device, memory_format=torch.channels_last) for n in (g, d))  # type: ignore[call-overload]
    return Evolution(g, d, **settings)


def record(e: Evolution, capture: recorded.Capture = recording) -> Evolution:
    """What an Evolution does on a GPU, where it records a CUDA graph."""
    if e.recorded:
        return e
    e.recorded = {score: e.recording(score, capture) for score in (True, False)}
    return e


@pytest.mark.device
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("residual", {}),
        ("dcgan", {"survivors": 2, "r1": 0.1}),
        ("dcgan", {"mutations": ("heuristic",)}),
        ("dcgan", {"mutations": ("heuristic", "minimax"), "survivors": 8}),
        ("dcgan", {"spectral": True, "augment": True}),
    ],
)
def test_recorded_generations_equal_plain_ones(kind: str, settings: dict[str, Any], device: str) -> None:
    setup_compute(Compute(threads=1))
    settings = {"workers": 1, "device": device, **settings}
    augment = settings.pop("augment", False)
    plain, fast = evolution(kind, **settings), record(evolution(kind, **settings))
    plain.recorded = {}
    rng = torch.Generator().manual_seed(1)
    for generation in range(12 if "mutations" in settings else 7):  # parents multiply at first
        draws = small.draws(rng, dtype=torch.float32, mixup=True, passes=1, device=device)
        if augment:
            draws = dataclasses.replace(draws, views=Views.draw(1, 6, 7, rng, torch.device(device)))
        score = generation % 2 == 0
        a, b = plain.generation(draws, score), fast.generation(draws, score)
        assert torch.equal(a.order, b.order)
        for x, y in zip(recorded._tensors(a), recorded._tensors(b), strict=True):
            assert torch.allclose(x, y, atol=1e-5)
        for x, y in zip(plain.state(), fast.state(), strict=True):
            assert torch.allclose(x, y, atol=1e-4)
    used = [r for r in fast.recorded.values() if r.checks == 0]
    assert used
    assert all(r.replay and not r.trouble for r in used)
    assert (fast.step, fast.d_steps) == (plain.step, plain.d_steps)


def test_other_shapes_are_done_plainly() -> None:
    plain, fast = evolution("dcgan", workers=1), record(evolution("dcgan", workers=1))
    rng = torch.Generator().manual_seed(1)
    for generation in range(6):
        draws = small.draws(rng, dtype=torch.float32, mixup=True, passes=1, steps=1 + (generation == 4))
        assert torch.allclose(plain.generation(draws).f_d, fast.generation(draws).f_d, atol=1e-5)
    assert fast.recorded[True].replay


@pytest.mark.parametrize("fault", ["input", "state", "output", "refused"])
def test_planted_faults_of_a_recording_are_found(fault: str) -> None:
    """The held inputs are not filled, an update is lost, an output is of before, or nothing can be recorded."""

    def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        replay, outputs = recording(step)
        held = [t.clone() for t in fast.state()]
        first = [t.clone() for t in recorded._tensors(fast.recorded[True].held)]

        def faulty() -> None:
            if fault == "input":
                for here, there in zip(recorded._tensors(fast.recorded[True].held), first, strict=True):
                    here.copy_(there)
            old = [t.clone() for t in recorded._tensors(outputs)]
            replay()
            if fault == "state":
                fast.d.vector.copy_(held[8])
            if fault == "output":
                for here, there in zip(recorded._tensors(outputs), old, strict=True):
                    here.copy_(there)

        return faulty, outputs

    plain, fast = evolution("dcgan", workers=1), record(evolution("dcgan", workers=1), capture)
    rng = torch.Generator().manual_seed(1)
    warned = []
    for _ in range(5):
        draws = small.draws(rng, dtype=torch.float32, mixup=True, passes=1)
        with warnings.catch_warnings(record=True) as caught:
            b = fast.generation(draws)
        warned += [str(warning.message) for warning in caught]
        assert torch.equal(plain.generation(draws).f_d, b.f_d)
    assert warned == [f"training goes on without a CUDA graph, slower: {fast.recorded[True].trouble}"]
    assert fast.recorded[True].trouble == (
        "operation not permitted when stream is capturing"
        if fault == "refused"
        else "its replay made another step than the plain call"
    )
    assert all(torch.equal(x, y) for x, y in zip(plain.state(), fast.state(), strict=True))


@pytest.mark.filterwarnings("ignore:training goes on")
def test_without_memory_for_the_check_its_tensors_are_gone_before_the_step_is_done_again() -> None:
    state, tight, kept = torch.zeros(3), False, []

    def step(x: Tensor) -> Tensor:
        nonlocal tight
        assert all(reference() is None for reference in kept)
        activations = state + x
        if tight:
            tight = False
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory")
        return state.copy_(activations).clone()

    def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        nonlocal tight
        outputs, tight = step(), True
        return lambda: None, outputs

    summed = Recorded(step, lambda: [state], capture)
    for count in range(1, 6):
        assert summed(torch.ones(3)).tolist() == [count] * 3
    assert kept
    assert "no memory" in summed.trouble


@pytest.mark.filterwarnings("ignore:training goes on")
@pytest.mark.parametrize(("deterministic", "off", "trusted"), [(False, 1, True), (False, 2, False), (True, 1, False)])
def test_one_check_may_miss_where_the_plain_step_is_not_deterministic(
    deterministic: bool, off: int, trusted: bool
) -> None:
    """Two of nearly equal fitness change places in the first `off` replays."""
    setup_compute(Compute(threads=1, deterministic=deterministic))
    state = torch.zeros(2)

    def step(x: Tensor) -> Tensor:
        state.add_(x)
        return torch.tensor([0, 1])

    def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        outputs, replays = step(), 0

        def replay() -> None:
            nonlocal replays
            replays += 1
            outputs.copy_(step() if replays > off else step().flip(0))

        return replay, outputs

    try:
        order = Recorded(step, lambda: [state], capture)
        for count in range(1, 9):
            assert order(torch.ones(2)).tolist() == [0, 1]
            assert state.tolist() == [count] * 2
    finally:
        setup_compute(Compute(threads=1))
    assert bool(order.replay) == trusted
    assert bool(order.trouble) != trusted


@pytest.mark.device
@pytest.mark.filterwarnings("ignore:training goes on")
def test_a_capture_that_cuda_breaks_off_leaves_the_device_as_it_was(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        pytest.skip("only CUDA breaks captures off: pytest -m device --device cuda")
    monkeypatch.setattr(recorded, "_refused", "")
    state, here = torch.zeros(3, device=device), torch.cuda.current_stream()

    def asking(x: Tensor) -> Tensor:
        state.add_(x + float(x[0]) - 1)  # asks the device for a number, which no capture allows
        return state.clone()

    steps = [Recorded(step, lambda: [state]) for step in (asking, lambda x: state.add_(x).clone())]
    count = 0
    for step in steps:
        for _ in range(5):
            count += 1
            assert step(torch.ones(3, device=device)).tolist() == [count] * 3
        assert step.trouble == steps[0].trouble != ""
    assert torch.cuda.current_stream() == here
    torch.cuda.empty_cache()


@pytest.mark.device
def test_recorded_classifier_steps_equal_plain_ones(device: str) -> None:
    data, labels = small.images(12, 32), torch.arange(12) % 2
    settings, compute = Classifier(network="resnet50", batch=4, learning_rate=1e-3), Compute(threads=1)
    setup_compute(compute)
    plain, fast = (Training(data, labels, settings, compute, 2, 0, torch.device(device)) for _ in range(2))
    plain.recorded = None
    fast.recorded = fast.recorded or Recorded(fast._step, fast.state, recording)
    order = torch.Generator().manual_seed(0)
    for t in (plain, fast):
        t.model.train()
    for _ in range(6):
        index = torch.randperm(12, generator=order)[:4]
        assert torch.allclose(plain.step(index), fast.step(index), atol=1e-6)
        for x, y in zip(plain.state(), fast.state(), strict=True):
            assert torch.allclose(x, y, atol=1e-5)
    assert fast.recorded.replay
    assert fast.recorded.checks == 0


def refiner_updates(device: str) -> Updates:
    r, d = simgan_pair(1, 4, torch.Generator().manual_seed(0))
    for network in (r, d):
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    synthetic, real = (small.images(9, seed=seed).to(device) for seed in (0, 1))
    buffer = HistoryBuffer(10, (1, 16, 16), torch.device(device))
    settings = Refiner(channels=4, batch=4, momentum=0.5, learning_rate=0.01)
    return Updates(r, d, synthetic, real, buffer, settings, Compute(threads=1))


@pytest.mark.device
def test_recorded_refiner_updates_equal_plain_ones(device: str) -> None:
    """Updates of R with and without D, and of D, whose buffer is full from the fourth one on."""
    setup_compute(Compute(threads=1))
    plain, fast = refiner_updates(device), refiner_updates(device)
    plain.recorded = {}
    fast.recorded = fast.recorded or fast.recordings(recording)
    rng = torch.Generator().manual_seed(1)
    for step in range(12):
        rows, others, real = (torch.randint(9, (4,), generator=rng).to(device) for _ in range(3))
        places = plain.buffer.draw(4, rng)
        assert (places is None) == (step < 3) == (not fast.buffer.full)
        for a, b in (
            (plain.refiner(Rows(rows), step % 2 == 0), fast.refiner(Rows(rows), step % 2 == 0)),
            (plain.discriminator(Rows(others, real, places)), fast.discriminator(Rows(others, real, places))),
        ):
            for x, y in zip(recorded._tensors(a), recorded._tensors(b), strict=True):
                assert torch.allclose(x, y, atol=1e-5)
        assert torch.allclose(plain.buffer.images, fast.buffer.images, atol=1e-5)
        for mine, theirs in ((plain.r, fast.r), (plain.d, fast.d)):
            for x, y in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert torch.allclose(x, y, atol=1e-5)
    assert all(update.replay and update.checks == 0 for update in fast.recorded.values())


def test_a_refiner_update_asks_nothing_of_the_device(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("cmrhpc.train.refine.autocast", lambda *_: contextlib.nullcontext())
    setup_compute(Compute(threads=1))
    updates = refiner_updates("meta")
    rows = torch.zeros(4, dtype=torch.long, device="meta")
    with _OnDevice():
        updates.refiner(Rows(rows), True)
        updates.refiner(Rows(rows), False)
        made = updates.discriminator(Rows(rows, rows, rows[:2]))
    assert made.discriminator is not None
    assert made.discriminator.shape == ()


def test_a_classifier_step_asks_nothing_of_the_device(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("cmrhpc.train.classify.autocast", lambda *_: contextlib.nullcontext())
    setup_compute(Compute(threads=1))
    data, labels = small.images(12, 32).to("meta"), (torch.arange(12) % 2).to("meta")
    training = Training(data, labels, Classifier(batch=4), Compute(threads=1), 2, 0, torch.device("meta"))
    monkeypatch.setattr(
        training.optimizer, "step", lambda: None
    )  # torch's own, which counts on the CPU for this device
    training.model.train()
    index = torch.zeros(4, dtype=torch.long, device="meta")
    with _OnDevice():
        assert training._step(index).shape == ()


class _OnDevice(TorchDispatchMode):
    """Every tensor of every operation lies on the device: nothing is copied from or to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.device.type == "meta", f"{func} at {value.device}"
        return result


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if value is None:
        return None
    return type(value)(**{f.name: on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)})


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_a_generation_asks_nothing_of_the_device(kind: str, spectral: bool, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """On a device without values whatever Python wants to know fails, and so does a mixture of devices."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    setup_compute(Compute(threads=1))
    e = evolution(kind, survivors=2, r1=0.1, workers=1, spectral=spectral)
    meta = Evolution(e.generator.to("meta"), e.discriminator.to("meta"), survivors=2, r1=0.1)
    rng = torch.Generator().manual_seed(1)
    given = small.draws(rng, dtype=torch.float32, mixup=False, passes=1)
    draws = on_meta(dataclasses.replace(given, views=Views.draw(1, 6, 7, rng, torch.device("cpu"))))
    rates = torch.ones(2, 2, device="meta")
    average, log = Average(meta), GanLog(Generator(), lambda entry: None)
    meta._generation(draws, rates, True)  # fills caches
    with _OnDevice():
        outcome = meta._generation(draws, rates, True)
        log.add(outcome)
        average.add(0.9)
    assert outcome.f_d.shape == (6,)
