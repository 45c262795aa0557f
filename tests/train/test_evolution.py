"""The fast generation step against the plain one, many generations, parents put in step again after each (M5)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading

import pytest
import torch
from torch import nn

from cmrhpc.nets.dae_gan import residual_pair
from cmrhpc.nets.dcgan import dcgan_pair
from cmrhpc.study import Compute
from cmrhpc.train import losses
from cmrhpc.train.compute import setup_compute
from cmrhpc.train.evolution import Evolution, frozen_statistics
from cmrhpc.train.flat import Flat, adam_rates, adam_step, flat_order
from cmrhpc.train.plain import PlainEvolution
from cmrhpc.train.workers import Replica, Workers, keep_no_state
from tests.train import small

NAMES = ("minimax", "heuristic", "least-squares")
PAIRS = {"residual": residual_pair, "dcgan": dcgan_pair}


class OddGenerator(nn.Module):
    """A network of somebody else's: other layers, a bare parameter, no declaration of what it mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 256), nn.Unflatten(1, (1, 16, 16)), nn.InstanceNorm2d(1, affine=True))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.scale * self.inner(z))


class OddDiscriminator(nn.Module):
    """Mixes samples without any batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Flatten(), nn.LayerNorm(256), nn.Linear(256, 8), nn.Softplus(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.outer(x - 0.1 * x.mean(0, keepdim=True))[:, 0]


def make(kind: str, dtype: torch.dtype, workers: int = 1, device: str = "cpu", **settings):  # type: ignore[no-untyped-def]
    if kind == "odd":
        torch.manual_seed(0)
        g: nn.Module = OddGenerator()
        d: nn.Module = OddDiscriminator()
    else:
        g, d = PAIRS[kind](16, 1, 5, 4, torch.Generator().manual_seed(0))
    g.to(device, dtype)
    d.to(device, dtype)
    plain = PlainEvolution(copy.deepcopy(g), copy.deepcopy(d), **settings)
    channels_last = torch.channels_last if kind != "odd" else torch.preserve_format
    g, d = g.to(memory_format=channels_last), d.to(memory_format=channels_last)  # type: ignore[call-overload]
    return plain, Evolution(g, d, workers=workers, **settings)


def put_in_step(plain: PlainEvolution, fast: Evolution) -> None:
    """Copy everything of the fast side into the plain side, so that errors do not add up."""
    plain.parents = []
    for s in range(len(fast.parents)):
        fast.show(fast.parents[s], fast.buffers[s])
        module = copy.deepcopy(fast.generator)
        adam = plain._adam(module)
        for parameter, first, second in zip(
            flat_order(module), fast.g.unpack(fast.first[s]), fast.g.unpack(fast.second[s]), strict=True
        ):
            state = {"step": torch.tensor(float(fast.step)), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
            adam.state[parameter] = state
        plain.parents.append((module, adam))
    fast.show(fast.parents[0], fast.buffers[0])
    with torch.no_grad():
        for mine, theirs in zip(plain.discriminator.parameters(), fast.discriminator.parameters(), strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(plain.discriminator.buffers(), fast.discriminator.buffers(), strict=True):
            mine.copy_(theirs)
    for parameter, first, second in zip(
        flat_order(plain.discriminator), fast.d.unpack(fast.d_first), fast.d.unpack(fast.d_second), strict=True
    ):
        state = {"step": torch.tensor(float(fast.d_steps)), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
        plain.d_adam.state[parameter] = state


def distance(plain: PlainEvolution, fast: Evolution) -> float:
    """Largest difference of any survivor's weights, moments or buffers, and of the discriminator's."""
    worst = [torch.zeros(())]
    for s, (module, adam) in enumerate(plain.parents):
        vectors = (fast.parents[s], fast.first[s], fast.second[s])
        for i, vector in enumerate(vectors):
            for parameter, view in zip(flat_order(module), fast.g.unpack(vector), strict=True):
                other = parameter if i == 0 else adam.state[parameter][("", "exp_avg", "exp_avg_sq")[i]]
                worst.append((other.detach() - view).abs().max())
        if len(fast.buffers[s]):
            theirs = torch.cat([b.flatten() for b in module.buffers() if b.is_floating_point()])
            worst.append((theirs - fast.buffers[s]).abs().max())
    for mine, theirs in zip(plain.discriminator.parameters(), fast.discriminator.parameters(), strict=True):
        worst.append((mine - theirs).detach().abs().max())
    return float(torch.stack([w.double().cpu() for w in worst]).max())


CASES = [
    pytest.param(
        kind, names, survivors, mixup, shared, workers, id=f"{kind}-{len(names)}-{survivors}-{mixup}-{shared}-{workers}"
    )
    for (kind, names, survivors, mixup, shared), workers in zip(
        itertools.chain(
            itertools.product(("residual", "dcgan"), (NAMES, NAMES[1:], NAMES[:1]), (1, 2), (True, False), (True,)),
            itertools.product(("residual", "dcgan"), (NAMES,), (1, 2), (True,), (False,)),
            itertools.product(("odd",), (NAMES,), (1, 2), (True, False), (True, False)),
        ),
        itertools.cycle((2, 1, 3)),
        strict=False,
    )
    if survivors <= len(names)
]


@pytest.mark.device
@pytest.mark.parametrize(("kind", "names", "survivors", "mixup", "shared", "workers"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fast_step_equals_the_plain_step(kind, names, survivors, mixup, shared, workers, dtype, device) -> None:  # type: ignore[no-untyped-def]
    setup_compute(Compute(threads=1))  # deterministic, as in a task
    plain, fast = make(kind, dtype, workers=workers, device=device, mutations=names, survivors=survivors, gamma=0.3)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    rng = torch.Generator().manual_seed(1)
    kinks = 0
    for generation in range(6):
        passes = 1 if shared else len(fast.parents) * len(names)
        draws = small.draws(rng, dtype=dtype, mixup=mixup, passes=passes, steps=1 + generation % 2, device=device)
        slow, quick = plain.generation(draws), fast.generation(draws)
        for a, b in ((slow.loss_d, quick.loss_d), (slow.loss_g, quick.loss_g), (slow.f_q, quick.f_q)):
            assert torch.allclose(a, b, rtol=0, atol=tolerance)
        assert torch.allclose(slow.f_d, quick.f_d, rtol=0, atol=10 * tolerance)
        if slow.order.tolist() != quick.order.tolist():  # only where the fitness cannot tell them apart
            fitness = slow.f_q + 0.3 * slow.f_d
            assert (fitness[slow.order] - fitness[quick.order]).abs().max() < 10 * tolerance
        else:
            # Where a gradient is mere rounding, its sign is chance: each of up to two Adam steps moves the weight by
            # up to the learning rate (2e-4) either way. Where an activation lies within rounding of a leaky ReLU's
            # kink, its sample's gradient is another one: that may be so once.
            far = distance(plain, fast)
            kinks += far >= (1e-10 if dtype == torch.float64 else 9e-4)
            assert far < (1e-10 if dtype == torch.float64 else 2e-2)
        put_in_step(plain, fast)
    assert kinks <= 1


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_side_by_side_gives_the_same_bits_every_time(kind: str) -> None:
    runs = []
    for _ in range(3):
        _, fast = make(kind, torch.float32, workers=2, survivors=2)
        rng = torch.Generator().manual_seed(1)
        for _ in range(4):
            fast.generation(small.draws(rng, dtype=torch.float32, mixup=False, passes=1))
        runs.append(torch.cat([fast.parents.flatten(), fast.second.flatten(), fast.buffers.flatten(), fast.d.vector]))
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert fast.workers.count == 2


def test_workers_have_one_thread_each_and_leave_the_others_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        workers = Workers(nn.Linear(2, 2), 2)
        here = threading.Barrier(2)

        def job(replica: Replica) -> tuple[int, int, int]:
            here.wait(60)
            torch.randn(300, 300) @ torch.randn(300, 300)
            return torch.get_num_threads(), threading.get_ident(), id(replica)

        told = workers.run([job] * 2)
        assert [threads for threads, _, _ in told] == [1, 1]
        assert len({ident for _, ident, _ in told}) == len({replica for _, _, replica in told}) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_networks_that_keep_state_or_draw_do_not_run_side_by_side() -> None:
    g, d = residual_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))
    assert keep_no_state(g)
    assert keep_no_state(dcgan_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))[1])
    assert not keep_no_state(OddDiscriminator())
    drawing = copy.deepcopy(d)
    drawing.add_module("dropout", nn.Dropout(0.1))
    assert not keep_no_state(drawing)
    nn.utils.parametrizations.spectral_norm(d.conv)
    assert not keep_no_state(d)
    assert Evolution(g, d, workers=2).workers.count == 1


def test_gradients_of_all_mutations_agree_with_separate_backward_passes() -> None:
    _plain, fast = make("residual", torch.float64)
    draws = small.draws(torch.Generator().manual_seed(1), dtype=torch.float64, mixup=True, passes=1)
    _, gradients, _ = fast._mutate(draws)
    for mutation, gradient in zip(fast.mutations, gradients, strict=True):
        loss = mutation(fast.discriminator(fast.generator(draws.training_noise[0])))
        slow = fast.g.pack(torch.autograd.grad(loss, fast.g.parameters))
        assert torch.allclose(gradient, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rates", [tuple, torch.tensor])
def test_adam_is_torchs_adam(rates) -> None:  # type: ignore[no-untyped-def]
    rng = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(50, generator=rng))
    adam = torch.optim.Adam([weights], lr=1e-2, betas=(0.5, 0.9))
    mine, first, second = weights.detach().clone(), torch.zeros(50), torch.zeros(50)
    for step in range(1, 30):
        weights.grad = torch.randn(50, generator=rng)
        adam.step()
        adam_step(mine, weights.grad, first, second, rates(adam_rates(step, 1e-2, (0.5, 0.9))), (0.5, 0.9))
        assert torch.allclose(weights.detach(), mine, rtol=1e-6, atol=1e-7)
        assert torch.equal(adam.state[weights]["exp_avg"], first)
        assert torch.equal(adam.state[weights]["exp_avg_sq"], second)


@pytest.mark.parametrize("channels_last", [False, True])
def test_flat_changes_the_module_and_nothing_of_its_function(channels_last: bool) -> None:
    g, _ = dcgan_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))
    z = torch.randn(3, 5)
    before = g.eval()(z)
    if channels_last:
        g.to(memory_format=torch.channels_last)
    flat = Flat(g)
    assert torch.allclose(g(z), before, atol=1e-6)
    assert torch.equal(flat.pack(flat.unpack(flat.vector)), flat.vector)
    for parameter, view in zip(flat.parameters, flat.unpack(flat.vector), strict=True):
        assert torch.equal(parameter, view)
    flat.vector.zero_()
    assert all(not p.any() for p in g.parameters())
    flat.buffers.fill_(3.0)
    assert all((b == 3).all() for b in g.buffers() if b.is_floating_point())


@pytest.mark.parametrize("pair", [residual_pair, dcgan_pair])
def test_weights_start_where_vectorised_kernels_can_read_them(pair) -> None:  # type: ignore[no-untyped-def]
    """Self-attention's gamma is one number, and in the middle of the vector it would shift all that follow."""
    for network in pair(16, 1, 5, 4, torch.Generator().manual_seed(0)):
        flat = Flat(network)
        assert {id(p) for p in flat.parameters} == {id(p) for p in network.parameters()}
        odd = [p.numel() % 4 != 0 for p in flat.parameters]
        assert odd == sorted(odd)
        assert all(p.storage_offset() % 4 == 0 for p in flat.parameters[: odd.index(True) + 1])


