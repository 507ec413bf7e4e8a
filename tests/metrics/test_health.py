"""The watch over a GAN's training: every rule trips on its own failing run, and none on the healthy ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.options import OptimizerOptions
from trainer.data.description import ImageDescription
from trainer.gan.criteria import CRITERIA
from trainer.metrics.health import STATES, Rules, Verdict, Watch
from trainer.workloads import gan
from trainer.workloads.began import Began

Record = tuple[int, str, dict[str, float]]
LOG, EVALUATE = 100, 1000  # steps between two records of a kind


def run(
    train: Callable[[float, random.Random], dict[str, float]] | None,
    evaluate: Callable[[float, random.Random], dict[str, float]] | None,
    steps: int = 20_000,
    seed: int = 0,
) -> list[Record]:
    """What a run logs, from functions of the share of it that is done."""
    chance, records = random.Random(seed), []
    for step in range(LOG, steps + 1, LOG):
        if train:
            records.append((step, "train", train(step / steps, chance)))
        if evaluate and step % EVALUATE == 0:
            records.append((step, "evaluate", evaluate(step / steps, chance)))
    return records


def evaluations(**series: list[float]) -> list[Record]:
    """Evaluations alone, from the values of each name; 'fid' becomes 'fid@pixels' and so on."""
    plain = {"diversity", "spacing"}
    names = [name if name in plain else f"{name}@pixels" for name in series]
    rows = zip(*series.values(), strict=True)
    return [(EVALUATE * i, "evaluate", dict(zip(names, row, strict=True))) for i, row in enumerate(rows, start=1)]


def trained(count: int, **values: float) -> list[Record]:
    return [(LOG * i, "train", dict(values)) for i in range(1, count + 1)]


def new_watch(rules: Rules | None = None) -> Watch:
    """With the rules that BEGAN adds."""
    return Watch(rules or Rules(), Began.health_rules)


def verdicts(records: list[Record], watch: Watch | None = None) -> list[Verdict]:
    watch = watch or new_watch()
    return [watch.observe(*record) for record in records]


def states(records: list[Record]) -> list[str]:
    return [verdict.state for verdict in verdicts(records)]


def dcgan(done: float, chance: random.Random) -> dict[str, float]:
    """Leads for the first records, as the discriminator of a DCGAN does, then settles in the bands."""
    lead = math.exp(-done / 0.02)
    return {
        "discriminator_loss": 0.65 * (1 - lead) * chance.uniform(0.9, 1.1) + 0.005,
        "generator_loss": 1.1 * chance.uniform(0.7, 1.4) + 4 * lead,
        "discriminator_accuracy": min(0.8 * chance.uniform(0.95, 1.05) + 0.2 * lead, 1.0),
        "discriminator_grad_norm": chance.uniform(0.5, 2.0),
        "generator_grad_norm": chance.uniform(0.5, 2.0),
    }


def wgan(done: float, chance: random.Random) -> dict[str, float]:
    """A critic's loss falls to a large negative value and rises towards 0; no sign of a logit decides anything."""
    estimate = 400 * math.exp(-2 * done) * (1 - math.exp(-done / 0.01)) * chance.uniform(0.8, 1.2)
    return {"discriminator_loss": -estimate, "generator_loss": chance.uniform(-300, 300)}


def began(done: float, chance: random.Random) -> dict[str, float]:
    """k climbs from 0 and then hovers; M_global falls to a plateau and stays there."""
    return {
        "discriminator_loss": 0.1 * chance.uniform(0.9, 1.1),
        "generator_loss": 0.05 * chance.uniform(0.9, 1.1),
        "convergence": (0.08 + 0.3 * math.exp(-done / 0.01)) * chance.uniform(0.9, 1.1),
        "k": min(0.05, done) * chance.uniform(0.8, 1.2) + 2e-4,
    }


def learning(done: float, chance: random.Random, delay: float = 0.0, noise: float = 0.05) -> dict[str, float]:
    """Evaluations of a generator that comes to resemble the data, after a delay in which it makes one grey blur."""
    learned = max(1 - math.exp(-(done - delay) / 0.1), 0.0) if done > delay else 0.0

    def about(value: float) -> float:
        return value * chance.uniform(1 - noise, 1 + noise)

    return {
        "fid@digits": about(30 + 270 * (1 - learned)),
        "precision@digits": about(0.7 * learned),
        "recall@digits": about(0.4 * learned),
        "coverage@digits": about(0.6 * learned),
        "diversity": about(0.05 + 0.85 * learned),
        "spacing": about(0.1 + 0.8 * learned),
    }


