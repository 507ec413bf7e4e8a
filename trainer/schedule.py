"""What depends on the step alone: the factor on the peak learning rate, and what is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Schedule = Callable[[int], float]


def constant(step: int) -> float:
    return 1.0


def step_decay(every: int, gamma: float) -> Schedule:
    """Multiply by gamma every so many steps."""
    return lambda step: gamma ** (step // every)


def cosine(total: int, final: float) -> Schedule:
    """From 1 to `final` along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return lambda step: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def linear(total: int, flat: float, final: float) -> Schedule:
    """1 for a share `flat` of the run, then in a straight line to `final` at its end."""
    start = flat * total
    return lambda step: 1 - (1 - final) * min(max(step - start, 0.0) / max(total - start, 1.0), 1.0)


def warmed_up(schedule: Schedule, warmup: int) -> Schedule:
    """A linear rise over the first `warmup` steps, then the schedule from its beginning."""
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else schedule(step - warmup)


def build(
    name: str, total: int, warmup: int, every: int, gamma: float, final: float, flat: float = 0.5
) -> Schedule:  # fmt: skip
    """`one_cycle` (Smith 2018) rises over the warm-up, 30 % of the run where none is given, and anneals to `final`."""
    if name == "one_cycle":
        warmup = warmup or round(0.3 * total)
    shapes = {
        "constant": constant,
        "step": step_decay(every, gamma),
        "cosine": cosine(total - warmup, final),
        "one_cycle": cosine(total - warmup, final),
        "linear": linear(total - warmup, flat, final),
    }
    return warmed_up(shapes[name], warmup) if warmup else shapes[name]


@dataclass(frozen=True)
class Every:
    """Something that is due every so many steps, which need not be whole: an epoch seldom is."""

    period: Fraction | None

    def due(self, step: int) -> bool:
        if self.period is None or step <= 0:
            return False
        steps, times = self.period.numerator, self.period.denominator
        return step * times // steps > (step - 1) * times // steps


NEVER = Every(None)


@dataclass(frozen=True)
class Limits:
    """When things happen, in steps or in seconds of training, and what a run may do before it ends."""

    total_steps: int | None
    total_seconds: float | None = None
    log: Every = NEVER
    evaluate: Every = NEVER
    save: Every = NEVER
    save_seconds: float | None = None
    keep: Every = NEVER  # checkpoints to keep forever
    samples: Every = NEVER
    sample_count: int = 64
    stop_when_unhealthy: bool = False
    bad_samples: int = 0  # that a run may meet