def test_the_winner_keeps_its_own_optimizer_state() -> None:
    """Planted: only one offspring's gradient is not zero, and it is made to win or to lose."""
    for sign, expected_winner in ((1.0, 1), (-1.0, 0)):
        _, fast = make("residual", torch.float64, mutations=("minimax", "heuristic"), gamma=0.0)
        gradients = torch.zeros(2, fast.parents.shape[1], dtype=torch.float64)
        gradients[1] = sign
        scores = torch.tensor([0.5, 0.5 + 0.1 * sign], dtype=torch.float64)
        fast._mutate = lambda draws, g=gradients, f=fast: (torch.zeros(2), g, f.buffers.repeat(2, 1))  # type: ignore
        fast._score = lambda draws, offspring, buffers, s=scores: (s, torch.zeros_like(s))  # type: ignore
        parent = fast.parents[0].clone()
        outcome = fast.generation(
            small.draws(torch.Generator().manual_seed(0), dtype=torch.float64, mixup=True, passes=1)
        )
        assert outcome.order.tolist() == [expected_winner]
        if expected_winner == 1:
            assert torch.allclose(fast.first[0], torch.tensor(0.5, dtype=torch.float64))
            assert torch.allclose(fast.second[0], torch.tensor(0.001, dtype=torch.float64))
            assert torch.allclose(fast.parents[0], parent - 2e-4, atol=1e-9)
        else:
            assert not fast.first.any()
            assert not fast.second.any()
            assert torch.equal(fast.parents[0], parent)


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_the_module_holds_the_winner_after_a_generation(kind: str) -> None:
    _, fast = make(kind, torch.float32, survivors=2)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        fast.generation(small.draws(rng, dtype=torch.float32, mixup=True, passes=1))
        assert torch.equal(fast.g.vector, fast.parents[0])
        assert torch.equal(fast.g.buffers, fast.buffers[0])
        for parameter, view in zip(fast.g.parameters, fast.g.unpack(fast.parents[0]), strict=True):
            assert torch.equal(parameter, view)