def slow(done: float, chance: random.Random) -> dict[str, float]:
    return learning(done, chance, delay=0.15)


def noisy(done: float, chance: random.Random) -> dict[str, float]:
    return learning(done, chance, noise=0.18)


def spiking(done: float, chance: random.Random) -> dict[str, float]:
    values = learning(done, chance)
    return {**values, "fid@digits": 250.0, "diversity": 0.1} if 0.5 <= done <= 0.55 else values  # two evaluations


HEALTHY = {
    "dcgan": run(dcgan, learning),
    "dcgan, long": run(dcgan, learning, steps=100_000),
    "slow starter": run(dcgan, slow),
    "noisy": run(dcgan, noisy),
    "two bad evaluations": run(dcgan, spiking),
    "wgan": run(wgan, learning),
    "began": run(began, learning),
    "train records alone": run(dcgan, None),
    "a classifier's records": run(lambda done, chance: {"loss": 1 - done, "accuracy": done}, None),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_never_trips(name: str) -> None:
    assert set(verdicts(HEALTHY[name])) == {Verdict("healthy", 0, "no rule holds")}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    network=st.sampled_from([dcgan, wgan, began]),
    noise=st.floats(0, 0.18),  # (1 + 0.18) / (1 - 0.18) is a ratio of 1.44
    delay=st.floats(0, 0.1),
)
def test_a_healthy_run_never_trips_however_the_noise_falls(
    seed: int, network: Callable[[float, random.Random], dict[str, float]], noise: float, delay: float
) -> None:
    records = run(network, lambda done, chance: learning(done, chance, delay, noise), seed=seed)
    assert set(states(records)) == {"healthy"}


def test_a_value_that_is_not_finite_counts_at_once_and_for_good() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for kind in ("train", "evaluate"):
            watch = new_watch()
            assert watch.observe(7, kind, {"anything": value, "fine": 1.0}).state == "non_finite"
            assert watch.verdict == Verdict("non_finite", 7, "anything is not finite")
            verdicts(HEALTHY["dcgan"], watch)
            assert watch.verdict == Verdict("non_finite", 7, "anything is not finite")


def test_a_null_of_the_metric_log_is_a_value_that_was_not_finite() -> None:
    live, replayed = new_watch(), new_watch()
    assert live.observe(7, "train", {"a": math.nan, "b": math.inf}) == replayed.observe(
        7, "train", {"a": None, "b": None}
    )
    assert live.verdict.reason == "a is not finite, nor are 1 others"


def test_three_evaluations_in_a_row_above_one_and_a_half_times_the_best_fid_are_divergence() -> None:
    # DCGAN on CIFAR-10 as StudioGAN published it: 49.0 at its best, 137.4 at its end.
    reached = verdicts(evaluations(fid=[210.0, 90.0, 49.0, 74.0, 73.0, 76.0, 90.0, 137.4]))
    assert [verdict.state for verdict in reached] == ["healthy"] * 7 + ["diverged"]
    assert reached[-1].step == 8000
    assert reached[-1].reason == "the FID is 137.4, above 1.5 times 49 at best (3 evaluations in a row)"


def test_divergence_needs_a_best_and_three_evaluations_after_it() -> None:
    assert states(evaluations(fid=[10.0, 100.0, 100.0, 100.0])) == ["healthy"] * 3 + ["diverged"]
    assert set(states(evaluations(fid=[10.0, 100.0, 100.0, 9.0, 100.0, 100.0]))) == {"healthy"}


def test_divergence_passes_after_as_many_good_evaluations_as_it_took() -> None:
    reached = verdicts(evaluations(fid=[100.0, 10.0, 20.0, 20.0, 20.0, 11.0, 11.0, 20.0, 11.0, 11.0, 11.0]))
    assert [verdict.state for verdict in reached] == ["healthy"] * 4 + ["diverged"] * 6 + ["healthy"]
    assert reached[-1] == Verdict("healthy", 11000, "diverged since step 5000 is over")


def test_near_the_floor_of_the_fid_a_ratio_is_noise() -> None:
    records = evaluations(fid=[50.0, 0.2, 0.4, 0.4, 0.4])
    assert states(records)[-1] == "diverged"
    assert {verdict.state for verdict in verdicts(records, new_watch(Rules(fid_floor=0.3)))} == {"healthy"}


