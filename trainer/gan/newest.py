"""What one phase of a step leaves for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ..randomness import Draws

T = TypeVar("T")


class Newest(Generic[T]):
    """The fakes that a discriminator has just seen, with their graph, for the generator's phase of the same step.

    Only those of the newest micro-batch, and within a step only, so that no checkpoint needs them.
    """

    def __init__(self) -> None:
        self.kept: tuple[tuple[int, int], T] | None = None

    def make(self, draws: Draws, make: Callable[[], T]) -> T:
        """Make and keep them."""
        self.kept = None  # first, so that two graphs never take memory at once
        made = make()
        self.kept = draws.index, made
        return made

    def take(self, draws: Draws) -> T | None:
        """Those of this step and micro-batch, which are not kept any longer; None where there are none."""
        if self.kept is None or self.kept[0] != draws.index:
            return None
        (_, made), self.kept = self.kept, None
        return made
