"""Training of a SimGAN refiner (METHODS M9; [SIM] 2.1): two pre-training phases, then R : D updates, history buffer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.nets.convolution import quick_convolutions
from cmrhpc.nets.simgan import simgan_pair
from cmrhpc.seeds import derive_seed
from cmrhpc.study import Affine, Compute, Refiner
from cmrhpc.train import losses
from cmrhpc.train.affine import expand
from cmrhpc.train.checkpoint import Checkpoints, or_anew, stop_here
from cmrhpc.train.compute import autocast, sent, setup_compute
from cmrhpc.train.log import json_safe
from cmrhpc.train.recorded import Capture, Recorded, cuda_graph

REFINING_BATCH = 64


class HistoryBuffer:
    """Refined images of earlier steps, so that D does not forget them ([SIM] Fig. 5).

    `images` (capacity, C, H, W) on the device; the first `filled` places hold images. While it fills, D's refined
    images are all fresh and are appended. Once full, each D batch takes half of its refined images from random places
    and half fresh; then the other half of R's current output takes the places that were emptied.
    """

    def __init__(self, capacity: int, image_shape: tuple[int, int, int], device: torch.device):
        self.images = torch.zeros(capacity, *image_shape, device=device)
        self.filled = 0

    @property
    def full(self) -> bool:
        return self.filled == len(self.images)

    def draw(self, batch: int, rng: torch.Generator) -> Tensor | None:
        """Random places (batch // 2,) to exchange, at most all; None while it fills."""
        if not self.full:
            return None
        return sent(torch.randperm(len(self.images), generator=rng)[: batch // 2], self.images.device)

    def exchange(self, fresh: Tensor, places: Tensor | None) -> Tensor:
        """D's batch of refined images for R's current output, both (N, C, H, W). places: what `draw` gave for N."""
        if places is None:
            count = min(len(fresh), len(self.images) - self.filled)
            self.images[self.filled : self.filled + count] = fresh[:count]
            self.filled += count
            return fresh
        kept = len(fresh) - len(places)
        batch = torch.cat([self.images[places], fresh[:kept]])
        self.images[places] = fresh[kept:]
        return batch


@dataclass(frozen=True)
class Rows:
    """What one update draws, on the device."""

    synthetic: Tensor  # (B,) rows of the synthetic images
    real: Tensor | None = None  # (B,) of the real ones, for D
    places: Tensor | None = None  # of the buffer, for D once it is full


@dataclass(frozen=True)
class Losses:
    """What one update measured, each ()."""

    refiner_adversarial: Tensor | None = None
    refiner_self: Tensor | None = None
    discriminator: Tensor | None = None


class Updates:
    """The updates of R and of D on their images, each with its optimizer; on a GPU each is recorded when it comes."""

    def __init__(
        self,
        r: nn.Module,
        d: nn.Module,
        synthetic: Tensor,
        real: Tensor,
        buffer: HistoryBuffer,
        settings: Refiner,
        compute: Compute,
    ):
        self.r, self.d, self.synthetic, self.real, self.buffer = r, d, synthetic, real, buffer
        self.settings, self.compute = settings, compute
        self.r_sgd, self.d_sgd = (
            torch.optim.SGD(net.parameters(), lr=settings.learning_rate, momentum=settings.momentum) for net in (r, d)
        )
        self.recorded = self.recordings() if synthetic.device.type == "cuda" else {}

    def recordings(self, capture: Capture = cuda_graph) -> dict[str, Recorded[Rows, Losses]]:
        """The updates, each recorded when it is called."""
        return {
            "adversarial": Recorded(lambda rows: self._refiner(rows, True), lambda: _state(self.r_sgd), capture),
            "self": Recorded(lambda rows: self._refiner(rows, False), lambda: _state(self.r_sgd), capture),
            "discriminator": Recorded(self._discriminator, lambda: [*_state(self.d_sgd), self.buffer.images], capture),
        }

    def refiner(self, rows: Rows, adversarial: bool) -> Losses:
        """One step of R on its loss ([SIM] 3), or without `adversarial` on its second term alone."""
        if not self.recorded:
            with quick_convolutions(self.synthetic.device):
                return self._refiner(rows, adversarial)
        return self.recorded["adversarial" if adversarial else "self"](rows)

    def discriminator(self, rows: Rows) -> Losses:
        """One step of D on its loss ([SIM] 2)."""
        if not self.recorded or rows.places is None:  # Python counts the places while the buffer fills
            with quick_convolutions(self.synthetic.device):
                return self._discriminator(rows)
        return self.recorded["discriminator"](rows)

    def _refiner(self, rows: Rows, adversarial: bool) -> Losses:
        x = _batch(self.synthetic, rows.synthetic)
        with autocast(self.compute, x.device):
            refined = self.r(x)
            logits = self.d(refined) if adversarial else None
        self_term = losses.refiner_self(refined.float(), x)
        loss, term = self.settings.lambda_l1 * self_term, None
        if logits is not None:
            term = losses.refiner_adversarial(logits.float())
            loss = loss + term
        self.r_sgd.zero_grad()
        loss.backward(inputs=list(self.r.parameters()))
        self.r_sgd.step()
        return Losses(None if term is None else term.detach(), self_term.detach())

    def _discriminator(self, rows: Rows) -> Losses:
        assert rows.real is not None
        y, x = _batch(self.real, rows.real), _batch(self.synthetic, rows.synthetic)
        with torch.no_grad(), autocast(self.compute, x.device):
            fresh = self.r(x).float()
        refined = self.buffer.exchange(fresh, rows.places)
        with autocast(self.compute, x.device):
            refined_logits, real_logits = self.d(refined).float(), self.d(y).float()
        loss = losses.refiner_discriminator_loss(refined_logits, real_logits)
        self.d_sgd.zero_grad()
        loss.backward()
        self.d_sgd.step()
        return Losses(discriminator=loss.detach())


def _batch(images: Tensor, rows: Tensor) -> Tensor:
    return images[rows].contiguous(memory_format=torch.channels_last)


def _state(optimizer: torch.optim.SGD) -> list[Tensor]:
    """Weights and momenta, the same memory from the second step on."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    momenta = (kept.get("momentum_buffer") for kept in optimizer.state.values())
    return [*weights, *(momentum for momentum in momenta if momentum is not None)]


@dataclass(frozen=True)
class TrainedRefiner:
    """A trained refiner and the discriminator that judged it."""

    network: nn.Module
    discriminator: nn.Module

    @torch.no_grad()
    def refine(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [-1, 1] -> refined images of the same shape, float32 on the CPU."""
        device = next(self.network.parameters()).device
        with quick_convolutions(device):
            batches = [self.network(part.to(device)).float().cpu() for part in images.split(REFINING_BATCH)]
        return torch.cat(batches).contiguous() if batches else images.clone()

    def weights(self) -> dict[str, Tensor]:
        named = {f"refiner.{k}": v for k, v in self.network.state_dict().items()}
        named |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}


@or_anew
def train_refiner(
    synthetic: Tensor,  # (M, C, H, W) float32 in [-1, 1], generated images of one class
    real: Tensor,  # (N, C, H, W), the training images of that class
    settings: Refiner,
    compute: Compute,
    affine: Affine,
    seed: int,
    device: torch.device | str = "cpu",
    log: Callable[[dict[str, Any]], None] = lambda entry: None,  # one JSON-able dict per log step; all again on resume
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainedRefiner:
    """Train and return a refiner.

    One step is one R update in phase R, one D update in phase D, and in phase 2 `refiner_steps` R updates and one
    D update. Raises BadInput for empty or unequal image sets, CmrhpcError when a loss is not finite, and
    Checkpointed when `should_stop` asked for it. Resumes from the newest checkpoint, on the CPU bitwise.
    """
    # Initialize.
    setup_compute(compute)
    device = torch.device(device)
    if not len(synthetic) or not len(real) or synthetic.shape[1:] != real.shape[1:]:
        what = f"cannot refine synthetic {tuple(synthetic.shape)} towards real {tuple(real.shape)}"
        raise BadInput(what, mend="give images of one size, at least one of each")
    _, channels, height, width = real.shape
    r, d = simgan_pair(channels, settings.channels, torch.Generator().manual_seed(derive_seed(seed, "weights")))
    for net in (r, d):
        net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rng = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    buffer = HistoryBuffer(settings.buffer, (channels, height, width), device)

    # Load the data.
    synthetic = synthetic.to(device, torch.float32)
    real = real.to(device, torch.float32)
    if settings.expand:
        real = expand(real, affine.factor, torch.Generator().manual_seed(derive_seed(seed, "affine")))

    updates = Updates(r, d, synthetic, real, buffer, settings, compute)

    # Take up a checkpoint.
    entries: list[dict[str, Any]] = []
    window: dict[str, list[float]] = {}
    waiting: dict[str, list[Tensor]] = {}  # since the window's last entry, on the device
    step = 0
    saved = checkpoints.newest() if checkpoints else None
    if checkpoints and saved:
        with checkpoints.loading():
            step, entries, window = saved.step, saved.state["entries"], saved.state["window"]
            for prefix, net, optimizer in (("r", r, updates.r_sgd), ("d", d, updates.d_sgd)):
                _load(prefix, net, optimizer, saved.tensors)
            buffer.images.copy_(saved.tensors["buffer"])
            buffer.filled = saved.state["filled"]
            rng.set_state(saved.tensors["rng"])
        for entry in entries:
            log(entry)

    def draw(images: Tensor) -> Tensor:
        return sent(torch.randint(len(images), (settings.batch,), generator=rng), device)

    def note(measured: Losses) -> None:
        for name, value in vars(measured).items():
            if value is not None:
                waiting.setdefault(name, []).append(value)

    def settle() -> None:
        """The noted values as numbers; asking for each at once would wait for the device at every step."""
        for name, values in waiting.items():
            window.setdefault(name, []).extend(torch.stack(values).tolist())
        waiting.clear()

    def update_refiner(adversarial: bool) -> None:
        note(updates.refiner(Rows(draw(synthetic)), adversarial))

    def update_discriminator() -> None:
        real_rows, rows = draw(real), draw(synthetic)
        note(updates.discriminator(Rows(rows, real_rows, buffer.draw(settings.batch, rng))))

    # Train: phase R, phase D, phase 2.
    total = settings.pretrain_refiner + settings.pretrain_discriminator + settings.steps
    clock, clock_step = time.monotonic(), step  # speed is that of the steps since the start or the last entry
    while step < total:
        if step < settings.pretrain_refiner:
            phase = "pretrain refiner"
            update_refiner(adversarial=settings.pretrain == "full")
        elif step < settings.pretrain_refiner + settings.pretrain_discriminator:
            phase = "pretrain discriminator"
            update_discriminator()
        else:
            phase = "train"
            for _ in range(settings.refiner_steps):
                update_refiner(adversarial=True)
            update_discriminator()
        step += 1

        # Log.
        if step % settings.log_every == 0 or step == total:
            settle()
            means = {name: math.fsum(values) / len(values) for name, values in window.items()}
            steps_per_second = (step - clock_step) / max(time.monotonic() - clock, 1e-9)
            entry = {"step": step, "phase": phase, **{f"loss_{k}": v for k, v in means.items()}}
            entry["buffer_filled"] = buffer.filled
            entry["lambda_on_pixel_mean"] = settings.lambda_l1
            entry["lambda_on_pixel_sum"] = settings.lambda_l1 / (channels * height * width)
            entry["steps_per_second"] = steps_per_second
            finite = all(map(math.isfinite, means.values()))
            if not finite:
                entry["warning"] = "a loss is not finite"
            entry = json_safe(entry)
            entries.append(entry)
            log(entry)
            if not finite:
                raise CmrhpcError(f"refiner diverged: a loss is not finite at step {step}", mend="lower learning_rate")
            window.clear()
            clock, clock_step = time.monotonic(), step
        progress(step, total)

        # Checkpoint.
        if step < total:
            stopping = should_stop()
            if checkpoints and (stopping or checkpoints.due()):
                settle()
                tensors = _tensors("r", r, updates.r_sgd) | _tensors("d", d, updates.d_sgd)
                tensors |= {"buffer": buffer.images, "rng": rng.get_state()}
                state = {"entries": entries, "window": window, "filled": buffer.filled}
                checkpoints.save(step, tensors, state)
            if stopping:
                raise stop_here(checkpoints, step, total)

    return TrainedRefiner(r, d)


def _tensors(prefix: str, net: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """Weights and momenta, by parameter name."""
    named = {f"{prefix}.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            named[f"{prefix}_momentum.{name}"] = momentum
    return named


def _load(prefix: str, net: nn.Module, optimizer: torch.optim.SGD, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.copy_(tensors[f"{prefix}.{name}"])
    for name, parameter in net.named_parameters():
        momentum = tensors.get(f"{prefix}_momentum.{name}")
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
