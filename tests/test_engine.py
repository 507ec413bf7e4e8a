"""The engine with a workload that a classifier is not: two networks, critic steps, a lazy phase, steering, dropout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from trainer.boundary import Boundary
from trainer.data.description import Batch
from trainer.data.plan import BatchPlan, share
from trainer.distributed.runtime import Runtime, Votes
from trainer.engine import Engine
from trainer.metrics.evaluator import Totals
from trainer.nn.dropout import Dropout, drawing
from trainer.randomness import Draws
from trainer.schedule import Every, Limits, constant
from trainer.services import MicroBatches
from trainer.state import TrainState
from trainer.storage.checkpoint import Checkpoint
from trainer.tracking.tracker import Silent
from trainer.workload import Phase, Scalars, Workload

from .engines import Keep
from .workers import on_ranks

SAMPLES, BATCH = 40, 14


class ToyGan(Workload):
    """A critic with a gradient penalty and three steps, a generator with BatchNorm and dropout, a third network that
    trains on every fourth step, and a controller that follows the global mean of the critic's output."""

    controller_inputs = ("real",)

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), Dropout(0.3, "g"), nn.Linear(16, 2)
        )
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        self.third = nn.Linear(2, 1)
        self.register_buffer("controller", torch.zeros(()))
        self.phases = (
            Phase("critic", self.critic_loss, torch.optim.Adam(self.critic.parameters(), 1e-2, (0.0, 0.9)), times=3),
            Phase("generator", self.generator_loss, torch.optim.Adam(self.generator.parameters(), 1e-2, (0.0, 0.9))),
            Phase("lazy", self.lazy_loss, torch.optim.SGD(self.third.parameters(), 1e-2, 0.9), every=4),
        )

    def fakes(self, draws: Draws) -> Tensor:
        with drawing(self.generator, draws):
            return self.generator(draws.normal("z", (4,)))

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        real, fake = batch["image"].flatten(1), self.fakes(draws).detach()
        between = torch.lerp(real, fake, draws.uniform("mix", (1,))).requires_grad_(True)
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        score = self.critic(real).mean()
        loss = self.critic(fake).mean() - score + 10 * penalty + self.controller * penalty
        return loss, {"critic_loss": loss.detach(), "real": score.detach()}

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        assert not next(self.critic.parameters()).requires_grad, "the generator's phase must not train the critic"
        loss = -self.critic(self.fakes(draws)).mean()
        return loss, {"generator_loss": loss.detach()}

    def lazy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        points = batch["image"].flatten(1)
        loss = (self.third(points) - self.critic(points)).square().mean()
        return loss, {"lazy_loss": loss.detach()}

    def after_step(self, step: int, means: Scalars) -> None:
        assert isinstance(self.controller, Tensor)
        self.controller.lerp_(means["real"], 0.1)


class ToyEvaluator:
    headline, maximise = "loss", False

    def __init__(self, workload: ToyGan) -> None:
        self.workload = workload

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        return {"score": self.workload.critic(batch["image"].flatten(1)).sum()}

    def report(self, totals: Totals) -> dict[str, float]:
        return {"loss": float(totals["score"]) / SAMPLES}


