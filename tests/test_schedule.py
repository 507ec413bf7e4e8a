"""Learning-rate schedules are pure functions of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import workloads
from trainer.config.options import ScheduleOptions, UserError
from trainer.run.build import recipe
from trainer.schedule import Schedule, build


def test_constant_is_one_for_ever() -> None:
    schedule = build("constant", total=0, warmup=0, every=1, gamma=0.1, final=0.0)
    assert [schedule(step) for step in (0, 1, 10**6)] == [1.0, 1.0, 1.0]


def test_a_warm_up_rises_linearly_and_reaches_the_peak_right_after_it() -> None:
    schedule = build("constant", total=0, warmup=4, every=1, gamma=0.1, final=0.0)
    assert [schedule(step) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_steps_multiply_by_gamma_and_are_counted_from_the_end_of_the_warm_up() -> None:
    schedule = build("step", total=0, warmup=0, every=10, gamma=0.5, final=0.0)
    assert [schedule(step) for step in (0, 9, 10, 19, 20, 35)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.125]
    late = build("step", total=0, warmup=3, every=10, gamma=0.5, final=0.0)
    assert [late(step) for step in (0, 3, 12, 13)] == [0.25, 1.0, 1.0, 0.5]


def test_cosine_falls_from_one_to_its_final_share_and_stays_there() -> None:
    schedule = build("cosine", total=100, warmup=0, every=1, gamma=0.1, final=0.1)
    assert schedule(0) == 1.0
    assert schedule(50) == pytest.approx(0.55, abs=1e-15)
    assert schedule(25) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert schedule(100) == schedule(1000) == 0.1


def test_cosine_after_a_warm_up_still_ends_with_the_run() -> None:
    schedule = build("cosine", total=100, warmup=20, every=1, gamma=0.1, final=0.0)
    assert schedule(0) == 1 / 21
    assert schedule(19) == 20 / 21
    assert schedule(20) == 1.0
    assert schedule(60) == pytest.approx(0.5, abs=1e-15)
    assert schedule(100) == 0.0


def test_one_cycle_rises_for_three_tenths_of_the_run_unless_a_warm_up_is_given() -> None:
    schedule = build("one_cycle", total=100, warmup=0, every=1, gamma=0.1, final=0.01)
    assert schedule(0) == 1 / 31
    assert schedule(29) == 30 / 31
    assert schedule(30) == 1.0
    assert schedule(65) == pytest.approx(0.505, abs=1e-15)
    assert schedule(100) == 0.01
    assert build("one_cycle", total=100, warmup=10, every=1, gamma=0.1, final=0.0)(10) == 1.0


def test_linear_is_flat_for_its_share_of_the_run_and_then_falls_in_a_straight_line() -> None:
    schedule = build("linear", total=200, warmup=0, every=1, gamma=0.1, final=0.0, flat=0.5)
    assert [schedule(step) for step in (0, 99, 100, 125, 150, 200, 1000)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    late = build("linear", total=110, warmup=10, every=1, gamma=0.1, final=0.2, flat=0.75)
    assert [late(step) for step in (0, 10, 85, 110)] == [1 / 11, 1.0, 1.0, pytest.approx(0.2, abs=1e-15)]
    assert build("linear", total=100, warmup=0, every=1, gamma=0.1, final=0.0, flat=0.0)(25) == 0.75


def test_a_warm_up_as_long_as_the_run_divides_by_nothing() -> None:
    for name in ("cosine", "one_cycle", "linear"):
        schedule = build(name, total=5, warmup=5, every=1, gamma=0.1, final=0.0)
        assert [schedule(step) for step in range(5)] == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]
        assert build(name, total=1, warmup=0, every=1, gamma=0.1, final=0.0)(0) == 1.0


def of_a_run(duration: str, **schedule: str | float) -> Schedule:
    model = workloads.config_model("classifier")
    config = model(duration=duration, batch_size=8, schedule=ScheduleOptions.model_validate(schedule))
    return recipe(config, 1).schedule


def test_a_length_of_its_own_ends_the_fall_before_the_run_or_in_a_run_of_unknown_length() -> None:
    for duration in ("100 steps", "3 hours"):
        schedule = of_a_run(duration, name="cosine", final=0.25, length="160 samples", warmup="4 steps")
        assert [schedule(step) for step in (4, 12, 20, 99)] == pytest.approx([1.0, 0.625, 0.25, 0.25], abs=1e-15)
    with pytest.raises(UserError, match=r"warmup: '20 steps' is not shorter than schedule\.length, '160 samples': "):
        of_a_run("100 steps", name="cosine", length="160 samples", warmup="20 steps")


@given(
    st.sampled_from(["constant", "step", "cosine", "one_cycle", "linear"]), st.integers(1, 10**5),
    st.integers(0, 10**5), st.integers(1, 10**4), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 10**6),
)  # fmt: skip
def test_every_factor_lies_between_zero_and_one_and_depends_on_the_step_alone(
    name: str, total: int, warmup: int, every: int, gamma: float, final: float, step: int
) -> None:
    first, second = (build(name, total, warmup, every, gamma, final) for _ in range(2))
    assert 0.0 <= first(step) <= 1.0 + 1e-12
    second(step + 1)  # asking for another step first changes nothing
    assert second(step) == first(step)
