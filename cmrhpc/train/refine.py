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
from cmrhpc.nets.simgan import simgan_pair
from cmrhpc.seeds import derive_seed
from cmrhpc.study import Affine, Compute, Refiner
from cmrhpc.train import losses
from cmrhpc.train.affine import expand
from cmrhpc.train.checkpoint import Checkpoints, or_anew, stop_here
from cmrhpc.train.compute import autocast, sent, setup_compute
from cmrhpc.train.log import json_safe

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

    def exchange(self, fresh: Tensor, rng: torch.Generator) -> Tensor:
        """Give R's current output (N, C, H, W); get D's batch of refined images (N, C, H, W) and update the buffer.

        Raises nothing; a batch larger than twice the capacity takes what there is.
        """
        if not self.full:
            count = min(len(fresh), len(self.images) - self.filled)
            self.images[self.filled : self.filled + count] = fresh[:count]
            self.filled += count
            return fresh
        half = min(len(fresh) // 2, len(self.images))
        places = sent(torch.randperm(len(self.images), generator=rng)[:half], self.images.device)
        batch = torch.cat([self.images[places], fresh[: len(fresh) - half]])
        self.images[places] = fresh[len(fresh) - half :]
        return batch


@dataclass(frozen=True)
class TrainedRefiner:
    """A trained refiner and the discriminator that judged it."""

    network: nn.Module
    discriminator: nn.Module

    @torch.no_grad()
    def refine(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [-1, 1] -> refined images of the same shape, float32 on the CPU."""
        device = next(self.network.parameters()).device
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
    r_sgd, d_sgd = (
        torch.optim.SGD(net.parameters(), lr=settings.learning_rate, momentum=settings.momentum) for net in (r, d)
    )
    rng = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    buffer = HistoryBuffer(settings.buffer, (channels, height, width), device)

    # Load the data.
    synthetic = synthetic.to(device, torch.float32)
    real = real.to(device, torch.float32)
    if settings.expand:
        real = expand(real, affine.factor, torch.Generator().manual_seed(derive_seed(seed, "affine")))

    # Take up a checkpoint.
    entries: list[dict[str, Any]] = []
    window: dict[str, list[float]] = {}
    waiting: dict[str, list[Tensor]] = {}  # since the window's last entry, on the device
    step = 0
    saved = checkpoints.newest() if checkpoints else None
    if checkpoints and saved:
        with checkpoints.loading():
            step, entries, window = saved.step, saved.state["entries"], saved.state["window"]
            for prefix, net, optimizer in (("r", r, r_sgd), ("d", d, d_sgd)):
                _load(prefix, net, optimizer, saved.tensors)
            buffer.images.copy_(saved.tensors["buffer"])
            buffer.filled = saved.state["filled"]
            rng.set_state(saved.tensors["rng"])
        for entry in entries:
            log(entry)

    def draw(images: Tensor) -> Tensor:
        index = torch.randint(len(images), (settings.batch,), generator=rng)
        return images[sent(index, device)].contiguous(memory_format=torch.channels_last)

    def note(name: str, value: Tensor) -> None:
        waiting.setdefault(name, []).append(value.detach())

    def settle() -> None:
        """The noted values as numbers; asking for each at once would wait for the device at every step."""
        for name, values in waiting.items():
            window.setdefault(name, []).extend(torch.stack(values).tolist())
        waiting.clear()

    def update_refiner(adversarial: bool) -> None:
        x = draw(synthetic)
        with autocast(compute, device):
            refined = r(x)
            logits = d(refined) if adversarial else None
        self_term = losses.refiner_self(refined.float(), x)
        loss = settings.lambda_l1 * self_term
        if logits is not None:
            term = losses.refiner_adversarial(logits.float())
            note("refiner_adversarial", term)
            loss = loss + term
        r_sgd.zero_grad()
        loss.backward(inputs=list(r.parameters()))
        r_sgd.step()
        note("refiner_self", self_term)

    def update_discriminator() -> None:
        y, x = draw(real), draw(synthetic)
        with torch.no_grad(), autocast(compute, device):
            fresh = r(x).float()
        refined = buffer.exchange(fresh, rng)
        with autocast(compute, device):
            refined_logits, real_logits = d(refined).float(), d(y).float()
        loss = losses.refiner_discriminator_loss(refined_logits, real_logits)
        d_sgd.zero_grad()
        loss.backward()
        d_sgd.step()
        note("discriminator", loss)

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
                tensors = _tensors("r", r, r_sgd) | _tensors("d", d, d_sgd)
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