class ToyLoader:
    batch_size, epoch_samples, evaluation_samples = BATCH, SAMPLES, SAMPLES

    def __init__(self, runtime: Runtime, accumulation: int = 1) -> None:
        self.plan, self.runtime = BatchPlan(0, SAMPLES, BATCH, accumulation), runtime
        points = torch.randn(SAMPLES, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.points = points.to(runtime.device)

    def train(self, first: int) -> Iterator[MicroBatches]:
        for k in itertools.count(first):
            ids, _ = self.plan.samples(k)
            micro_batches = []
            for m, whole in enumerate(self.plan.micro_batches):
                rows = self.plan.rows(m, self.runtime.rank, self.runtime.world)
                mine = ids[whole][rows]
                micro_batches.append((rows, {"image": self.points[mine], "id": mine}))
            yield micro_batches

    def evaluate(self) -> Iterator[tuple[slice, Batch]]:
        rows = share(SAMPLES, self.runtime.rank, self.runtime.world)
        yield rows, {"image": self.points[rows], "id": torch.arange(SAMPLES)[rows]}

    evaluation_rows = SAMPLES

    def bad_samples(self) -> list[str]:
        return []

    def pixels(self, ids: Iterable[int]) -> Tensor:
        return torch.zeros(len(list(ids)), 2, 1, 1)

    def held_out(self, ids: Iterable[int]) -> Batch:
        return {"image": self.points[list(ids)], "id": torch.tensor(list(ids))}


def make(
    runtime: Runtime, steps: int, accumulation: int = 1, checkpoint: Checkpoint | None = None
) -> tuple[Engine, Keep]:  # fmt: skip
    torch.manual_seed(0)
    workload, saver, loader = ToyGan(), Keep(), ToyLoader(runtime, accumulation)
    runtime.prepare(workload, None, False)
    state = TrainState(workload, runtime, loader.plan, "loss", False)
    if checkpoint is not None:
        state.restore(checkpoint)
    limits = Limits(steps, log=Every(Fraction(3)))
    evaluator = ToyEvaluator(workload)
    boundary = Boundary(runtime, state, evaluator, loader, Silent(), saver, limits, 3 * BATCH, seed=5)
    return Engine(boundary, constant), saver


def weights_after(runtime: Runtime, steps: int, cut: int = 0, accumulation: int = 1) -> dict[str, Tensor]:
    """Train; with `cut`, stop there, throw everything away, restore what was saved and continue."""
    engine, saver = make(runtime, cut or steps, accumulation)
    assert engine.train().status == "done"
    if cut:
        engine, _ = make(runtime, steps, accumulation, saver.on_all_ranks(runtime))
        assert engine.state.step == cut
        engine.train()
    return {name: value.clone() for name, value in engine.workload.state_dict().items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(
        float((a[n].double() - b[n].double()).abs().max() / a[n].double().abs().max().clamp(min=1e-9)) for n in a
    )


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_adversarial_pair_is_the_same_on_any_number_of_ranks(world: int, accumulation: int) -> None:
    (alone,) = on_ranks(1, weights_after, 20, 0, accumulation)
    several = on_ranks(world, weights_after, 20, 0, accumulation)
    for weights in several:
        assert difference(alone, weights) < 1e-9


@pytest.mark.parametrize("world", [1, 2])
def test_an_adversarial_pair_goes_on_bit_for_bit(world: int) -> None:
    """Step 10 lies within a lazy interval and within a log interval."""
    whole, resumed = (on_ranks(world, weights_after, 20, cut) for cut in (0, 10))
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_epoch_that_is_no_whole_number_of_steps_has_its_boundaries_in_the_right_steps() -> None:
    epoch = Every(Fraction(1198, 32))  # 37.4375 steps
    due = [step for step in range(1, 200) if epoch.due(step)]
    assert due == [38, 75, 113, 150, 188]
    assert not Every(None).due(5)
    assert not epoch.due(0)


def collectives(runtime: Runtime) -> tuple[object, ...]:
    totals = runtime.total({"a": torch.tensor(runtime.rank + 1)} if runtime.rank else {})
    flags = [runtime.agree(Votes(stop=runtime.rank == 1)).stop for _ in range(3)]
    runtime.settle()
    return totals, flags, runtime.gather(runtime.rank), runtime.broadcast("from 0" if runtime.main else None)


def test_collectives_agree_and_a_rank_without_rows_takes_part() -> None:
    for totals, flags, gathered, word in on_ranks(3, collectives):
        assert totals["a"] == 5
        assert flags == [0, 1, 1]  # the answer is one call late, and the same everywhere
        assert gathered == [0, 1, 2]
        assert word == "from 0"


def weights_that_are_not_finite(runtime: Runtime) -> tuple[bool, bool]:
    engine, saver = make(runtime, 5)
    with torch.no_grad():
        next(engine.workload.parameters()).fill_(torch.inf)
    outcome = engine.train()
    return outcome.status == "non_finite", saver.last is not None


@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_are_not_finite_are_never_saved(world: int) -> None:
    assert on_ranks(world, weights_that_are_not_finite) == [(True, False)] * world


class Lost(Keep):
    """A saver whose lease is lost after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def lease_lost(self) -> bool:  # type: ignore[override]
        self.looks -= 1
        return self.looks < 0


def status_of_a_lost_lease(runtime: Runtime, looks: int) -> tuple[str, int, bool]:
    engine, _ = make(runtime, 5)
    saver = Lost(looks) if runtime.main else Keep()
    engine.boundary.saver = saver
    engine.boundary.limits = Limits(5)  # without logs, after which the ranks vote less often where steps are fast
    outcome = engine.train()
    return outcome.status, outcome.step, saver.last is None


@pytest.mark.parametrize("world", [1, 2])
def test_a_lost_lease_ends_training_on_all_ranks_without_a_save(world: int) -> None:
    late = 0 if world == 1 else 1  # several ranks get the answer of the vote before
    assert on_ranks(world, status_of_a_lost_lease, 2) == [("lease_lost", 2 + late, True)] * world


@pytest.mark.parametrize("world", [1, 2])
def test_a_lease_that_is_lost_after_the_last_vote_is_noticed_at_the_end(world: int) -> None:
    """At steps 0 to 5 the ranks vote; what comes then is the last evaluation and the last save."""
    for status, step, _ in on_ranks(world, status_of_a_lost_lease, 6):
        assert (status, step) == ("lease_lost", 5)