def test_survivors_are_the_best_of_all_offspring() -> None:
    _, fast = make("residual", torch.float32, survivors=2, gamma=0.2)
    rng = torch.Generator().manual_seed(1)
    for generation in range(3):
        outcome = fast.generation(small.draws(rng, dtype=torch.float32, mixup=False, passes=1))
        fitness = (outcome.f_q + 0.2 * outcome.f_d).tolist()
        assert len(fitness) == (3 if generation == 0 else 6)
        assert [fitness[i] for i in outcome.order] == sorted(fitness, reverse=True)[:2]


def test_not_a_number_never_wins() -> None:
    _, fast = make("residual", torch.float32)
    fast._score = lambda draws, offspring, buffers: (torch.tensor([torch.nan, 0.2, 0.1]), torch.zeros(3))  # type: ignore
    outcome = fast.generation(small.draws(torch.Generator().manual_seed(0), dtype=torch.float32, mixup=True, passes=1))
    assert outcome.order.tolist() == [1]


def test_without_gamma_f_d_decides_nothing() -> None:
    _, fast = make("residual", torch.float32, gamma=0.0)
    f_q, f_d = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([-torch.inf, 0.0, 0.0])
    fast._score = lambda draws, offspring, buffers: (f_q, f_d)  # type: ignore
    outcome = fast.generation(small.draws(torch.Generator().manual_seed(0), dtype=torch.float32, mixup=True, passes=1))
    assert outcome.order.tolist() == [0]


