"""A generation and a classifier step against plain PyTorch, and the convolution peak that they are measured by."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import flop_registry

from cmrhpc.bench.timing import interleaved, medians, ratio
from cmrhpc.errors import CmrhpcError
from cmrhpc.nets.classifiers import build_classifier
from cmrhpc.nets.convolution import without_kernels
from cmrhpc.nets.plain import with_plain_layers
from cmrhpc.study import GENERATORS, Classifier, Compute, Generator
from cmrhpc.train.classify import DataOrder, Training
from cmrhpc.train.compute import has_bfloat16, setup_compute
from cmrhpc.train.evolution import Draws, Evolution
from cmrhpc.train.gan import build_pair, draw_generation
from cmrhpc.train.latent import Latent
from cmrhpc.train.plain import PlainEvolution
from cmrhpc.train.recorded import CHECKS, PLAIN, SPARE, Recorded

SIZE = 80  # pixels
NETS = {
    "dae-gan-32": Generator(**GENERATORS["dae-gan"]),
    "dae-gan-64": Generator(base_channels=64),
    "dcgan": Generator(**GENERATORS["egan"]),
}
CLASSIFIERS = ("resnet50", "xception")
N_IMAGES = 256


def images(count: int, size: int = SIZE, channels: int = 1) -> Tensor:
    """Smooth random images (count, channels, size, size) in [-1, 1]."""
    coarse = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.tanh(F.interpolate(coarse, size=(size, size), mode="bilinear"))


def under(compute: Compute | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call under a task's compute settings; with None under PyTorch's defaults."""

    def run() -> Any:
        if compute:
            setup_compute(compute)
            return call()
        torch.set_deterministic_debug_mode("default")
        torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        return call()

    return run


def modes(threads: int, device: torch.device | str) -> dict[str, Compute]:
    """Exact and fast as tasks run them; on a GPU fast is measured without deterministic algorithms too."""
    exact = Compute(threads=threads)
    return {
        "exact": exact,
        "fast": dataclasses.replace(exact, mode="fast", deterministic=torch.device(device).type == "cpu"),
    }


def warmup(device: torch.device | str) -> int:
    """Rounds that do not count; on a GPU until a step is recorded and checked."""
    return 2 if torch.device(device).type == "cpu" else PLAIN + CHECKS + SPARE + 1


def settled(call: Callable[[], Any], device: torch.device | str) -> Callable[[], Any]:
    """The call until its work is done: a GPU goes on after a call has returned."""
    if torch.device(device).type == "cpu":
        return call

    def run() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


def convolution_peak(device: torch.device | str = "cpu") -> dict[str, Callable[[], object]]:
    """Calls of `peak_flops(device)` floating-point operations: a convolution that suits the hardware, per format."""
    calls: dict[str, Callable[[], object]] = {}
    for name, kind in (("peak_exact", torch.float32), ("peak_fast", torch.bfloat16)):
        x = torch.randn(32, 128, 20, 20, device=device).to(kind, memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device).to(kind, memory_format=torch.channels_last)
        one = functools.partial(F.conv2d, x, weight, padding=1)
        calls[name] = functools.partial(_often, one, _peak_calls(device))
    return calls