def test_a_risen_fid_with_less_diversity_is_mode_collapse() -> None:
    fid, bad = [200.0, 80.0, 50.0, 90.0, 100.0, 110.0], ["healthy"] * 5 + ["mode_collapse"]
    lost = verdicts(evaluations(fid=fid, diversity=[0.3, 0.7, 0.8, 0.35, 0.3, 0.3]))
    assert [verdict.state for verdict in lost] == bad
    assert lost[-1].reason == (
        "the FID is 110, above 1.5 times 50 at best, and diversity fell from 0.8 to 0.3 (3 evaluations in a row)"
    )
    assert states(evaluations(fid=fid, diversity=[0.3, 0.7, 0.8, 0.7, 0.7, 0.7]))[-1] == "diverged"


@pytest.mark.parametrize("name", ["recall", "coverage"])
def test_a_risen_fid_with_less_recall_is_mode_collapse_where_precision_held_and_divergence_where_not(name: str) -> None:
    fid, cover = [200.0, 80.0, 50.0, 90.0, 100.0, 110.0], [0.1, 0.4, 0.5, 0.2, 0.2, 0.2]
    held, lost = [0.5, 0.6, 0.7, 0.7, 0.8, 0.7], [0.5, 0.6, 0.7, 0.3, 0.2, 0.1]
    assert states(evaluations(fid=fid, precision=held, **{name: cover}))[-1] == "mode_collapse"
    assert states(evaluations(fid=fid, precision=lost, **{name: cover}))[-1] == "diverged"


def test_a_divergence_that_narrows_later_becomes_mode_collapse() -> None:
    fid, diversity = [200.0] + [50.0] + [100.0] * 6, [0.5, 0.8] + [0.7] * 3 + [0.2] * 3
    reached = states(evaluations(fid=fid, diversity=diversity))
    assert reached == ["healthy"] * 4 + ["diverged"] * 3 + ["mode_collapse"]


def test_fakes_that_are_all_alike_are_mode_collapse_after_the_first_evaluations() -> None:
    reached = verdicts(evaluations(diversity=[0.05] * 6))
    assert [verdict.state for verdict in reached] == ["healthy"] * 4 + ["mode_collapse"] * 2
    assert reached[-1].step == 5000  # the verdict stays as it was reached
    assert "0.05 times as wide" in reached[-1].reason
    assert set(states(evaluations(diversity=[0.05] * 4 + [0.3] * 6))) == {"healthy"}


def test_a_late_collapse_is_told_with_every_value_logged() -> None:
    def collapsing(done: float, chance: random.Random) -> dict[str, float]:
        values = learning(done, chance)
        lost = {"fid@digits": 180.0, "recall@digits": 0.01, "coverage@digits": 0.05, "diversity": 0.1, "spacing": 0.1}
        return {**values, **lost} if done > 0.7 else values

    reached = verdicts(run(dcgan, collapsing))
    assert {verdict.state for verdict in reached} == {"healthy", "mode_collapse"}
    assert reached[-1].step == 17_000  # the third evaluation after 14,000


def test_a_late_divergence_is_told_with_every_value_logged() -> None:
    def diverging(done: float, chance: random.Random) -> dict[str, float]:
        lost = {"fid@digits": 330.9, "precision@digits": 0.02, "recall@digits": 0.01, "coverage@digits": 0.01}
        return {**learning(done, chance), **lost} if done > 0.7 else learning(done, chance)

    assert set(states(run(dcgan, diverging))) == {"healthy", "diverged"}


def test_a_latent_of_size_one_is_mode_collapse_by_its_spacing() -> None:
    """A curve of fakes: nearly as diverse as the data and ever closer to it, but each fake has a twin."""
    count = 8
    falling = [300 - 20.0 * i for i in range(count)]
    reached = verdicts(evaluations(fid=falling, diversity=[0.7] * count, spacing=[0.2] * count))
    assert [verdict.state for verdict in reached] == ["healthy"] * 4 + ["mode_collapse"] * 4
    assert "0.2 times as far apart" in reached[-1].reason
    assert set(states(evaluations(fid=falling, diversity=[0.7] * count, spacing=[0.4] * count))) == {"healthy"}


