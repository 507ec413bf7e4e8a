"""Amounts of training in the user's unit, and the one place where they become steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

_UNITS = {
    "step": "steps", "epoch": "epochs", "sample": "samples",
    "second": "seconds", "minute": "minutes", "hour": "hours",
}  # fmt: skip
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_WRITE_A_DURATION = "write a number and a unit: steps, epochs, samples, seconds, minutes or hours"


class Duration(BaseModel):
    """An amount of training in the user's unit: '5 epochs', '2000 steps', '100000 samples', '3 hours'."""

    model_config = ConfigDict(frozen=True)
    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([a-z]+?)s?\s*", text)
        if not match or match[2] not in _UNITS:
            raise ValueError(_WRITE_A_DURATION)
        amount = float(match[1].replace("_", ""))
        if not math.isfinite(amount):
            raise ValueError("is longer than a run can be")
        return cls(amount=amount, unit=_UNITS[match[2]])

    @property
    def seconds(self) -> float | None:
        """Length in seconds, or None where it is counted in training."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def period(self, samples_per_step: int, epoch_samples: int) -> Fraction:
        """Length in steps, which need not be whole: an epoch seldom is."""
        assert self.seconds is None
        # In fractions: 0.07 epochs of 100 steps are 7 steps, where floats give 7.000000000000001.
        per_unit = {"steps": Fraction(1), "samples": Fraction(1, samples_per_step),
                    "epochs": Fraction(epoch_samples, samples_per_step)}  # fmt: skip
        return Fraction(str(self.amount)) * per_unit[self.unit]

    def steps(self, samples_per_step: int, epoch_samples: int) -> int:
        """Length in whole steps, rounded up; at least one for anything above zero."""
        return math.ceil(self.period(samples_per_step, epoch_samples))


def _duration(allowed: Callable[[Duration], bool], message: str) -> BeforeValidator:
    def check(text: object) -> object:
        if text is None:  # for the settings that may be off
            return None
        if not isinstance(text, str):
            raise ValueError(_WRITE_A_DURATION)
        if not allowed(Duration.parse(text)):
            raise ValueError(message)
        return text

    return BeforeValidator(check)


Length = Annotated[str, _duration(lambda d: d.amount > 0, "must be longer than zero")]
Interval = Annotated[
    str, _duration(lambda d: d.seconds is None and d.amount > 0, "must be in steps, epochs or samples, and above zero")
]
WarmUp = Annotated[str, _duration(lambda d: d.seconds is None, "must be in steps, epochs or samples")]