def test_scoring_moves_no_running_statistics() -> None:
    _, fast = make("dcgan", torch.float32)
    rng = torch.Generator().manual_seed(1)
    draws = small.draws(rng, dtype=torch.float32, mixup=False, passes=1)
    fast.generation(draws)
    before = fast.d.buffers.clone()
    offspring, buffers = fast.parents.repeat(3, 1), fast.buffers.repeat(3, 1)
    fast._score(draws, offspring, buffers)
    assert torch.equal(fast.d.buffers, before)
    assert torch.equal(fast.g.buffers, buffers[0])
    fast._mutate(draws)
    assert torch.equal(fast.d.buffers, before)
    fast._train_discriminator(draws, 0, adam_rates(2, 2e-4, (0.5, 0.999)))
    assert not torch.equal(fast.d.buffers, before)


def test_frozen_statistics_keep_the_output() -> None:
    norm = nn.BatchNorm2d(3).train()
    x = torch.randn(4, 3, 5, 5)
    with frozen_statistics(norm):
        frozen = norm(x)
        assert not norm.running_mean.any()  # type: ignore[union-attr]
    assert torch.equal(frozen, norm(x))
    assert norm.track_running_stats
    assert norm.running_mean.any()


@pytest.mark.parametrize("kind", ["residual", "dcgan"])
def test_fast_mode_agrees_to_bfloat16_rounding(kind: str) -> None:
    plain, _ = make(kind, torch.float32)
    fast = Evolution(copy.deepcopy(plain.parents[0][0]), copy.deepcopy(plain.discriminator), bfloat16=True)
    draws = small.draws(torch.Generator().manual_seed(1), dtype=torch.float32, mixup=True, passes=1)
    slow, quick = plain.generation(draws), fast.generation(draws)
    assert torch.allclose(slow.loss_g, quick.loss_g, atol=0.05)
    assert torch.allclose(slow.f_q, quick.f_q, atol=0.05)
    assert torch.allclose(slow.f_d, quick.f_d, atol=0.2)
    assert quick.f_q.dtype == quick.f_d.dtype == fast.parents.dtype == torch.float32


