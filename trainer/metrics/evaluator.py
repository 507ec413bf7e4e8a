"""What an evaluation is: sums over samples, divided once after the reduction over batches and ranks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..data.description import Batch
from ..randomness import Draws

Totals = dict[str, Tensor]  # sums and counts: may be added over batches and over ranks


class Evaluator(Protocol):
    """Evaluates a workload. It is made before the engine, from the workload and what its samples are compared with."""

    headline: str  # the reported metric that picks the best checkpoint
    maximise: bool  # whether a larger headline is better

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        """Counts and sums over the rows of a batch."""

    def report(self, totals: Totals) -> dict[str, float]:
        """Metrics of the whole set from its totals, which are float64 and on the CPU."""


class Scores(Protocol):
    """Compares generated images with real ones; as many of each."""

    headline: str  # the reported metric that picks the best checkpoint; smaller is better

    def totals(self, images: Tensor, ids: Tensor) -> Totals:
        """Sums over images (B, C, H, W) in [-1, 1]; each stands beside the held-out sample of that id."""

    def report(self, totals: Totals) -> dict[str, float]: ...

    def classify(self, images: Tensor) -> Tensor | None:
        """The classes (B,) of images, where they are compared by the features of a classifier of their classes."""