def test_a_latent_of_size_one_is_mode_collapse_by_its_recall_and_coverage() -> None:
    def judged(precision: float, recall: float, coverage: float) -> str:
        return states(evaluations(precision=[precision] * 8, recall=[recall] * 8, coverage=[coverage] * 8))[-1]

    assert judged(0.6, 0.01, 0.04) == "mode_collapse"
    assert judged(0.6, 0.3, 0.04) == judged(0.6, 0.01, 0.5) == "healthy"
    assert judged(0.02, 0.0, 0.0) == "healthy"  # resembles nothing real: no mode to collapse to
    assert states(evaluations(precision=[0.6] * 7, recall=[0.01] * 7)) == ["healthy"] * 6 + ["mode_collapse"]
    assert set(states(evaluations(precision=[0.6] * 8))) == {"healthy"}


def test_a_discriminator_that_wins_at_once_is_a_convergence_failure() -> None:
    reached = verdicts(trained(30, discriminator_accuracy=0.9999, discriminator_loss=0.003, generator_loss=7.5))
    assert [verdict.state for verdict in reached] == ["healthy"] * 9 + ["convergence_failure"] * 21
    assert reached[-1] == Verdict(
        "convergence_failure",
        1000,
        "the discriminator has won: accuracy 0.9999, loss 0.003, the generator's 7.5 (10 records in a row)",
    )


def test_a_generator_that_never_learned_anything_has_not_collapsed_although_its_fakes_are_alike() -> None:
    lost = trained(15, discriminator_accuracy=1.0, discriminator_loss=1e-5, generator_loss=12.0)
    alike = evaluations(fid=[91.3, 91.5, 91.4, 91.3, 91.1], diversity=[0.1] * 5, spacing=[0.1] * 5)
    assert states([*lost, *alike])[-1] == "convergence_failure"
    learned = evaluations(fid=[91.3, 40.0, 41.0, 42.0, 41.0], diversity=[0.1] * 5)
    assert states(learned)[-1] == "mode_collapse"


def test_a_discriminator_wins_too_where_its_rare_mistakes_are_huge() -> None:
    values = {"discriminator_accuracy": 0.998, "discriminator_loss": 0.1}
    assert states(trained(10, **values, generator_loss=30.0))[-1] == "convergence_failure"
    assert set(states(trained(50, **values, generator_loss=5.0))) == {"healthy"}


def test_a_discriminator_has_not_won_without_an_accuracy_or_at_a_loss_in_the_band() -> None:
    assert set(states(trained(50, discriminator_loss=-300.0))) == {"healthy"}
    assert set(states(trained(50, discriminator_accuracy=0.999, discriminator_loss=0.1))) == {"healthy"}
    assert set(states(trained(50, discriminator_accuracy=0.99, discriminator_loss=0.01))) == {"healthy"}


def test_a_generator_that_comes_back_ends_the_failure_but_only_for_good() -> None:
    lost = {"discriminator_accuracy": 1.0, "discriminator_loss": 0.0}
    fair = {"discriminator_accuracy": 0.8, "discriminator_loss": 0.6}
    rows = [lost] * 10 + [fair] * 9 + [lost] + [fair] * 10
    reached = states([(LOG * i, "train", row) for i, row in enumerate(rows, start=1)])
    assert reached == ["healthy"] * 9 + ["convergence_failure"] * 20 + ["healthy"]


@pytest.mark.parametrize("k", [0.0, 1.0])
def test_a_pinned_k_of_began_is_a_convergence_failure(k: float) -> None:
    def pinned(done: float, chance: random.Random) -> dict[str, float]:
        return {**began(done, chance), "k": k}

    reached = verdicts(run(pinned, None))
    assert reached[-1] == Verdict(
        "convergence_failure", 2000, f"BEGAN's k is pinned at {k:.0f} and balances nothing (20 records in a row)"
    )


def test_a_convergence_of_began_that_does_not_fall_is_a_failure_until_it_does() -> None:
    rows = [0.3] * 30 + [0.1] * 40
    reached = verdicts([(LOG * i, "train", {"k": 0.1, "convergence": value}) for i, value in enumerate(rows, start=1)])
    assert [verdict.state for verdict in reached[:21]] == ["healthy"] * 20 + ["convergence_failure"]
    assert reached[20].reason == "BEGAN's convergence is 0.3, still above 0.9 times 0.3"
    assert reached[-1].state == "healthy"


def test_a_fid_that_never_falls_is_a_convergence_failure_until_it_does() -> None:
    reached = verdicts(evaluations(fid=[300.0, 310.0, 290.0, 280.0, 306.0, 300.0, 200.0]))
    assert [verdict.state for verdict in reached] == ["healthy"] * 4 + ["convergence_failure"] * 2 + ["healthy"]
    assert reached[4].reason == "the best FID is 280, still above 0.9 times 300"


