"""Training of one generator: data, the generations, log, checkpoints (METHODS M3, M5 to M8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmrhpc.errors import BadInput
from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.nets.spectral import add_spectral_norm
from cmrhpc.seeds import derive_seed
from cmrhpc.study import Affine, Compute, Generator
from cmrhpc.train import losses
from cmrhpc.train.affine import expand
from cmrhpc.train.checkpoint import Checkpoints, or_anew, stop_here
from cmrhpc.train.compute import sent, setup_compute, uses_bfloat16
from cmrhpc.train.diffaugment import Views
from cmrhpc.train.evolution import Draws, Evolution
from cmrhpc.train.gan_log import GanLog
from cmrhpc.train.latent import Latent

GRID = 64  # images of the fixed noise: grid, untrained grid, collapse check
SAMPLING_BATCH = 64  # fixed, so that the first m of n samples are the same bits


@dataclass(frozen=True)
class TrainedGan:
    """A trained generator. Images are float32 on the CPU in [-1, 1], from the averaged weights when EMA is on."""

    network: nn.Module
    discriminator: nn.Module
    averaged: dict[str, Tensor] | None
    latent: Latent
    n_classes: int  # 0 unless conditional
    untrained: Tensor  # (64, C, H, W) of the generator before training, on the fixed noise
    grid: Tensor  # (64, C, H, W) after training, on the same noise

    def sample(self, count: int, seed: int, label: int | None = None) -> Tensor:
        """(count, C, H, W); the first m of n samples are the same bits whatever n. `label` for a conditional model."""
        return _sample(self.network, self.averaged, self.latent, count, torch.Generator().manual_seed(seed), label)

    def weights(self) -> dict[str, Tensor]:
        """Everything that makes images and judged them, for safetensors."""
        named = {f"generator.{k}": v for k, v in self.network.state_dict().items()}
        named |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        named |= {f"generator_ema.{k}": v for k, v in (self.averaged or {}).items()}
        named |= {"latent.means": self.latent.means, "latent.scales": self.latent.scales}
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}


def build_pair(
    settings: Generator, image_size: int, channels: int, n_classes: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Seeded G and D of a generator's settings. Raises BadInput for an image size that does not fit."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "weights"))
    size = (image_size, channels, settings.latent_dim, settings.base_channels, rng)
    pair: tuple[nn.Module, nn.Module]
    if settings.networks == "dcgan":
        pair = dcgan_pair(*size, n_classes if settings.conditional else 0, batch_norm=not settings.spectral_norm)
    elif settings.conditional:
        raise BadInput("only dcgan networks are conditional", "study.toml conditional", 'set networks = "dcgan"')
    else:
        pair = residual_pair(*size)
    if settings.spectral_norm:
        add_spectral_norm(pair[1], rng)
    return pair


@or_anew
def train_gan(
    images: Tensor,  # (N, C, H, W) float32 in [-1, 1], the training images of one class (all classes if conditional)
    labels: Tensor | None,  # (N,) class indices, needed by a conditional generator only
    settings: Generator,
    compute: Compute,
    affine: Affine,
    n_classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    log: Callable[[dict[str, Any]], None] = lambda entry: None,  # one JSON-able dict per log step; all again on resume
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] = lambda: False,  # asked after every generation
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainedGan:
    """Train and return a generator.

    Raises BadInput (image size, empty set), CmrhpcError when the loss is not finite, and Checkpointed when
    `should_stop` asked for it. Resumes from the newest checkpoint, on the CPU bitwise.
    """
    # Initialize.
    setup_compute(compute)
    if not len(images) or images.shape[2] != images.shape[3]:
        raise BadInput(f"cannot train on images of shape {tuple(images.shape)}", mend="give square images")
    if settings.conditional and labels is None:
        raise BadInput("a conditional generator needs labels")
    classes = n_classes if settings.conditional else 0
    g, d = build_pair(settings, images.shape[2], images.shape[1], n_classes, seed)
    g.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    d.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    latent = Latent.draw(
        settings.components, settings.latent_dim, torch.Generator().manual_seed(derive_seed(seed, "latent"))
    )
    rng = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    grid_seed = derive_seed(seed, "grid")
    untrained = _grid(g, None, latent, classes, grid_seed)

    # Load the data: the whole set, expanded once, stays on the device.
    data = images.to(device, torch.float32)
    label_data = labels.cpu().long() if labels is not None and settings.conditional else None
    if settings.expand:
        data = expand(data, affine.factor, torch.Generator().manual_seed(derive_seed(seed, "affine")))
        label_data = label_data.repeat(affine.factor) if label_data is not None else None
    data = data.contiguous(memory_format=torch.channels_last)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(grid_seed))
    of_class = [order] if label_data is None else [order[label_data[order] == c] for c in range(classes)]
    real = [data[rows[:GRID]].cpu() for rows in of_class]

    # Start the evolution, or take it up where a checkpoint left it.
    evolution = Evolution(
        g,
        d,
        mutations=settings.mutations,
        survivors=settings.survivors,
        gamma=settings.gamma,
        learning_rate=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        r1=settings.r1,
        bfloat16=uses_bfloat16(compute, torch.device(device)),
    )
    average = Average(evolution) if settings.ema else None
    gan_log, step = GanLog(settings, log), 0
    saved = checkpoints.newest() if checkpoints else None
    if checkpoints and saved:
        with checkpoints.loading():
            step = saved.step
            evolution.load(saved.tensors, step, saved.state["d_steps"])
            if average:
                average.load(saved.tensors)
            rng.set_state(saved.tensors["rng"])
            gan_log.load(saved.tensors, saved.state, device)

    # Train.
    while step < settings.generations:
        draws = draw_generation(settings, latent, data, label_data, classes, len(evolution.parents), rng)
        logged = (step + 1) % settings.log_every == 0 or step + 1 == settings.generations
        gan_log.add(evolution.generation(draws, score=logged))
        step += 1

        # Update the average.
        if average:
            average.add(min(settings.ema, (1 + step) / (10 + step)))

        # Log.
        if logged:
            grid = _grid(g, average.weights() if average else None, latent, classes, grid_seed)
            gan_log.write(step, relative_diversity([grid[c :: len(real)] for c in range(len(real))], real))
        progress(step, settings.generations)

        # Checkpoint.
        if step < settings.generations:
            stopping = should_stop()
            if checkpoints and (stopping or checkpoints.due()):
                tensors = evolution.tensors() | gan_log.tensors() | {"rng": rng.get_state()}
                tensors |= average.tensors() if average else {}
                checkpoints.save(step, tensors, gan_log.state() | {"d_steps": evolution.d_steps})
            if stopping:
                raise stop_here(checkpoints, step, settings.generations)

    averaged = average.weights() if average else None
    return TrainedGan(g, d, averaged, latent, classes, untrained, _grid(g, averaged, latent, classes, grid_seed))


def draw_generation(
    settings: Generator,
    latent: Latent,
    data: Tensor,
    labels: Tensor | None,
    n_classes: int,
    parents: int,
    rng: torch.Generator,
) -> Draws:
    """Everything random in one generation, drawn on the CPU and moved to the data's device.

    labels: (N,) of the data, on the CPU; None without classes. With them real images are drawn like the labels asked of
    G, every class alike often: otherwise D would tell real from generated by the shares of the classes.
    """
    steps, batch, scoring = settings.discriminator_steps, settings.batch, settings.scoring_batch
    passes = 1 if settings.training_noise == "shared" else parents * len(settings.mutations)

    def noise(*shape: int) -> Tensor:
        return sent(latent.sample(math.prod(shape), rng).view(*shape, -1), data.device)

    def some(*shape: int) -> Tensor:
        if labels is None:
            return torch.randint(len(data), shape, generator=rng)
        weights = 1 / labels.bincount().double()[labels]
        return torch.multinomial(weights, math.prod(shape), replacement=True, generator=rng).view(shape)

    def classes(*shape: int) -> Tensor | None:
        return sent(torch.randint(n_classes, shape, generator=rng), data.device) if n_classes else None

    real, scoring_real = some(steps, batch), some(scoring)
    lam = sent(losses.beta(settings.mixup_alpha, (steps, batch), rng), data.device) if settings.mixup_alpha else None
    return Draws(
        real=data[sent(real.flatten(), data.device)].unflatten(0, (steps, batch)),
        noise=noise(steps, batch),
        lam=lam,
        training_noise=noise(passes, batch),
        scoring_real=data[sent(scoring_real, data.device)],
        scoring_noise=noise(scoring),
        real_label=None if labels is None else sent(labels[real], data.device),
        label=classes(steps, batch),
        training_label=classes(passes, batch),
        scoring_label=classes(scoring),
        views=Views.draw(steps, batch, scoring, rng, data.device) if settings.diffaugment else None,
    )


def diversity(images: Tensor) -> float:
    """Mean Euclidean distance between all pairs of images (N, C, H, W)."""
    return float(torch.nn.functional.pdist(images.flatten(1).double()).mean()) if len(images) > 1 else 0.0


def relative_diversity(made: list[Tensor], real: list[Tensor]) -> float:
    """The diversity of images over that of real ones, in the least diverse class; 1 where none has two real images."""
    shares = [diversity(a) / max(diversity(b), 1e-12) for a, b in zip(made, real, strict=True) if len(b) > 1]
    return min(shares, default=1.0)


class Average:
    """A running mean of the best parent's weights and buffers (EMA)."""

    def __init__(self, evolution: Evolution):
        self.evolution = evolution
        self.vector, self.buffers = evolution.parents[0].clone(), evolution.buffers[0].clone()

    def add(self, decay: float) -> None:
        """Take the best parent of now into the mean, with the weight 1 - decay."""
        self.vector.lerp_(self.evolution.parents[0], 1 - decay)
        self.buffers.lerp_(self.evolution.buffers[0], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The averaged generator as a state dict."""
        evolution = self.evolution
        evolution.show(self.vector, self.buffers)
        state = {name: tensor.detach().clone() for name, tensor in evolution.generator.state_dict().items()}
        evolution.show(evolution.parents[0], evolution.buffers[0])
        return state

    def tensors(self) -> dict[str, Tensor]:
        return {"ema": self.vector, "ema_buffers": self.buffers}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.vector.copy_(tensors["ema"])
        self.buffers.copy_(tensors["ema_buffers"])


def _grid(g: nn.Module, averaged: dict[str, Tensor] | None, latent: Latent, n_classes: int, seed: int) -> Tensor:
    """The images of the fixed noise; a conditional model shows its classes in turn."""
    label = torch.arange(GRID) % n_classes if n_classes else None
    return _sample(g, averaged, latent, GRID, torch.Generator().manual_seed(seed), label)


@torch.no_grad()
def _sample(
    network: nn.Module,
    averaged: dict[str, Tensor] | None,
    latent: Latent,
    count: int,
    rng: torch.Generator,
    label: int | Tensor | None,
) -> Tensor:
    """Images in whole batches of fixed size, evaluation mode, float32."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    batches = []
    for start in range(0, max(count, 1), SAMPLING_BATCH):
        given = [latent.sample(SAMPLING_BATCH, rng).to(device)]
        if label is not None:
            chosen = torch.full((SAMPLING_BATCH,), label) if isinstance(label, int) else label[start:][:SAMPLING_BATCH]
            given.append(chosen.to(device))
        out = torch.func.functional_call(network, averaged, tuple(given)) if averaged else network(*given)
        batches.append(out.float().clamp(-1, 1).cpu())
    network.train(training)
    return torch.cat(batches)[:count].contiguous()
