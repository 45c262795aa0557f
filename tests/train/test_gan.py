"""Training of a generator: bitwise resume, nested samples, average, log, warnings, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cmrhpc.errors import BadInput, Checkpointed, CmrhpcError
from cmrhpc.study import Affine, Compute, Generator
from cmrhpc.train import gan, losses
from cmrhpc.train.checkpoint import Checkpoints
from cmrhpc.train.compute import has_bfloat16
from cmrhpc.train.evolution import Evolution, Outcome
from cmrhpc.train.gan import TrainedGan, train_gan
from cmrhpc.train.gan_log import GanLog
from tests.train import small

COMPUTE = Compute(threads=1)
TINY = Generator(
    base_channels=4, generations=7, batch=4, scoring_batch=4, latent_dim=6, components=3, ema=0.9, log_every=2
)
PLAIN = {"networks": "dcgan", "mixup_alpha": 0.0, "components": 1}
VARIANTS = {
    "dae-gan": TINY,
    "two survivors": dataclasses.replace(TINY, survivors=2, training_noise="per_mutation", ema=0.0),
    "egan": dataclasses.replace(TINY, **PLAIN, discriminator_steps=2),
    "acgan": dataclasses.replace(TINY, **PLAIN, mutations=("heuristic",), conditional=True),
    "r1": dataclasses.replace(TINY, r1=0.5),
    "small data": dataclasses.replace(TINY, r1=0.5, diffaugment=True, spectral_norm=True),
    "small data egan": dataclasses.replace(TINY, **PLAIN, diffaugment=True, spectral_norm=True, survivors=2),
    "small data acgan": dataclasses.replace(
        TINY, **PLAIN, mutations=("heuristic",), conditional=True, diffaugment=True, spectral_norm=True, r1=0.5
    ),
}


def train(settings: Generator, **more: Any) -> TrainedGan:
    data = small.images(10)
    return train_gan(data, torch.arange(10) % 2, settings, COMPUTE, Affine(factor=2), n_classes=2, seed=5, **more)


def content(trained: TrainedGan) -> dict[str, torch.Tensor]:
    label = 1 if trained.n_classes else None
    images = {"grid": trained.grid, "untrained": trained.untrained, "sample": trained.sample(3, 1, label)}
    return trained.weights() | images


@pytest.mark.device
@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_bitwise(name: str, tmp_path: Path, device: str) -> None:
    settings, logs = VARIANTS[name], ([], [])  # type: ignore[var-annotated]
    undisturbed = train(settings, device=device, log=logs[0].append)

    def again(should_stop: Any) -> TrainedGan:
        logs[1].clear()
        checkpoints = Checkpoints(tmp_path, dataclasses.asdict(settings))
        more = {"checkpoints": checkpoints, "should_stop": should_stop, "log": logs[1].append}
        return train(settings, device=device, **more)

    resumed = small.stopped_and_resumed(again, [1, 3, 4, 6])
    assert small.same(content(undisturbed), content(resumed))
    for entry in logs[0] + logs[1]:
        del entry["images_per_second"]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[1]] == [2, 4, 6, 7]


@pytest.mark.device
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["residual", "dcgan"])
def test_resume_side_by_side_is_bitwise(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Two threads: passes run side by side, and those of the residual networks in halves of a batch."""
    if device == "cuda" and mode == "fast" and not has_bfloat16(torch.device(device)):
        pytest.skip("this GPU has no bfloat16 of its own, and no task computes in it there")
    monkeypatch.setattr("cmrhpc.train.compute.has_bfloat16", lambda device: True)  # emulated, on CPUs without
    settings = dataclasses.replace(TINY, networks=name, mixup_alpha=0.2 if name == "residual" else 0.0)
    compute = Compute(mode=mode, threads=2)

    def train_two(**more: Any) -> TrainedGan:
        more |= {"n_classes": 2, "seed": 5, "device": device}
        return train_gan(small.images(10), None, settings, compute, Affine(), **more)

    try:
        undisturbed = train_two()
        resumed = small.stopped_and_resumed(
            lambda should_stop: train_two(should_stop=should_stop, checkpoints=Checkpoints(tmp_path, {})), [2, 3]
        )
    finally:
        torch.set_num_threads(1)
    assert small.same(content(undisturbed), content(resumed))


