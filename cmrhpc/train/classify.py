"""Training of a classifier with a fixed step budget and the best validation weights restored (METHODS M10)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmrhpc.errors import BadInput, CmrhpcError
from cmrhpc.nets.classifiers import build_classifier
from cmrhpc.study import Classifier, Compute
from cmrhpc.train.checkpoint import Checkpoints, or_anew, stop_here
from cmrhpc.train.compute import autocast, sent, setup_compute
from cmrhpc.train.log import json_safe
from cmrhpc.train.recorded import Recorded

SCORING_BATCH = 64


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier holding the weights of its best validation step."""

    network: nn.Module
    history: list[dict[str, float]]  # per validation: step, train_loss, validation_loss, validation_accuracy
    best_step: int

    def scores(self, images: Tensor) -> np.ndarray:
        """(N, C, H, W) float32 -> softmax (N, classes) float64."""
        return torch.softmax(_logits(self.network, images).double(), dim=1).numpy()


@or_anew
def train_classifier(
    images: Tensor,  # (N, C, H, W) float32 in [-1, 1]
    labels: Tensor,  # (N,) class indices
    validation_images: Tensor,  # (V, C, H, W)
    validation_labels: Tensor,  # (V,)
    settings: Classifier,
    compute: Compute,
    n_classes: int,
    init_seed: int,
    order_seed: int,
    device: torch.device | str = "cpu",
    log: Callable[[dict[str, Any]], None] = lambda entry: None,  # one dict per validation; all again on resume
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainedClassifier:
    """Train for `settings.steps` steps of RMSprop and restore the weights of the lowest validation cross-entropy.

    Ties go to the earliest step; the last step is validated too. Raises BadInput for empty sets or a weights file
    that does not fit, CmrhpcError when the loss is not finite, Checkpointed when `should_stop` asked for it.
    Resumes from the newest checkpoint, on the CPU bitwise.
    """
    # Initialize.
    setup_compute(compute)
    device = torch.device(device)
    if not len(images) or not len(validation_images):
        raise BadInput("a classifier needs training and validation images", mend="use fewer folds or more patients")
    training = Training(images, labels, settings, compute, n_classes, init_seed, device)
    model, optimizer = training.model, training.optimizer
    order = DataOrder(len(images), settings.batch, order_seed)

    # Load the data.
    validation_images = validation_images.to(device, torch.float32)
    validation_labels = validation_labels.cpu().long()

    # Take up a checkpoint.
    step, best_step, best_loss = 0, 0, math.inf
    best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    history: list[dict[str, float]] = []
    window: list[float] = []
    losses: list[Tensor] = []  # of the newest steps, still on the device: asking for each would wait for it
    saved = checkpoints.newest() if checkpoints else None
    if checkpoints and saved:
        with checkpoints.loading():
            step, state = saved.step, saved.state
            _load(model, optimizer, best, saved.tensors)
            order.load(saved.tensors, state["position"])
            best_step, history, window = state["best_step"], state["history"], state["window"]
            best_loss = min((h["validation_loss"] for h in history), default=math.inf)
        for entry in history:
            log(entry)

    # Train.
    clock, clock_step = time.monotonic(), step  # speed is that of the steps since the start or the last validation
    model.train()
    while step < settings.steps:
        losses.append(training.step(order.next()))
        step += 1

        # Validate, and keep the best weights.
        if step % settings.validate_every == 0 or step == settings.steps:
            logits = _logits(model, validation_images).double()
            model.train()
            window += _values(losses)
            entry = {
                "step": step,
                "train_loss": math.fsum(window) / len(window),
                "validation_loss": float(F.cross_entropy(logits, validation_labels)),
                "validation_accuracy": float((logits.argmax(1) == validation_labels).double().mean()),
                "images_per_second": (step - clock_step) * settings.batch / max(time.monotonic() - clock, 1e-9),
            }
            finite = math.isfinite(entry["train_loss"]) and math.isfinite(entry["validation_loss"])
            history.append(entry)
            log(entry if finite else json_safe({**entry, "warning": "the loss is not finite"}))
            if not finite:
                raise CmrhpcError(f"classifier diverged: loss not finite at step {step}", mend="lower learning_rate")
            if entry["validation_loss"] < best_loss:
                best_loss, best_step = entry["validation_loss"], step
                best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            window.clear()
            clock, clock_step = time.monotonic(), step
        progress(step, settings.steps)

        # Checkpoint.
        if step < settings.steps:
            stopping = should_stop()
            if checkpoints and (stopping or checkpoints.due()):
                tensors = _tensors(model, optimizer, best) | order.tensors()
                window += _values(losses)
                state = {"best_step": best_step, "history": history, "window": window, "position": order.position}
                checkpoints.save(step, tensors, state)
            if stopping:
                raise stop_here(checkpoints, step, settings.steps)

    model.load_state_dict(best)
    return TrainedClassifier(model, history, best_step)


class Training:
    """A seeded classifier in channels-last, its optimizer, and the training data on its device."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        settings: Classifier,
        compute: Compute,
        n_classes: int,
        init_seed: int,
        device: torch.device,
    ):
        self.compute, self.device = compute, device
        self.model = build_classifier(settings.network, images.shape[1], n_classes, init_seed, settings.weights)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        on_gpu = device.type == "cuda"
        if on_gpu:  # the steps before the recording run uncaptured
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        rate = settings.learning_rate
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=rate, capturable=on_gpu)
        self.recorded = Recorded(self._step, self.state) if on_gpu else None
        self.images = images.to(device, torch.float32).contiguous(memory_format=torch.channels_last)
        self.labels = labels.to(device, torch.long)

    def step(self, index: Tensor) -> Tensor:
        """One step on the images of `index` (batch,); returns their loss ()."""
        return (self.recorded or self._step)(sent(index, self.device))

    def state(self) -> list[Tensor]:
        """Everything that a step changes, the same memory from the second one on."""
        moments = [value for kept in self.optimizer.state.values() for value in kept.values()]
        return [*self.model.parameters(), *self.model.buffers(), *moments]

    def _step(self, index: Tensor) -> Tensor:
        with autocast(self.compute, self.device):
            logits = self.model(self.images[index])
        loss = F.cross_entropy(logits.float(), self.labels[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class DataOrder:
    """Equal batches from seeded permutations; a last incomplete one is filled up from its permutation's start."""

    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch = count, batch
        self.rng = torch.Generator().manual_seed(seed)
        self.permutation = torch.zeros(0, dtype=torch.long)
        self.position = 0

    def next(self) -> Tensor:
        """Indices (batch,) of the next batch."""
        if self.position >= len(self.permutation):
            self.permutation = torch.randperm(self.count, generator=self.rng)
            self.position = 0
        places = torch.arange(self.position, self.position + self.batch) % self.count
        self.position += self.batch
        return self.permutation[places]

    def tensors(self) -> dict[str, Tensor]:
        return {"order.rng": self.rng.get_state(), "order.permutation": self.permutation}

    def load(self, tensors: dict[str, Tensor], position: int) -> None:
        self.rng.set_state(tensors["order.rng"])
        self.permutation, self.position = tensors["order.permutation"], position


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Float32 logits (N, classes) on the CPU in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    parts = [model(part.to(device, torch.float32)).float().cpu() for part in images.split(SCORING_BATCH)]
    return torch.cat(parts)


def _values(losses: list[Tensor]) -> list[float]:
    """Their values, and empties the list."""
    values = torch.stack(losses).tolist() if losses else []
    losses.clear()
    return values


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    named |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    return named


def _load(
    model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[f"model.{name}"])
            best[name].copy_(tensors[f"best.{name}"])
    for name, parameter in model.named_parameters():
        for key in ("step", "square_avg"):
            value = tensors.get(f"optimizer.{key}.{name}")
            if value is not None:
                if key == "square_avg":
                    value = torch.empty_like(parameter).copy_(value)
                elif optimizer.defaults["capturable"]:
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
