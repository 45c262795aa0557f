"""One generation of the evolution (METHODS M5; [DAE] 2.1-2.2, Algorithm 1), doing no work twice.

All offspring come from one parent, so one noise draw and one forward pass through G serve every mutation. When D does
not mix samples, the mutations' gradients at the images differ by one factor per sample only, and D's backward pass is
done once; when G does not either, so do those at its activations, and only its weight gradients are left per
mutation. The real half of the fitness F_d is the same for all offspring and computed once. On the CPU the passes run
side by side, each on one thread, and those of networks that do not mix samples in pieces of a batch: all losses are
means over samples, so that their gradients add up. `plain.py` is the same algorithm written out line by line, and the
tests hold one against the other.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmrhpc.nets.spectral import spectral_layers
from cmrhpc.train import losses
from cmrhpc.train.compute import sent
from cmrhpc.train.diffaugment import Views, augment
from cmrhpc.train.flat import Flat, Rates, adam_children, adam_rates, adam_step
from cmrhpc.train.recorded import Capture, Recorded, cuda_graph
from cmrhpc.train.taps import Taps
from cmrhpc.train.workers import Replica, Workers, keep_no_state


@dataclass(frozen=True)
class Draws:
    """Everything random in one generation. B = batch, E = scoring batch, L = latent size, all on the device."""

    real: Tensor  # (T, B, C, H, W) real images of the T discriminator steps
    noise: Tensor  # (T, B, L)
    lam: Tensor | None  # (T, B) mixup weights; None without mixup
    training_noise: Tensor  # (1, B, L) shared by all offspring, or (survivors * mutations, B, L)
    scoring_real: Tensor  # (E, C, H, W)
    scoring_noise: Tensor  # (E, L)
    # With classes (ACGAN) also the labels of each, else None.
    real_label: Tensor | None = None  # (T, B)
    label: Tensor | None = None  # (T, B) asked for with `noise`
    training_label: Tensor | None = None  # (1 or survivors * mutations, B)
    scoring_label: Tensor | None = None  # (E,)
    views: Views | None = None  # DiffAugment's draws; None without


@dataclass(frozen=True)
class _Given:
    """What a recorded generation reads beside its state."""

    draws: Draws
    rates: Tensor  # (T + 1, 2) Adam's of the D steps and of the offspring


@dataclass(frozen=True)
class Outcome:
    """What one generation measured; offspring are ordered parent by parent, mutation by mutation."""

    loss_d: Tensor  # () mean over the D steps
    loss_d_source: Tensor  # () its part that tells real from generated, less the least that it can be
    loss_g: Tensor  # (offspring,)
    f_q: Tensor  # (offspring,)
    f_d: Tensor  # (offspring,)
    order: Tensor  # (survivors,) offspring numbers that survive, best first


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm goes on using the batch's statistics but leaves its running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _as_channels_last(x: Tensor) -> Tensor:
    """Images (N, 1, H, W) with strides that say channels-last: with one channel both layouts are the same bytes, and
    convolutions would take the strides of the other one for a wish to have it in their output too."""
    if x.dim() == 4 and x.shape[1] == 1 and x.is_contiguous():
        height, width = x.shape[2:]
        return x.as_strided(x.shape, (height * width, 1, width, 1))
    return x


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, added up in order."""
    return sum(parts[1:], start=parts[0])


def _loss_factors(logit: Tensor, mutations: Sequence) -> tuple[list[Tensor], Tensor]:
    """Losses of logits (N,) and their gradients there (mutations, N).

    Where D does not mix samples, sample i's image moves logit i only: dL/dimage_i = dL/dlogit_i * dlogit_i/dimage_i.
    """
    leaf = logit.detach().requires_grad_()
    values = [mutation(leaf) for mutation in mutations]
    factors = torch.stack([torch.autograd.grad(value, leaf)[0] for value in values])
    return [value.detach() for value in values], factors