@pytest.mark.parametrize(("shuffled", "state"), [(42.9, "healthy"), (10.0, "convergence_failure")])
def test_a_fid_that_is_good_from_the_first_need_not_fall(shuffled: float, state: str) -> None:
    """The first evaluation may come late: this is of a BEGAN on MNIST, whose digits could be read by then."""
    fid = [4.476, 7.689, 5.943, 6.255, 5.023]
    assert states(evaluations(fid=fid, fid_shuffled=[shuffled] * 5))[-1] == state


def test_the_gravest_of_several_states_is_the_verdict_and_the_next_one_follows_it() -> None:
    fid, diversity = [10.0] + [100.0] * 11, [0.9] * 3 + [0.1] * 3 + [0.9] * 6
    reached = states(evaluations(fid=fid, diversity=diversity))
    assert reached[3] == "diverged"
    assert reached[4] == "convergence_failure"  # the first FID is the best
    assert reached[5] == "mode_collapse"
    assert reached[-1] == "convergence_failure"


def test_of_several_feature_extractors_the_first_by_name_counts_in_any_order() -> None:
    rising, falling = [10.0] + [100.0] * 4, [500.0, 400.0, 300.0, 200.0, 100.0]
    for names in (["fid@digits", "fid@pixels"], ["fid@pixels", "fid@digits"]):
        rows = [{"fid@digits": good, "fid@pixels": bad} for good, bad in zip(falling, rising, strict=True)]
        records = [(i, "evaluate", {name: row[name] for name in names}) for i, row in enumerate(rows)]
        assert set(states(records)) == {"healthy"}


def test_thresholds_are_options() -> None:
    records = evaluations(fid=[10.0, 14.0, 14.0])
    assert set(states(records)) == {"healthy"}
    assert verdicts(records, new_watch(Rules(risen=1.3, risen_evaluations=2)))[-1].state == "diverged"


def test_the_bands_hold_a_discriminator_that_guesses() -> None:
    healthy = CRITERIA["logistic"].losses["discriminator_loss"].healthy_range
    assert healthy is not None
    low, high = healthy
    assert low < math.log(2) < high


@pytest.mark.parametrize(("loss", "shown"), [("logistic", True), ("hinge", False), ("wasserstein", False)])
def test_only_a_gan_with_the_logistic_loss_has_bands_in_its_plots(loss: str, shown: bool) -> None:
    options = gan.Options.model_validate({"loss": loss, "width": 2})
    data = ImageDescription("noise", 16, 8, 1, 8, ("0",), (0.5,), (0.5,))
    workload = gan.build(options, data, OptimizerOptions())
    assert any(scalar.healthy_range for scalar in workload.scalars.values()) == shown


VALUES = st.floats(0, 400) | st.floats(-1e300, 1e300) | st.sampled_from([0.0, 0.001, 0.5, 0.999, 1.0, math.nan])
TRAIN = ["discriminator_loss", "generator_loss", "discriminator_accuracy", "k", "convergence"]
EVALUATION = [
    "fid@pixels",
    "fid@digits",
    "precision@digits",
    "recall@digits",
    "coverage@digits",
    "diversity",
    "spacing",
]
RECORD = st.tuples(st.just("train"), st.dictionaries(st.sampled_from(TRAIN), VALUES)) | st.tuples(
    st.just("evaluate"), st.dictionaries(st.sampled_from(EVALUATION), VALUES)
)


def through_the_log(record: Record) -> Record:
    """As the metric log gives it back: JSON without nan, names in another order."""
    step, kind, values = record
    text = json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}, sort_keys=True)
    return step, kind, json.loads(text)


@settings(max_examples=150, deadline=None)
@given(drawn=st.lists(RECORD, max_size=25), times=st.integers(1, 6), cut=st.integers(0, 150))
def test_a_resumed_run_comes_to_the_same_verdicts(
    drawn: list[tuple[str, dict[str, float]]], times: int, cut: int
) -> None:
    rows = [row for row in drawn for _ in range(times)]  # so that runs of equal records trip the rules
    records = [(step, kind, values) for step, (kind, values) in enumerate(rows)]
    whole = verdicts(records)
    resumed = new_watch()
    replayed = [resumed.observe(*through_the_log(record)) for record in records[:cut]]
    assert replayed + verdicts(records[cut:], resumed) == whole
    assert all(verdict.state in STATES and len(verdict.reason) <= 160 for verdict in whole)
