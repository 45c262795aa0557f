"""A generation and a classifier step against plain PyTorch, and the convolution peak that they are measured by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import flop_registry

from cmrhpc.bench.timing import interleaved, medians, ratio
from cmrhpc.nets.classifiers import build_classifier
from cmrhpc.nets.plain import with_plain_layers
from cmrhpc.study import GENERATORS, Classifier, Compute, Generator
from cmrhpc.train.classify import DataOrder, Training
from cmrhpc.train.compute import has_bfloat16, setup_compute
from cmrhpc.train.evolution import Draws, Evolution
from cmrhpc.train.gan import build_pair, draw_generation
from cmrhpc.train.latent import Latent
from cmrhpc.train.plain import PlainEvolution

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


def undetermined(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call without deterministic algorithms, which a plain script does not ask for."""

    def run() -> Any:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(before, warn_only=True)

    return run


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
    """Calls of `peak_flops` floating-point operations each: a convolution that suits the hardware, per format."""
    calls: dict[str, Callable[[], object]] = {}
    for name, kind in (("peak_exact", torch.float32), ("peak_fast", torch.bfloat16)):
        x = torch.randn(32, 128, 20, 20, device=device).to(kind, memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device).to(kind, memory_format=torch.channels_last)
        calls[name] = functools.partial(F.conv2d, x, weight, padding=1)
    return calls


PEAK_FLOPS = 2 * 32 * 128 * 128 * 9 * 20 * 20


def generation(net: str, rounds: int, threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Ratios of one generation (batch 32, scoring batch 64) to the plain step, and its share of the peak.

    The plain step runs networks of PyTorch's own layers; `same_layers` is the plain step with our layers in it.
    """
    setup_compute(Compute(threads=threads))
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
        "plain": undetermined(lambda: plain.generation(draws[0])),
        "same_layers": undetermined(lambda: same_layers.generation(draws[0])),
        "exact": lambda: exact.generation(draws[0]),
        "fast": lambda: fast.generation(draws[0]),
    }
    times = interleaved({n: settled(c, device) for n, c in (calls | peak).items()}, rounds, warmup=2)
    middle = medians(times)
    flops = _flops(own(False, workers=1), draws[0])
    share = {mode: (flops / middle[mode]) / (PEAK_FLOPS / min(times[f"peak_{mode}"])) for mode in ("exact", "fast")}
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
        "peak_gflop_per_s": PEAK_FLOPS / min(times["peak_exact"]) / 1e9,
        "fast_peak_gflop_per_s": PEAK_FLOPS / min(times["peak_fast"]) / 1e9,
    }


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
    """Operations of our own step, which has one worker: the mode sees its own thread only."""
    with _Operations() as counter:
        evolution.generation(draws)
    return counter.total


def classifier(network: str, rounds: int, threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Ratios of a training step to a plain loop with a DataLoader, both from data in memory, batch 32."""
    settings = Classifier(network=network)
    compute = {mode: Compute(mode=mode, threads=threads) for mode in ("exact", "fast")}
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

    def own(mode: str) -> Callable[[], object]:
        training = Training(data, labels, settings, compute[mode], 2, 0, torch.device(device))
        training.model.train()
        order = DataOrder(N_IMAGES, settings.batch, 0)
        return lambda: float(training.step(order.next()))

    plain.train()
    calls = {"plain": undetermined(plain_step), "exact": own("exact"), "fast": own("fast")}
    times = interleaved(calls, rounds, warmup=2)
    middle = medians(times)
    return {
        "ratio": ratio(times, "plain", "fast"),
        "exact_ratio": ratio(times, "plain", "exact"),
        "plain_s": middle["plain"],
        "exact_s": middle["exact"],
        "fast_s": middle["fast"],
        "images_per_second": settings.batch / middle["fast"],
    }


def many_models(count: int, generations: int, net: str = "dae-gan-32") -> float:
    """Generations per second in total of `count` models side by side on one GPU, each on a stream of its own."""
    from concurrent.futures import ThreadPoolExecutor

    settings, device = NETS[net], torch.device("cuda")
    data = images(N_IMAGES).to(device)
    latent = Latent.draw(settings.components, settings.latent_dim, torch.Generator().manual_seed(2))

    def train(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            g, d = (n.to(device, memory_format=torch.channels_last) for n in build_pair(settings, SIZE, 1, 2, seed))  # type: ignore[call-overload]
            evolution, rng = Evolution(g, d, bfloat16=has_bfloat16(device)), torch.Generator().manual_seed(seed)
            for number in range(generations + 3):
                if number == 3:
                    torch.cuda.current_stream().synchronize()
                    ready.wait()
                evolution.generation(draw_generation(settings, latent, data, None, 0, 1, rng))
            torch.cuda.current_stream().synchronize()

    import threading
    import time

    ready = threading.Barrier(count + 1)
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(train, seed) for seed in range(count)]
        ready.wait()
        begun = time.perf_counter()
        for one in waiting:
            one.result()
    return count * generations / (time.perf_counter() - begun)


def gpu(rounds: int) -> dict[str, Any] | None:
    """Generations per second for 1, 8 and 32 models on this machine's GPU, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    setup_compute(dataclasses.replace(Compute(mode="fast", threads=1), deterministic=False))
    one = generation("dae-gan-32", rounds, 1, "cuda")
    rates = {str(count): many_models(count, max(10, 10 * rounds // count)) for count in (1, 8, 32)}
    return {
        "name": torch.cuda.get_device_name(),
        "generations_per_second": rates,
        "one_model": one,
        "classifier": {name: classifier(name, rounds, 1, "cuda") for name in CLASSIFIERS},
    }