def test_checkpoints_by_time_and_an_older_one_after_damage(tmp_path: Path) -> None:
    undisturbed = train(TINY)
    checkpoints = Checkpoints(tmp_path, {}, every_seconds=0)
    with pytest.raises(Checkpointed):
        train(TINY, checkpoints=checkpoints, should_stop=lambda: len(list(tmp_path.iterdir())) >= 4)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = train(TINY, checkpoints=Checkpoints(tmp_path, {}, every_seconds=1000))
    assert small.same(content(undisturbed), content(resumed))


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    first, again = train(TINY), train(TINY)
    other = train_gan(small.images(10), None, TINY, COMPUTE, Affine(factor=2), n_classes=2, seed=6)
    assert small.same(content(first), content(again))
    assert not torch.equal(first.grid, other.grid)
    assert not torch.equal(first.untrained, other.untrained)


@pytest.mark.parametrize("name", ["dae-gan", "egan"])
def test_samples_are_nested_and_independent_of_other_calls(name: str) -> None:
    trained = train(VARIANTS[name])
    many = trained.sample(150, 3)
    assert many.shape == (150, 1, 16, 16)
    assert many.dtype == torch.float32
    assert many.device.type == "cpu"
    assert many.abs().max() <= 1
    for count in (0, 1, 63, 64, 65, 149):
        assert torch.equal(trained.sample(count, 3), many[:count])
    assert not torch.equal(trained.sample(64, 4), many[:64])


def test_one_image_per_class_is_no_diversity() -> None:
    real = [small.images(6, seed=1), small.images(5, seed=2)]
    same = [images[:1].repeat(4, 1, 1, 1) for images in real]
    assert gan.relative_diversity(same, real) == 0.0
    assert gan.relative_diversity([real[0], same[1]], real) == 0.0
    assert gan.relative_diversity(real, real) == 1.0
    # A single real image tells nothing of what is diverse.
    assert gan.relative_diversity(same, [real[0][:1], real[1][:1]]) == 1.0
    assert gan.relative_diversity([same[0], real[1]], [real[0][:1], real[1]]) == 1.0


def test_conditional_samples_follow_the_label() -> None:
    trained = train(VARIANTS["acgan"])
    assert not torch.equal(trained.sample(4, 1, 0), trained.sample(4, 1, 1))


def test_images_come_from_the_average_when_it_is_on() -> None:
    trained = train(TINY)
    assert trained.averaged is not None
    weights = trained.weights()
    assert any(not torch.equal(weights[f"generator.{k}"], v) for k, v in trained.averaged.items())
    trained.network.load_state_dict(trained.averaged)
    plain = dataclasses.replace(trained, averaged=None)
    assert torch.equal(plain.sample(5, 1), trained.sample(5, 1))
    without = train(dataclasses.replace(TINY, ema=0.0))
    assert without.averaged is None
    assert not any(k.startswith("generator_ema") for k in without.weights())