class Evolution:
    """Parents, their optimizer states, the discriminator and its own, and the generation step on them.

    generator: module, z (N, L) [, label] -> images; discriminator: module, images -> logits (N,) [, class logits].
    A network whose attribute `mixes_samples` is missing or true (batch norm, say) is treated with care: nothing is
    shared that its mixing would make wrong. Both modules are kept in training mode and are changed in
    place; after a generation `generator` holds the best survivor. `bfloat16` runs the networks in that format.

    workers: passes that run side by side on the CPU, each on one thread; by default torch's number of threads. Only
    networks that declare `mixes_samples`, draw no random numbers and keep no state but batch norm's run side by side.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        mutations: Sequence[str] = tuple(losses.MUTATIONS),
        survivors: int = 1,
        gamma: float = 0.1,
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        r1: float = 0.0,
        bfloat16: bool = False,
        workers: int | None = None,
    ):
        self.generator, self.discriminator = generator.train(), discriminator.train()
        self.mutations = [losses.MUTATIONS[name] for name in mutations]
        self.survivors, self.gamma, self.r1 = survivors, gamma, r1
        self.learning_rate, self.betas, self.bfloat16 = learning_rate, betas, bfloat16
        self.step = 0  # generations done
        self.d_steps = 0  # discriminator updates done
        self.workers = Workers(generator, workers if keep_no_state(generator) and keep_no_state(discriminator) else 1)
        self.d_mixes = getattr(discriminator, "mixes_samples", True)
        self.mixes = self.d_mixes or getattr(generator, "mixes_samples", True)
        self.pieces = 1 if self.mixes else self.workers.count
        self.g, self.d = self.workers.replicas[0].flat, Flat(discriminator)
        # One row per parent. At the start all parents are equal, and one is enough.
        self.parents = self.g.vector.clone()[None]
        self.buffers = self.g.buffers.clone()[None]
        self.first, self.second = torch.zeros_like(self.parents), torch.zeros_like(self.parents)
        self.d_first, self.d_second = torch.zeros_like(self.d.vector), torch.zeros_like(self.d.vector)
        self.normed = spectral_layers(discriminator)
        # On a GPU generations with and without scores are recorded, each when it comes.
        self.recorded: dict[bool, Recorded[_Given, Outcome]] = {}
        if self.g.vector.device.type == "cuda":
            self.recorded = {score: self.recording(score) for score in (True, False)}

    def generation(self, draws: Draws, score: bool = True) -> Outcome:
        """Train D, make every parent's offspring, score them, keep the best with their own optimizer states.

        score: False leaves out the scores (zeros then) of a single offspring, of which they decide nothing.
        """
        steps = len(draws.real)
        rates = [adam_rates(self.d_steps + t + 1, self.learning_rate, self.betas) for t in range(steps)]
        rates.append(adam_rates(self.step + 1, self.learning_rate, self.betas))
        self.step, self.d_steps = self.step + 1, self.d_steps + steps
        offspring = len(self.parents) * len(self.mutations)
        score = score or offspring > 1  # where all survive, their order decides which one is the best
        if not self.recorded:
            return self._generation(draws, rates, score)
        numbers = torch.tensor(rates, dtype=self.g.vector.dtype)
        given = _Given(draws, sent(numbers, self.g.vector.device))
        settled = min(offspring, self.survivors) == len(self.parents)  # until then parents multiply
        return self.recorded[score](given) if settled else self._generation(draws, given.rates, score)

    def recording(self, score: bool, capture: Capture = cuda_graph) -> Recorded[_Given, Outcome]:
        """A generation that is recorded when it is called."""
        return Recorded(lambda given: self._generation(given.draws, given.rates, score), self.state, capture)

    def state(self) -> list[Tensor]:
        """Everything that a generation changes, the same memory once there are as many parents as survive."""
        flat = [self.g.vector, self.g.buffers, self.d.vector, self.d.buffers, *self._counters().values()]
        return [self.parents, self.buffers, self.first, self.second, self.d_first, self.d_second, *flat]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, beside `step` and `d_steps`."""
        named = {
            "parents": self.parents,
            "buffers": self.buffers,
            "first": self.first,
            "second": self.second,
            "d": self.d.vector,
            "d_buffers": self.d.buffers,
            "d_first": self.d_first,
            "d_second": self.d_second,
        }
        return named | self._counters()

    def load(self, tensors: dict[str, Tensor], step: int, d_steps: int) -> None:
        """Go on from what `tensors` gave after `step` generations and `d_steps` updates of D."""
        device = self.g.vector.device
        self.parents, self.buffers, self.first, self.second = (
            tensors[name].to(device, copy=True) for name in ("parents", "buffers", "first", "second")
        )
        self.d.vector.copy_(tensors["d"])
        self.d.buffers.copy_(tensors["d_buffers"])
        self.d_first.copy_(tensors["d_first"])
        self.d_second.copy_(tensors["d_second"])
        self.show(self.parents[0], self.buffers[0])
        for name, counter in self._counters().items():
            counter.copy_(tensors[name])
        self.step, self.d_steps = step, d_steps

    def show(self, vector: Tensor, buffers: Tensor) -> None:
        """Load one individual into the generator module."""
        self.workers.replicas[0].load(vector, buffers)

    def _counters(self) -> dict[str, Tensor]:
        """Batch norm's counts of batches: they decide nothing, but are part of the weights file."""
        modules = {"generator": self.generator, "discriminator": self.discriminator}
        named = ((f"{kind}.{name}", b) for kind, module in modules.items() for name, b in module.named_buffers())
        return {name: buffer for name, buffer in named if not buffer.is_floating_point()}

    # The parts of a generation.

    def _generation(self, draws: Draws, rates: Sequence[Rates] | Tensor, score: bool) -> Outcome:
        steps = [self._train_discriminator(draws, t, rates[t]) for t in range(len(draws.real))]
        loss_g, gradients, buffers = self._mutate(draws)

        # Every offspring takes one step from its parent's weights and optimizer state.
        offspring, first, second = adam_children(
            self.parents, gradients, self.first, self.second, rates[-1], self.betas
        )

        # Score them on the same noise and the same real images, and select.
        f_q, f_d = self._score(draws, offspring, buffers) if score else [torch.zeros_like(loss_g)] * 2
        fitness = f_q + self.gamma * f_d if self.gamma else f_q  # not 0 * inf
        fitness = fitness.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = torch.sort(fitness, descending=True, stable=True).indices[: self.survivors]
        self._keep(offspring[order], buffers[order], first[order], second[order])
        loss_d, loss_d_source = torch.stack(steps).mean(0).unbind()
        return Outcome(loss_d, loss_d_source, loss_g, f_q, f_d, order)

    def _keep(self, *survivors: Tensor) -> None:
        """Make these the parents, in the memory of those before them if they are as many."""
        parents = (self.parents, self.buffers, self.first, self.second)
        if len(survivors[0]) == len(self.parents):
            for old, new in zip(parents, survivors, strict=True):
                old.copy_(new)
        else:
            self.parents, self.buffers, self.first, self.second = survivors
        self.show(self.parents[0], self.buffers[0])

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(output, class logits or None) in float32 or wider; bfloat16 inside where asked for."""
        given = [_as_channels_last(x) for x in inputs if x is not None]
        with torch.autocast(given[0].device.type, dtype=torch.bfloat16, enabled=self.bfloat16, cache_enabled=False):
            out = module(*given)
        out, classes = out if isinstance(out, tuple) else (out, None)
        wide = torch.promote_types(out.dtype, torch.float32)
        return out.to(wide), None if classes is None else classes.to(wide)

    def _judge(self, images: Tensor, view: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(logits, class logits or None) of images as D sees them: through DiffAugment where it is on."""
        return self._run(self.discriminator, images if view is None else augment(images, view))

    def _spans(self, count: int) -> list[slice]:
        """The pieces in which a batch of `count` samples is worked on."""
        ends = [count * i // self.pieces for i in range(self.pieces + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(ends) if b > a]

    def _train_discriminator(self, draws: Draws, t: int, rates: Rates) -> Tensor:
        """One Adam step on L_D (M6), the fakes from all parents in equal parts: L_D and its part of the source (2,)."""
        spans = self._spans(draws.real.shape[1])
        done = self.workers.run([functools.partial(self._loss_d, draws=draws, t=t, span=span) for span in spans])
        loss, gradient = (_total(parts) for parts in zip(*done, strict=True))
        adam_step(self.d.vector, gradient, self.d_first, self.d_second, rates, self.betas)
        for norm, weight in self.normed:
            norm.iterate(weight)
        return loss

    def _loss_d(self, replica: Replica, draws: Draws, t: int, span: slice) -> tuple[Tensor, Tensor]:
        """L_D of the samples in `span`, with its part of the source (2,), and its gradient (P,): all times their share
        of the batch."""
        real = draws.real[t, span]
        label = None if draws.label is None else draws.label[t]
        fake = self._fakes(replica, draws.noise[t], label, span)
        views = draws.views
        real_view, fake_view = (None, None) if views is None else (views.real[t, span], views.fake[t, span])
        if draws.lam is not None:
            lam = draws.lam[t, span]
            loss = losses.mixup_loss(self._judge(losses.mixup(real, fake, lam), real_view)[0], lam)
            source = loss.detach() - losses.label_entropy(lam)
        else:
            real_logit, real_classes = self._judge(real, real_view)
            fake_logit, fake_classes = self._judge(fake, fake_view)
            loss = losses.discriminator_loss(real_logit, fake_logit)
            source = loss.detach()
            if real_classes is not None and fake_classes is not None and draws.real_label is not None:
                loss = loss + losses.class_loss(real_classes, draws.real_label[t, span])
                loss = loss + losses.class_loss(fake_classes, draws.label[t, span])  # type: ignore[index]
        objective = loss
        if self.r1:
            seen = real.detach().requires_grad_()
            with frozen_statistics(self.discriminator):
                objective = loss + self.r1 * losses.r1_penalty(self._judge(seen, real_view)[0], seen)
        share = len(real) / draws.real.shape[1]
        return torch.stack([loss.detach(), source]) * share, self._d_gradient(objective * share)

    @torch.no_grad()
    def _fakes(self, replica: Replica, noise: Tensor, label: Tensor | None, span: slice) -> Tensor:
        """The parents' images from noise[span] when the whole batch is dealt out to them in equal parts."""
        fakes, first = [], 0
        for s, part in enumerate(noise.tensor_split(len(self.parents))):
            own = slice(max(first, span.start), min(first + len(part), span.stop))
            first += len(part)
            if own.start < own.stop:
                replica.load(self.parents[s], self.buffers[s])
                with frozen_statistics(replica.module):
                    fakes.append(self._run(replica.module, noise[own], None if label is None else label[own])[0])
        return torch.cat(fakes)

    def _mutate(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(losses (offspring,), their gradients (offspring, P), buffers (offspring, B) after the training pass)."""
        count, shared = len(self.mutations), len(draws.training_noise) == 1
        # One forward pass serves a group of mutations: all of them with shared noise, else each its own.
        groups = [self.mutations] if shared else [[m] for m in self.mutations]
        spans = self._spans(draws.training_noise.shape[1])
        jobs: list[Callable[[Replica], tuple[Tensor, Tensor, Tensor]]] = []
        for s in range(len(self.parents)):
            for i, group in enumerate(groups):
                k = 0 if shared else s * count + i
                about = functools.partial(self._loss_g, draws=draws, parent=s, k=k, mutations=group)
                jobs += [functools.partial(about, span=span) for span in spans]
        # Mixing networks take all threads for one pass: there is nothing to run beside it.
        done = self.workers.run(jobs, alone=self.pieces == 1)
        values, gradients, buffers = [], [], []
        for start in range(0, len(done), len(spans)):
            parts = list(zip(*done[start : start + len(spans)], strict=True))
            values.append(_total(parts[0]))
            gradients.append(_total(parts[1]))
            buffers.append(parts[2][0])
        return torch.cat(values), torch.cat(gradients), torch.cat(buffers)

    def _loss_g(
        self, replica: Replica, draws: Draws, parent: int, k: int, mutations: Sequence, span: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (mutations,) and gradients (mutations, P) of the samples in `span`, times their share; buffers."""
        replica.load(self.parents[parent], self.buffers[parent])
        noise = draws.training_noise[k]
        label = None if draws.training_label is None else draws.training_label[k, span]
        view = None if draws.views is None else draws.views.training[span]
        share = len(noise[span]) / len(noise)
        found = None
        if not self.mixes and label is None and len(mutations) > 1:
            found = self._together(replica, noise[span], mutations, share, view)
        if found:
            values, gradients = found
        else:
            images, _ = self._run(replica.module, noise[span], label)
            values, upstream = self._image_gradients(images.detach(), label, mutations, view)
            gradients = []
            for m, grad_output in enumerate(upstream):
                more = {"retain_graph": m < len(mutations) - 1, "materialize_grads": True}
                parts = torch.autograd.grad(images, replica.flat.parameters, grad_output * share, **more)
                gradients.append(replica.flat.pack(parts))
        return torch.stack(values) * share, torch.stack(gradients), replica.flat.buffers.repeat(len(mutations), 1)

    def _together(
        self, replica: Replica, noise: Tensor, mutations: Sequence, share: float, view: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Losses, and gradients times `share`, of all mutations from one backward pass through D and through G.

        None where G's weights meet something that does not come from the noise.
        """
        noise = noise.detach().requires_grad_()
        taps = Taps(len(noise))
        with taps:
            images, _ = self._run(replica.module, noise)
        seen = images.detach().requires_grad_()
        with frozen_statistics(self.discriminator):
            logit, _ = self._judge(seen, view)
        (grad_output,) = torch.autograd.grad(logit.sum(), seen)
        values, factors = _loss_factors(logit, mutations)
        gradients = taps.gradients(images, noise, grad_output, factors * share, replica.flat.parameters)
        return None if gradients is None else (values, [replica.flat.pack(parts) for parts in gradients])

    def _image_gradients(
        self, images: Tensor, label: Tensor | None, mutations: Sequence, view: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each mutation's loss and its gradient at the images, from one forward pass through D."""
        images.requires_grad_()
        with frozen_statistics(self.discriminator):
            logit, classes = self._judge(images, view)
        if self.d_mixes or classes is not None:
            values = [mutation(logit) for mutation in mutations]
            if classes is not None and label is not None:
                values = [value + losses.class_loss(classes, label) for value in values]
            gradients = [torch.autograd.grad(value, images, retain_graph=True)[0] for value in values]
            return [value.detach() for value in values], gradients
        (gradient,) = torch.autograd.grad(logit.sum(), images)
        values, factors = _loss_factors(logit, mutations)
        return values, [f.view(-1, 1, 1, 1) * gradient for f in factors]

    def _score(self, draws: Draws, offspring: Tensor, buffers: Tensor) -> tuple[Tensor, Tensor]:
        """F_q and F_d of every offspring on the same noise and the same unmixed real images ([DAE] 7, 8).

        With DiffAugment they are judged through one draw for all offspring: D knows no image that is not augmented.
        """
        views = draws.views
        # The real half of F_d (None) is the same for all offspring. It is the shortest pass and comes last, so that the
        # workers end at nearly the same time.
        passes = [*range(len(offspring)), None]
        spans = self._spans(len(draws.scoring_real))

        def job(replica: Replica, i: int | None, span: slice) -> tuple[Tensor, Tensor]:
            share = (span.stop - span.start) / len(draws.scoring_real)
            if i is None:
                view = None if views is None else views.scoring_real[span]
                logit, _ = self._judge(draws.scoring_real[span], view)
                return logit.detach(), self._d_gradient(losses.real_half(logit) * share)
            replica.load(offspring[i], buffers[i])
            label = None if draws.scoring_label is None else draws.scoring_label[span]
            with torch.no_grad(), frozen_statistics(replica.module):
                fake, _ = self._run(replica.module, draws.scoring_noise[span], label)
            logit, _ = self._judge(fake, None if views is None else views.scoring_fake[span])
            gradient = self._d_gradient(losses.fake_half(logit) * share)
            return losses.quality_fitness(logit.detach()) * share, gradient

        with frozen_statistics(self.discriminator):
            done = self.workers.run([functools.partial(job, i=i, span=span) for i in passes for span in spans])
        sums = []
        for start in range(0, len(done), len(spans)):
            parts = list(zip(*done[start : start + len(spans)], strict=True))
            sums.append((parts[0], _total(parts[1])))
        *fakes, (_, real_gradient) = sums
        f_q = [_total(values) for values, _ in fakes]
        f_d = [losses.diversity_fitness(real_gradient + gradient) for _, gradient in fakes]
        return torch.stack(f_q), torch.stack(f_d)

    def _d_gradient(self, loss: Tensor) -> Tensor:
        """Gradient of a loss at D's parameters as one vector (P,); zero where the loss does not reach."""
        return self.d.pack(torch.autograd.grad(loss, self.d.parameters, materialize_grads=True))
