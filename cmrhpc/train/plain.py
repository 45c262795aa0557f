"""One generation written out line by line: the tests' oracle for `evolution.py` and the baseline of `cmrhpc bench`.

Plain PyTorch in the default memory format: torch.optim.Adam, one forward and backward pass per mutation, every
offspring scored on its own. It follows [DAE] Algorithm 1 and takes the same draws as the fast step. Nothing is
made slow on purpose: D's weights get no gradients while G trains, and scoring builds no second-order graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmrhpc.nets.spectral import spectral_layers
from cmrhpc.train import losses
from cmrhpc.train.diffaugment import augment
from cmrhpc.train.evolution import Draws, Outcome, frozen_statistics


class PlainEvolution:
    """As `evolution.Evolution`, without classes and R1. `parents` are (generator, its Adam) pairs, best first."""

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
    ):
        self.discriminator = discriminator.train()
        self.mutations, self.survivors, self.gamma = mutations, survivors, gamma
        self.learning_rate, self.betas = learning_rate, betas
        self.parents = [(generator.train(), self._adam(generator))]
        self.d_adam = self._adam(discriminator)

    def _adam(self, module: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(module.parameters(), lr=self.learning_rate, betas=self.betas)

    def generation(self, draws: Draws) -> Outcome:
        """Steps 3 and 4 of Algorithm 1."""
        loss_d = torch.stack([self.train_discriminator(draws, t) for t in range(len(draws.real))]).mean()
        loss_d_source = loss_d if draws.lam is None else loss_d - losses.label_entropy(draws.lam)

        # Step 4. Every mutation of every parent makes one offspring.
        offspring: list[tuple[nn.Module, torch.optim.Adam]] = []
        loss_g, f_q, f_d = [], [], []
        for generator, adam in self.parents:
            for mutation in self.mutations:
                # 4.1-4.2 Noise.
                shared = len(draws.training_noise) == 1
                z = draws.training_noise[0 if shared else len(offspring)]
                # 4.3-4.7 The offspring: the parent's weights and optimizer state, one step on its loss.
                child = copy.deepcopy(generator)
                child_adam = self._adam(child)
                child_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
                with frozen_statistics(self.discriminator):
                    self.discriminator.requires_grad_(False)
                    loss = losses.MUTATIONS[mutation](self.judge(child(z), draws, "training"))
                    child_adam.zero_grad()
                    loss.backward()
                    child_adam.step()
                    self.discriminator.requires_grad_(True)
                # 4.8 Its fitness.
                quality, diversity = self.fitness(child, draws)
                offspring.append((child, child_adam))
                loss_g.append(loss.detach())
                f_q.append(quality)
                f_d.append(diversity)

        # 4.9-4.10 Sort and keep the best, each with its own optimizer state.
        fitness = torch.stack(f_q) + self.gamma * torch.stack(f_d)
        order = torch.sort(fitness, descending=True, stable=True).indices[: self.survivors]
        self.parents = [offspring[int(i)] for i in order]
        return Outcome(loss_d, loss_d_source, torch.stack(loss_g), torch.stack(f_q), torch.stack(f_d), order)

    def train_discriminator(self, draws: Draws, t: int) -> Tensor:
        """Step 3: real images, noise, generated images, interpolation, loss, update."""
        real, z = draws.real[t], draws.noise[t]
        with torch.no_grad():
            fake = []
            for (generator, _), part in zip(self.parents, z.tensor_split(len(self.parents)), strict=True):
                with frozen_statistics(generator):
                    fake.append(generator(part))
            images = torch.cat(fake)
        if draws.lam is not None:
            mixed = losses.mixup(real, images, draws.lam[t])
            loss = losses.mixup_loss(self.judge(mixed, draws, "real", t), draws.lam[t])
        else:
            loss = losses.discriminator_loss(self.judge(real, draws, "real", t), self.judge(images, draws, "fake", t))
        self.d_adam.zero_grad()
        loss.backward()
        self.d_adam.step()
        for norm, weight in spectral_layers(self.discriminator):
            norm.iterate(weight)
        return loss.detach()

    def judge(self, images: Tensor, draws: Draws, view: str, t: int | None = None) -> Tensor:
        """D's logits; with DiffAugment of the images as `view` of its draws shows them."""
        if draws.views is not None:
            draw = getattr(draws.views, view)
            images = augment(images, draw if t is None else draw[t])
        return self.discriminator(images)

    def fitness(self, generator: nn.Module, draws: Draws) -> tuple[Tensor, Tensor]:
        """F_q and F_d ([DAE] 7, 8)."""
        with frozen_statistics(self.discriminator), frozen_statistics(generator):
            with torch.no_grad():
                fake = generator(draws.scoring_noise)
            fake_logit = self.judge(fake, draws, "scoring_fake")
            loss = losses.discriminator_loss(self.judge(draws.scoring_real, draws, "scoring_real"), fake_logit)
            gradient = torch.autograd.grad(loss, list(self.discriminator.parameters()))
        vector = torch.cat([g.flatten() for g in gradient])
        return losses.quality_fitness(fake_logit.detach()), losses.diversity_fitness(vector)
