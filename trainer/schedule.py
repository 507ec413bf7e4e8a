"""Learning-rate schedules: the factor on the peak learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(step: int) -> float:
    return 1.0


def step_decay(every: int, gamma: float) -> Schedule:
    """Multiply by gamma every so many steps."""
    return lambda step: gamma ** (step // every)


def cosine(total: int, final: float) -> Schedule:
    """From 1 to `final` along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return lambda step: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def warmed_up(schedule: Schedule, warmup: int) -> Schedule:
    """A linear rise over the first `warmup` steps, then the schedule from its beginning."""
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else schedule(step - warmup)


def build(name: str, total: int, warmup: int, every: int, gamma: float, final: float) -> Schedule:
    """`one_cycle` (Smith 2018) rises over the warm-up, 30 % of the run where none is given, and anneals to `final`."""
    if name == "one_cycle":
        warmup = warmup or round(0.3 * total)
    shapes = {
        "constant": constant,
        "step": step_decay(every, gamma),
        "cosine": cosine(total - warmup, final),
        "one_cycle": cosine(total - warmup, final),
    }
    return warmed_up(shapes[name], warmup) if warmup else shapes[name]