def _often(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _peak_calls(device: torch.device | str) -> int:
    """Enough that a GPU's launches and its last wait do not count."""
    return 1 if torch.device(device).type == "cpu" else 200


def peak_flops(device: torch.device | str) -> int:
    return _peak_calls(device) * 2 * 32 * 128 * 128 * 9 * 20 * 20


def generation(net: str, rounds: int, threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Ratios of one generation (batch 32, scoring batch 64) to the plain step, and its share of the peak.

    The plain step runs networks of PyTorch's own layers; `same_layers` is the plain step with our layers in it.
    """
    compute = modes(threads, device)
    setup_compute(compute["exact"])
    settings, data = NETS[net], images(N_IMAGES).to(device)
    rng = torch.Generator().manual_seed(1)
    latent = Latent.draw(settings.components, settings.latent_dim, torch.Generator().manual_seed(2))

    def pair() -> tuple[nn.Module, nn.Module]:
        g, d = build_pair(settings, SIZE, 1, 2, 0)
        return g.to(device), d.to(device)

    def own(bfloat16: bool, workers: int | None = None) -> Evolution:
        g, d = (n.to(memory_format=torch.channels_last) for n in pair())
        return Evolution(g, d, mutations=settings.mutations, gamma=settings.gamma, bfloat16=bfloat16, workers=workers)

    def written_out(g: nn.Module, d: nn.Module) -> PlainEvolution:
        return PlainEvolution(g, d, mutations=settings.mutations, gamma=settings.gamma)

    plain = written_out(*(with_plain_layers(network) for network in pair()))
    same_layers = written_out(*pair())
    exact, fast = own(False), own(has_bfloat16(torch.device(device)))
    draws: list[Draws] = []

    def draw() -> None:
        draws[:] = [draw_generation(settings, latent, data, None, 0, 1, rng)]

    peak = convolution_peak(device)
    calls = {
        "draw": draw,
        "plain": under(None, lambda: plain.generation(draws[0])),
        "same_layers": under(None, lambda: same_layers.generation(draws[0])),
        "exact": under(compute["exact"], lambda: exact.generation(draws[0])),
        "fast": under(compute["fast"], lambda: fast.generation(draws[0])),
        "peak_exact": under(compute["exact"], peak["peak_exact"]),
        "peak_fast": under(compute["fast"], peak["peak_fast"]),
    }
    times = interleaved({n: settled(c, device) for n, c in calls.items()}, rounds, warmup(device))
    middle = medians(times)
    flops = _flops(own(False, workers=1), draws[0])
    formats = {"exact": "peak_exact", "fast": "peak_fast" if has_bfloat16(torch.device(device)) else "peak_exact"}
    peaks = {mode: peak_flops(device) / min(times[name]) for mode, name in formats.items()}
    share = {mode: flops / middle[mode] / peaks[mode] for mode in peaks}
    return {
        "exact_ratio": ratio(times, "plain", "exact"),
        "fast_ratio": ratio(times, "plain", "fast"),
        "exact_ratio_same_layers": ratio(times, "same_layers", "exact"),
        "fast_ratio_same_layers": ratio(times, "same_layers", "fast"),
        "share_of_peak": share["exact"],
        "fast_share_of_peak": share["fast"],
        "plain_s": middle["plain"],
        "same_layers_s": middle["same_layers"],
        "exact_s": middle["exact"],
        "fast_s": middle["fast"],
        "gflop": flops / 1e9,
        "peak_gflop_per_s": peaks["exact"] / 1e9,
        "fast_peak_gflop_per_s": peaks["fast"] / 1e9,
        "not_recorded": _trouble([*exact.recorded.values(), *fast.recorded.values()]),
    }


def _trouble(recordings: Sequence[Recorded]) -> str:
    """Why a GPU's plain steps were measured and not recorded ones; empty where they were recorded, and on the CPU."""
    return next((recorded.trouble for recorded in recordings if recorded.trouble), "")


class _Operations(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products while it is on."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _flops(evolution: Evolution, draws: Draws) -> int:
    """Operations of our own step by PyTorch's convolutions. One worker: the mode sees its own thread only."""
    with without_kernels(), _Operations() as counter:
        evolution.generation(draws)
    return counter.total


def classifier(network: str, rounds: int, threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Ratios of a training step to a plain loop with a DataLoader, both from data in memory, batch 32."""
    settings = Classifier(network=network)
    compute = modes(threads, device)
    setup_compute(compute["exact"])
    data, labels = images(N_IMAGES), torch.arange(N_IMAGES) % 2

    plain = build_classifier(network, 1, 2, 0).to(device)
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=settings.learning_rate)
    loader = DataLoader(TensorDataset(data, labels), settings.batch, shuffle=True)

    def batches() -> Any:
        while True:
            yield from loader

    stream = batches()

    def plain_step() -> None:
        x, y = next(stream)
        loss = F.cross_entropy(plain(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    recordings: list[Recorded] = []

    def own(mode: str) -> Callable[[], object]:
        training = Training(data, labels, settings, compute[mode], 2, 0, torch.device(device))
        training.model.train()
        recordings.extend([training.recorded] if training.recorded else [])
        order = DataOrder(N_IMAGES, settings.batch, 0)
        return under(compute[mode], lambda: float(training.step(order.next())))

    plain.train()
    calls = {"plain": under(None, plain_step), "exact": own("exact"), "fast": own("fast")}
    times = interleaved(calls, rounds, warmup(device))
    middle = medians(times)
    return {
        "ratio": ratio(times, "plain", "fast"),
        "exact_ratio": ratio(times, "plain", "exact"),
        "plain_s": middle["plain"],
        "exact_s": middle["exact"],
        "fast_s": middle["fast"],
        "images_per_second": settings.batch / middle["fast"],
        "not_recorded": _trouble(recordings),
    }


def train_one_of_many(generations: int, seed: int, device: str, ready: Callable[[], None], net: str) -> None:
    """Generations of one model in fast mode: some to warm up, then `ready`, then as many as asked for."""
    compute = modes(1, device)["fast"]
    setup_compute(compute)
    settings, data = NETS[net], images(N_IMAGES).to(device)
    latent = Latent.draw(settings.components, settings.latent_dim, torch.Generator().manual_seed(2))
    g, d = (n.to(device, memory_format=torch.channels_last) for n in build_pair(settings, SIZE, 1, 2, seed))  # type: ignore[call-overload]
    evolution = Evolution(g, d, bfloat16=has_bfloat16(torch.device(device)))
    rng = torch.Generator().manual_seed(seed)
    step = settled(lambda: evolution.generation(draw_generation(settings, latent, data, None, 0, 1, rng)), device)
    _often(step, warmup(device))
    ready()
    _often(step, generations)


def many_models(count: int, generations: int, device: str = "cuda", net: str = "dae-gan-32") -> float:
    """Generations per second in total of `count` processes with a model each on one device, as tasks of a study run."""
    command = [sys.executable, "-m", "cmrhpc.bench.child", "model"]
    children = [
        subprocess.Popen(
            [*command, str(generations), str(seed), device, net], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for seed in range(count)
    ]
    try:
        for child in children:
            if not child.stdout.readline():  # type: ignore[union-attr]
                raise CmrhpcError(f"{count} models do not run side by side on {device}: one of them ended")
        begun = time.perf_counter()
        for child in children:
            child.stdin.close()  # type: ignore[union-attr]
        if not all([child.stdout.readline() for child in children]):  # type: ignore[union-attr]  # its answer, not its end
            raise CmrhpcError(f"{count} models do not run side by side on {device}: one of them ended")
        return count * generations / (time.perf_counter() - begun)
    finally:
        for child in children:
            child.kill()


def gpu(rounds: int) -> dict[str, Any] | None:
    """Generations per second for 1, 8 and 32 models on this machine's GPU, or None where there is none.

    A number of models that does not fit is None: the memory is too small, or the GPU serves one process only.
    """
    if not torch.cuda.is_available():
        return None
    rates: dict[str, float | None] = {}
    for count in (1, 8, 32):  # before this process takes memory there
        try:
            rates[str(count)] = many_models(count, max(10, 10 * rounds // count))
        except CmrhpcError:
            rates[str(count)] = None
    return {
        "name": torch.cuda.get_device_name(),
        "generations_per_second": rates,
        "one_model": generation("dae-gan-32", rounds, 1, "cuda"),
        "classifier": {name: classifier(name, rounds, 1, "cuda") for name in CLASSIFIERS},
    }