def test_average_against_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    averages: list[gan.Average] = []
    init, add = gan.Average.__init__, gan.Average.add

    def first(self: Any, evolution: Any) -> None:
        init(self, evolution)
        averages.append(self)
        seen.append(self.vector.double().clone())

    def spy(self: Any, decay: float) -> None:
        seen.append(self.evolution.parents[0].double().clone())
        add(self, decay)

    monkeypatch.setattr(gan.Average, "__init__", first)
    monkeypatch.setattr(gan.Average, "add", spy)
    train(TINY)
    mean, *parents = seen
    assert len(parents) == TINY.generations
    for step, parent in enumerate(parents, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * parent
    assert torch.allclose(averages[0].vector.double(), mean, atol=1e-6)


def test_log_entries() -> None:
    entries: list[dict[str, Any]] = []
    steps: list[tuple[int, int]] = []
    train(TINY, log=entries.append, progress=lambda *at: steps.append(at))
    assert steps == [(i, 7) for i in range(1, 8)]
    for entry in entries:
        json.dumps(entry, allow_nan=False)
        assert entry["loss_g"].keys() == entry["f_q"].keys() == entry["f_d"].keys() == set(TINY.mutations)
        assert sum(entry["wins"].values()) == entry["step"]
        assert entry["winner"] in TINY.mutations
        assert 0 <= entry["f_q_spread"] <= 1
        assert entry["gamma_f_d_spread"] >= 0
        assert entry["images_per_second"] > 0
    assert entries[-1]["wins"][entries[-1]["winner"]] > 0


@pytest.mark.parametrize("networks", ["residual", "dcgan"])
def test_each_option_for_small_data_changes_the_training_and_nothing_before_it(networks: str) -> None:
    base = TINY if networks == "residual" else VARIANTS["egan"]
    without = train(base)
    for option in ({"diffaugment": True}, {"spectral_norm": True}, {"r1": 0.5}):
        trained = train(dataclasses.replace(base, **option))  # type: ignore[arg-type]
        assert torch.equal(trained.untrained, without.untrained)
        assert not torch.equal(trained.grid, without.grid)
        normed = [name for name in trained.weights() if name.endswith("parametrizations.weight.0.u")]
        assert bool(normed) == ("spectral_norm" in option)


def test_expansion_and_untrained_images() -> None:
    trained = train(TINY)
    pair = gan.build_pair(TINY, 16, 1, 2, 5)
    assert trained.untrained.shape == (64, 1, 16, 16)
    with torch.no_grad():
        own = pair[0].eval()(torch.zeros(1, 6))
    assert own.shape == (1, 1, 16, 16)
    assert not torch.equal(trained.untrained, trained.grid)
    assert not torch.equal(train(dataclasses.replace(TINY, expand=False)).grid, trained.grid)


def test_a_loss_that_is_not_finite_stops_with_a_logged_warning() -> None:
    entries: list[dict[str, Any]] = []
    data = small.images(10)
    data[3, 0, 2, 2] = math.nan
    settings = dataclasses.replace(TINY, generations=50, batch=10, expand=False)
    with pytest.raises(CmrhpcError, match="not finite"):
        train_gan(data, None, settings, COMPUTE, Affine(), n_classes=2, seed=5, log=entries.append)
    assert "not finite" in entries[-1]["warning"]
    json.dumps(entries[-1], allow_nan=False)


def log_of(settings: Generator) -> GanLog:
    return GanLog(settings, lambda entry: None)


def outcome(
    wins: int = 0, kinds: int = 3, source: float = 0.5, loss_d: float = 0.5, f_q: list[float] | None = None
) -> Outcome:
    zero = torch.zeros(kinds)
    scores = zero if f_q is None else torch.tensor(f_q)
    return Outcome(torch.tensor(loss_d), torch.tensor(source), zero, scores, zero, torch.tensor([wins]))


def told(log: GanLog, generations: int, step: int, relative: float = 1.0, **of: Any) -> str:
    """What the entry of generation `step` warns of, after `generations` of one kind."""
    for _ in range(generations):
        log.add(outcome(**of))
    log.write(step, relative)
    return log.entries[-1].get("warning", "")


def test_warnings_of_a_beaten_generator_and_of_collapse_come_once() -> None:
    log = log_of(dataclasses.replace(TINY, generations=1000))
    assert told(log, 1, 50, relative=0.05, source=0.0) == ""  # too early to tell
    assert "samples collapse" in told(log, 1, 800, relative=0.1)
    assert told(log, 1, 900, relative=0.1) == ""
    assert "D is never wrong" in told(log, 1, 950, source=0.01)
    assert told(log, 1, 960, source=0.01) == ""


def test_a_short_training_is_warned_at_its_end_at_the_latest() -> None:
    log = log_of(dataclasses.replace(TINY, generations=12))
    assert told(log, 5, 5, relative=0.1, source=0.0) == ""
    last = told(log, 7, 12, relative=0.1, source=0.0)
    assert "samples collapse" in last
    assert "D is never wrong" in last
    assert "wins nearly always" not in last  # twelve generations tell nothing of that


def test_one_winner_is_judged_by_the_last_tenth_of_the_training() -> None:
    log = log_of(dataclasses.replace(TINY, generations=400))
    assert told(log, 20, 20, wins=0) == ""
    assert "one mutation wins nearly always (100% of the last 40 generations)" in told(log, 20, 40, wins=0)
    # Many wins of all together long ago hide nothing now.
    log = log_of(dataclasses.replace(TINY, generations=400))
    for step in range(1, 361):
        log.add(outcome(wins=step % 3))
    assert told(log, 0, 360) == ""
    for _ in range(3):
        log.add(outcome(wins=2))
    assert "(92% of the last 40 generations)" in told(log, 37, 400, wins=1)


def test_with_mixup_d_is_judged_by_what_exceeds_the_entropy_of_its_labels() -> None:
    """A D that knows every lambda is never wrong, though its loss is the labels' entropy."""
    lam = losses.beta(0.2, (1, 2000), torch.Generator().manual_seed(0)).double()

    class Knowing(torch.nn.Module):
        mixes_samples = False

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.logit(x.mean((1, 2, 3)), eps=1e-12) + self.weight

    settings = Generator(mutations=("heuristic",))
    g, _ = gan.build_pair(dataclasses.replace(TINY, networks="dcgan"), 16, 1, 2, 0)
    with torch.no_grad():
        for parameter in g.parameters():  # images of 0; real ones are of 1: the mixture's mean is lambda
            parameter.zero_()
    evolution = Evolution(g.double(), Knowing(), mutations=settings.mutations, workers=1)
    draws = small.draws(
        torch.Generator().manual_seed(0), dtype=torch.float64, mixup=True, passes=1, batch=2000, latent=6
    )
    draws = dataclasses.replace(draws, lam=lam, real=torch.ones_like(draws.real))
    made = evolution.generation(draws)
    assert float(made.loss_d) == pytest.approx(0.2277, abs=0.02)  # of Beta(0.2, 0.2)
    assert float(made.loss_d_source) == pytest.approx(0, abs=1e-6)
    log = log_of(settings)
    log.add(made)
    log.write(settings.generations, 1.0)
    assert "D is never wrong" in log.entries[-1]["warning"]
    assert log.entries[-1]["loss_d_source"] == pytest.approx(0, abs=1e-6)


def test_an_offspring_that_is_not_finite_and_loses_ends_no_training() -> None:
    log = log_of(TINY)
    assert "it lost" in told(log, 2, 2, wins=1, f_q=[math.nan, 0.5, 0.1])
    assert log.entries[-1]["f_q"]["minimax"] is None
    assert told(log, 2, 4, wins=1, f_q=[math.nan, 0.5, 0.1]) == ""  # said once
    for of in ({"wins": 0, "f_q": [math.nan, 0.5, 0.1]}, {"loss_d": math.inf}):
        with pytest.raises(CmrhpcError, match="not finite"):
            told(log_of(TINY), 2, 2, **of)


def test_labels_stay_with_their_images_when_the_set_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class is one grey, which no move changes."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = gan.draw_generation

    def draw(*arguments: Any) -> Any:
        draws = real(*arguments)
        assert draws.real_label is not None
        seen.append((draws.real.mean((2, 3, 4)), draws.real_label))
        return draws

    monkeypatch.setattr(gan, "draw_generation", draw)
    labels = torch.arange(10) % 2
    data = (labels.float() - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).clone()
    settings = dataclasses.replace(VARIANTS["acgan"], expand=True, batch=16)
    train_gan(data, labels, settings, COMPUTE, Affine(factor=3), n_classes=2, seed=5)
    grey, label = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.allclose(grey, label.float() - 0.5, atol=1e-5)
    assert {0, 1} == set(label.flatten().tolist())


def test_real_images_are_drawn_class_by_class_as_labels_are() -> None:
    """26 images of class 0 and 74 of class 1: D must not know a real image by the share of its class."""
    labels = (torch.arange(100) >= 26).long()
    data = torch.arange(100.0).view(-1, 1, 1, 1)
    settings = dataclasses.replace(VARIANTS["acgan"], batch=4000, scoring_batch=4000)
    latent, rng = gan.Latent.draw(1, 6, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    draws = gan.draw_generation(settings, latent, data, labels, 2, 1, rng)
    assert draws.real_label is not None
    assert torch.equal(draws.real_label.flatten(), (draws.real.flatten() >= 26).long())
    for images in (draws.real, draws.scoring_real):
        counts = images.flatten().long().bincount(minlength=100)
        assert counts[:26].sum() == pytest.approx(2000, abs=160)  # five standard deviations
        assert counts.min() > 0  # and within a class every image
        assert counts[:26].float().mean() == pytest.approx(2000 / 26, rel=0.1)
        assert counts[26:].max() < 3 * counts[26:].float().mean()


def test_what_was_warned_of_is_not_warned_of_again_after_a_resume() -> None:
    log, other = log_of(TINY), log_of(TINY)
    assert "collapse" in told(log, 7, 7, relative=0.0)
    other.load(log.tensors(), json.loads(json.dumps(log.state())), "cpu")
    assert told(other, 1, 8, relative=0.0) == ""


def test_a_single_mutation_is_not_warned_of() -> None:
    log = log_of(dataclasses.replace(TINY, mutations=("heuristic",)))
    assert told(log, 1000, 1000, kinds=1) == ""


def test_speed_is_that_of_the_generations_since_the_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = small.Clock()
    monkeypatch.setattr("time.monotonic", clock)
    log, other = log_of(TINY), log_of(TINY)
    for _ in range(30):
        log.add(outcome())
    clock.now = 1000.0
    other.load(log.tensors(), log.state(), "cpu")
    clock.now = 1010.0
    told(other, 5, 35)
    assert other.entries[0]["images_per_second"] == pytest.approx(5 * TINY.batch / 10)


def test_refusals() -> None:
    with pytest.raises(BadInput, match="image size 50"):
        train_gan(small.images(4, 50), None, TINY, COMPUTE, Affine(), n_classes=2, seed=1)
    with pytest.raises(BadInput, match="shape"):
        train_gan(torch.zeros(0, 1, 16, 16), None, TINY, COMPUTE, Affine(), n_classes=2, seed=1)
    with pytest.raises(BadInput, match="labels"):
        train_gan(small.images(4), None, VARIANTS["acgan"], COMPUTE, Affine(), n_classes=2, seed=1)
    with pytest.raises(BadInput, match="only dcgan"):
        train(dataclasses.replace(TINY, conditional=True))


@pytest.mark.parametrize("survivors", [3, 9])
def test_log_steps_change_no_result_while_all_offspring_survive(survivors: int) -> None:
    """Scores decide then, too, which parent is the best: it is averaged, and the images are its images."""
    settings = dataclasses.replace(TINY, survivors=survivors)
    made = [train(dataclasses.replace(settings, log_every=every)) for every in (1, 3)]
    assert small.same(made[0].weights(), made[1].weights())


def test_scores_that_decide_nothing_are_left_out_and_change_no_bit() -> None:
    """One mutation: all offspring survive, and the scores are for the log alone."""
    logs: dict[int, list[dict]] = {}
    made = {}
    for every in (1, 3):
        logs[every] = []
        made[every] = train(dataclasses.replace(VARIANTS["acgan"], log_every=every), log=logs[every].append)
    assert torch.equal(made[1].grid, made[3].grid)
    assert small.same(made[1].weights(), made[3].weights())
    each = {entry["step"]: entry for entry in logs[1]}
    assert [entry["step"] for entry in logs[3]] == [3, 6, 7]
    for entry in logs[3]:
        assert entry["f_q"] == pytest.approx(each[entry["step"]]["f_q"], rel=1e-12)
        assert entry["f_d"] == pytest.approx(each[entry["step"]]["f_d"], rel=1e-12)
        assert all(value != 0 for value in entry["f_q"].values())