@pytest.mark.parametrize(("workers", "r1"), [(1, 0.0), (2, 0.0), (2, 0.5)])
def test_conditional_step_is_acgan_written_out(workers: int, r1: float) -> None:
    """Source and class losses of D on real and generated images, then of G on its own, from their sources alone; R1."""
    g, d = (m.double() for m in dcgan_pair(16, 1, 5, 4, torch.Generator().manual_seed(0), n_classes=3))
    plain_g, plain_d = copy.deepcopy(g), copy.deepcopy(d)
    fast = Evolution(g, d, workers=workers, mutations=NAMES[1:2], learning_rate=1e-3, betas=(0.5, 0.999), r1=r1)
    adam_g, adam_d = (torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.999)) for m in (plain_g, plain_d))
    cross, binary = torch.nn.functional.cross_entropy, torch.nn.functional.binary_cross_entropy
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        draws = small.draws(rng, dtype=torch.float64, mixup=False, passes=1)
        real_label, label, training_label = (torch.randint(3, (1, 6), generator=rng) for _ in range(3))
        scoring_label = torch.randint(3, (7,), generator=rng)
        draws = dataclasses.replace(
            draws, real_label=real_label, label=label, training_label=training_label, scoring_label=scoring_label
        )
        outcome = fast.generation(draws)

        with torch.no_grad(), frozen_statistics(plain_g):
            fake = plain_g(draws.noise[0], label[0])
        (real_logit, real_class), (fake_logit, fake_class) = plain_d(draws.real[0]), plain_d(fake)
        ones = torch.ones(6, dtype=torch.float64)
        loss_d = binary(real_logit.sigmoid(), ones) + binary(fake_logit.sigmoid(), 0 * ones)
        loss_d = loss_d + cross(real_class, real_label[0]) + cross(fake_class, label[0])
        real = draws.real[0].clone().requires_grad_()
        with frozen_statistics(plain_d):
            (slope,) = torch.autograd.grad(plain_d(real)[0].sum(), real, create_graph=True)
        adam_d.zero_grad()
        (loss_d + r1 / 2 * slope.pow(2).sum((1, 2, 3)).mean()).backward()
        adam_d.step()

        with frozen_statistics(plain_d):
            logit, classes = plain_d(plain_g(draws.training_noise[0], training_label[0]))
        loss_g = -0.5 * logit.sigmoid().log().mean() + cross(classes, training_label[0])
        adam_g.zero_grad()
        loss_g.backward()
        adam_g.step()
        assert torch.allclose(outcome.loss_d, loss_d.detach(), atol=1e-10)
        assert torch.allclose(outcome.loss_g, loss_g.detach()[None], atol=1e-10)

        with torch.no_grad(), frozen_statistics(plain_g), frozen_statistics(plain_d):
            score = plain_d(plain_g(draws.scoring_noise, scoring_label))[0].sigmoid().mean()
        assert torch.allclose(outcome.f_q, score[None], atol=1e-10)
        for mine, theirs in ((plain_g, fast.generator), (plain_d, fast.discriminator)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert (a - b).abs().max() < 1e-8


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_of_all_mutations_err_no_more_than_those_of_separate_passes(workers: int, bfloat16: bool) -> None:
    """In the formats and the layout of training: one Adam step hides an error of a gradient, whatever its size."""
    g, d = residual_pair(16, 1, 5, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = torch.Generator().manual_seed(3)
        for parameter in g.parameters():  # also those that start as zero
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=moved))
    plain, wide = [(copy.deepcopy(g), copy.deepcopy(d)) for _ in range(2)]
    g, d = g.to(memory_format=torch.channels_last), d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast = Evolution(g, d, mutations=NAMES, bfloat16=bfloat16, workers=workers)
    draws = small.draws(torch.Generator().manual_seed(1), dtype=torch.float32, mixup=True, passes=1)
    values, gradients, _ = fast._mutate(draws)
    z = draws.training_noise[0]
    true_logit = wide[1].double()(wide[0].double()(z.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        logit = plain[1](plain[0](z)).float()

    def flat(tensors) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    for m, name in enumerate(NAMES):
        loss = losses.MUTATIONS[name](true_logit)
        true = flat(torch.autograd.grad(loss, flat_order(wide[0]), retain_graph=True))
        separate = torch.autograd.grad(losses.MUTATIONS[name](logit), flat_order(plain[0]), retain_graph=True)
        error, usual = ((flat(t) - true).norm() / true.norm() for t in (fast.g.unpack(gradients[m]), separate))
        assert error < 2 * usual, name
        assert error < (0.3 if bfloat16 else 1e-5), name
        assert values[m].item() == pytest.approx(loss.item(), rel=0.05 if bfloat16 else 1e-5)
