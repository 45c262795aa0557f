"""The log of a generator's training: means over windows of generations, who won, and what is warned of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmrhpc.errors import CmrhpcError
from cmrhpc.study import Generator
from cmrhpc.train.evolution import Outcome
from cmrhpc.train.log import json_safe

NEARLY_ALWAYS = 0.9  # share of recent wins that is warned of: at nine of ten E-GAN stayed at noise (docs/methods.md)
BEATEN = 0.02  # D's loss above the least possible one, below which it is never wrong and G has nothing to learn from
COLLAPSED = 0.2  # of the real images' pairwise distance, below which samples have collapsed
RECENT = 0.1  # share of the training that recent wins are counted over, and before whose end nothing is judged
FEWEST = 20  # generations that tell anything


class GanLog:
    """Adds up generations and hands out one entry, a JSON-able dict, per log step.

    log: takes the entries; those of a checkpoint again when it is taken up.
    """

    def __init__(self, settings: Generator, log: Callable[[dict[str, Any]], None]):
        self.settings, self.log = settings, log
        self.sums = torch.zeros(0)  # since the last entry, on the device
        self.generations = 0  # that they are of
        self.entries: list[dict[str, Any]] = []
        self.warned: list[str] = []
        self._start_clock()

    def _start_clock(self) -> None:
        self.clock, self.timed = time.monotonic(), 0

    def add(self, outcome: Outcome) -> None:
        """Add one generation. Offspring are averaged over parents."""
        kinds = len(self.settings.mutations)
        per_kind = [x.view(-1, kinds).mean(0) for x in (outcome.loss_g, outcome.f_q, outcome.f_d)]
        spreads = torch.stack([outcome.f_q.max() - outcome.f_q.min(), outcome.f_d.max() - outcome.f_d.min()])
        winner = (outcome.order[:, None] % kinds == torch.arange(kinds, device=outcome.order.device)).sum(0)
        survivors = torch.stack([outcome.loss_g, outcome.f_q, outcome.f_d])[:, outcome.order]
        finite = outcome.loss_d.isfinite() & survivors.isfinite().all()
        row = torch.cat([outcome.loss_d[None], outcome.loss_d_source[None], *per_kind, spreads]).double()
        row = torch.cat([row, winner, finite[None]])
        self.sums = self.sums + row if self.generations else row
        self.generations += 1
        self.timed += 1

    def write(self, step: int, relative_diversity: float) -> None:
        """Hand out the entry of generation `step`: means over the window; of one mutation alone the scores of now.

        Raises CmrhpcError when a loss of D, or a loss or the fitness of what survived, is not finite.
        """
        names, count = list(self.settings.mutations), self.generations
        kinds = len(names)
        sums = self.sums.cpu()
        means = sums / count
        if kinds == 1:  # scored for this entry alone
            means[3:5] = sums[3:5]
        loss_d, loss_d_source = means[:2].tolist()
        table = means[2 : 2 + 3 * kinds].split(kinds)
        loss_g, f_q, f_d = (dict(zip(names, part.tolist(), strict=True)) for part in table)
        f_q_spread, f_d_spread = means[2 + 3 * kinds : 4 + 3 * kinds].tolist()
        won = [round(x) for x in sums[-1 - kinds : -1].tolist()]
        before = self.entries[-1]["wins"] if self.entries else dict.fromkeys(names, 0)
        wins = {name: before[name] + more for name, more in zip(names, won, strict=True)}
        shown = self.timed * self.settings.batch * self.settings.discriminator_steps
        diverged = round(float(sums[-1])) < count
        entry: dict[str, Any] = {
            "step": step,
            "loss_d": loss_d,
            "loss_d_source": loss_d_source,
            "loss_g": loss_g,
            "f_q": f_q,
            "f_d": f_d,
            "f_q_spread": f_q_spread,
            "gamma_f_d_spread": self.settings.gamma * f_d_spread,
            "winner": names[won.index(max(won))],
            "wins": wins,
            "diversity": relative_diversity,
            "images_per_second": shown / max(time.monotonic() - self.clock, 1e-9),
        }
        found = self._judged(step, wins, loss_d_source, relative_diversity)
        if not diverged and not bool(sums.isfinite().all()):
            found["lost"] = "an offspring's loss or fitness is not finite, and it lost"
        news = {name: text for name, text in found.items() if name not in self.warned}
        self.warned += news
        warnings = [*(["a loss or fitness is not finite"] if diverged else []), *news.values()]
        if warnings:
            entry["warning"] = "; ".join(warnings)
        entry = json_safe(entry)
        self.entries.append(entry)
        self.log(entry)
        self.generations = 0
        self._start_clock()
        if diverged:
            raise CmrhpcError(
                f"training diverged: a loss or fitness is not finite at generation {step}",
                mend="lower learning_rate, or run in exact mode",
            )

    def _judged(self, step: int, wins: dict[str, int], loss_d_source: float, diversity: float) -> dict[str, str]:
        """What is to be warned of, once a part of the training is done and at its end in any case."""
        recent = max(FEWEST, round(RECENT * self.settings.generations))
        if step < recent and step < self.settings.generations:
            return {}
        found = {}
        earlier = [entry["wins"] for entry in self.entries if entry["step"] <= step - recent]
        old = earlier[-1] if earlier else {}
        latest = [count - old.get(name, 0) for name, count in wins.items()]
        share, over = max(latest) / sum(latest), sum(latest) // self.settings.survivors
        if len(wins) > 1 and share >= NEARLY_ALWAYS and over >= FEWEST:
            found["wins"] = f"one mutation wins nearly always ({share:.0%} of the last {over} generations)"
        if loss_d_source < BEATEN:
            found["beaten"] = "D is never wrong, so that G learns nothing: lower gamma or the learning rate, or set r1"
        if diversity < COLLAPSED:
            found["collapse"] = f"samples collapse: pairwise distance {diversity:.0%} of the real images'"
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {"window": self.sums} if self.generations else {}

    def state(self) -> dict[str, Any]:
        return {"window_generations": self.generations, "entries": self.entries, "warned": self.warned}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any], device: torch.device | str) -> None:
        """Go on from these; the stored entries are handed out again. Speed counts the generations from now on."""
        self.generations, self.entries, self.warned = state["window_generations"], state["entries"], state["warned"]
        if self.generations:
            self.sums = tensors["window"].to(device)
        for entry in self.entries:
            self.log(entry)
        self._start_clock()
