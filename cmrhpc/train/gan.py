"""Training of one generator: data, the generations, log, checkpoints (METHODS M3, M5 to M8)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmrhpc.errors import BadInput, CmrhpcError
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
from cmrhpc.train.evolution import Draws, Evolution, Outcome
from cmrhpc.train.latent import Latent
from cmrhpc.train.log import json_safe

GRID = 64  # images of the fixed noise: grid, untrained grid, collapse check
SAMPLING_BATCH = 64  # fixed, so that the first m of n samples are the same bits
ONE_WINS = 0.95  # share of wins that is warned of
BEATEN = 0.02  # mean loss of D below which it is never wrong and G has nothing to learn from
COLLAPSED = 0.2  # of the real images' pairwise distance, below which samples have collapsed


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
    run = _Run(settings, evolution, rng, log)
    saved = checkpoints.newest() if checkpoints else None
    if checkpoints and saved:
        with checkpoints.loading():
            run.load(saved.tensors, saved.state)
    run.clock = time.monotonic()

    # Train.
    while run.step < settings.generations:
        draws = draw_generation(settings, latent, data, label_data, classes, len(evolution.parents), rng)
        logged = (run.step + 1) % settings.log_every == 0 or run.step + 1 == settings.generations
        outcome = evolution.generation(draws, score=logged)
        run.step += 1
        run.count(outcome)

        # Update the average.
        if settings.ema:
            run.average(min(settings.ema, (1 + run.step) / (10 + run.step)))

        # Log.
        if logged:
            grid = _grid(g, run.averaged_weights(), latent, classes, grid_seed)
            run.write_log(relative_diversity([grid[c :: len(real)] for c in range(len(real))], real))
        progress(run.step, settings.generations)

        # Checkpoint.
        if run.step < settings.generations:
            stopping = should_stop()
            if checkpoints and (stopping or checkpoints.due()):
                checkpoints.save(run.step, run.tensors(), run.state())
            if stopping:
                raise stop_here(checkpoints, run.step, settings.generations)

    averaged = run.averaged_weights()
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


class _Run:
    """What a training carries from generation to generation beside the evolution itself."""

    def __init__(self, settings: Generator, evolution: Evolution, rng: torch.Generator, log: Callable):
        self.settings, self.evolution, self.rng, self.log = settings, evolution, rng, log
        self.step = 0
        self.ema = (evolution.g.vector.clone(), evolution.g.buffers.clone()) if settings.ema else None
        self.window = torch.zeros(0)  # sums since the last log step, on the device
        self.window_steps = 0
        self.wins = [0] * len(settings.mutations)
        self.entries: list[dict[str, Any]] = []
        self.warned: list[str] = []
        self.clock = time.monotonic()

    def average(self, decay: float) -> None:
        assert self.ema is not None
        for mean, now in zip(self.ema, (self.evolution.parents[0], self.evolution.buffers[0]), strict=True):
            mean.lerp_(now, 1 - decay)

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged generator as a state dict, or None when EMA is off."""
        if self.ema is None:
            return None
        evolution, module = self.evolution, self.evolution.generator
        evolution._hold(*self.ema)
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        evolution._hold(evolution.parents[0], evolution.buffers[0])
        return state

    def count(self, outcome: Outcome) -> None:
        """Add one generation to the log window. Offspring are averaged over parents."""
        kinds = len(self.settings.mutations)
        per_kind = [x.view(-1, kinds).mean(0) for x in (outcome.loss_g, outcome.f_q, outcome.f_d)]
        spreads = torch.stack([outcome.f_q.max() - outcome.f_q.min(), outcome.f_d.max() - outcome.f_d.min()])
        row = torch.cat([outcome.loss_d[None], *per_kind, spreads]).double()
        winner = (outcome.order[:, None] % kinds == torch.arange(kinds, device=outcome.order.device)).sum(0)
        row = torch.cat([row, winner])
        self.window = self.window + row if self.window_steps else row
        self.window_steps += 1

    def write_log(self, relative_diversity: float) -> None:
        """Hand out one log entry, means over the window; of one mutation alone the scores of now.

        Raises CmrhpcError when the losses are not finite.
        """
        names, gamma = list(self.settings.mutations), self.settings.gamma
        kinds = len(names)
        sums = self.window.cpu()
        loss_d, rest = float(sums[0]) / self.window_steps, sums[1:] / self.window_steps
        if kinds == 1:  # scored for this entry alone
            rest[kinds : 3 * kinds] *= self.window_steps
        loss_g, f_q, f_d = (dict(zip(names, part.tolist(), strict=True)) for part in rest[: 3 * kinds].split(kinds))
        window_wins = [round(x) for x in sums[-kinds:].tolist()]
        self.wins = [a + b for a, b in zip(self.wins, window_wins, strict=True)]
        seconds = max(time.monotonic() - self.clock, 1e-9)
        shown = self.window_steps * self.settings.batch * self.settings.discriminator_steps
        finite = all(map(math.isfinite, sums.tolist()))
        entry: dict[str, Any] = {
            "step": self.step,
            "loss_d": loss_d,
            "loss_g": loss_g,
            "f_q": f_q,
            "f_d": f_d,
            "f_q_spread": float(rest[3 * kinds]),
            "gamma_f_d_spread": gamma * float(rest[3 * kinds + 1]),
            "winner": names[window_wins.index(max(window_wins))],
            "wins": dict(zip(names, self.wins, strict=True)),
            "diversity": relative_diversity,
            "images_per_second": shown / seconds,
        }
        warnings = [] if finite else ["a loss or fitness is not finite"]
        share = max(self.wins) / max(1, sum(self.wins))
        texts = {
            "wins": f"one mutation wins nearly always ({share:.0%})",
            "beaten": "D is never wrong, so that G learns nothing: lower gamma or the learning rate, or set r1",
            "collapse": f"samples collapse: pairwise distance {relative_diversity:.0%} of the real images'",
        }
        seen = {"beaten": loss_d < BEATEN, "collapse": relative_diversity < COLLAPSED} if self.step >= 200 else {}
        seen["wins"] = kinds > 1 and self.step >= 500 and share > ONE_WINS
        news = [name for name in texts if seen.get(name) and name not in self.warned]
        self.warned += news
        warnings += [texts[name] for name in news]
        if warnings:
            entry["warning"] = "; ".join(warnings)
        entry = json_safe(entry)
        self.entries.append(entry)
        self.log(entry)
        self.window_steps, self.clock = 0, time.monotonic()
        if not finite:
            raise CmrhpcError(
                f"training diverged: a loss or fitness is not finite at generation {self.step}",
                mend="lower learning_rate, or run in exact mode",
            )

    def tensors(self) -> dict[str, Tensor]:
        e = self.evolution
        named = {
            "parents": e.parents,
            "buffers": e.buffers,
            "first": e.first,
            "second": e.second,
            "d": e.d.vector,
            "d_buffers": e.d.buffers,
            "d_first": e.d_first,
            "d_second": e.d_second,
            "rng": self.rng.get_state(),
        }
        named |= self._counters()
        if self.window_steps:
            named["window"] = self.window
        if self.ema:
            named |= {"ema": self.ema[0], "ema_buffers": self.ema[1]}
        return named

    def _counters(self) -> dict[str, Tensor]:
        """Batch norm's counts of batches: they decide nothing, but are part of the weights file."""
        modules = {"generator": self.evolution.generator, "discriminator": self.evolution.discriminator}
        named = ((f"{kind}.{name}", b) for kind, module in modules.items() for name, b in module.named_buffers())
        return {name: buffer for name, buffer in named if not buffer.is_floating_point()}

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "d_steps": self.evolution.d_steps,
            "window_steps": self.window_steps,
            "wins": self.wins,
            "entries": self.entries,
            "warned": self.warned,
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from `tensors` and `state`; the stored log entries are handed out again."""
        e, device = self.evolution, self.evolution.g.vector.device
        e.parents, e.buffers, e.first, e.second = (
            tensors[name].to(device, copy=True) for name in ("parents", "buffers", "first", "second")
        )
        e.d.vector.copy_(tensors["d"])
        e.d.buffers.copy_(tensors["d_buffers"])
        e.d_first.copy_(tensors["d_first"])
        e.d_second.copy_(tensors["d_second"])
        e._hold(e.parents[0], e.buffers[0])
        for name, counter in self._counters().items():
            counter.copy_(tensors[name])
        e.step, e.d_steps = state["step"], state["d_steps"]
        self.rng.set_state(tensors["rng"])
        if self.ema:
            self.ema = (tensors["ema"].to(device, copy=True), tensors["ema_buffers"].to(device, copy=True))
        self.step, self.window_steps = state["step"], state["window_steps"]
        self.window = tensors["window"].to(device) if self.window_steps else self.window
        self.wins, self.entries, self.warned = state["wins"], state["entries"], state["warned"]
        for entry in self.entries:
            self.log(entry)


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
