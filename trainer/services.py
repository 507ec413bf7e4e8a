"""What the engine needs of its surroundings: batches, somewhere to log numbers, somewhere to save checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from .data.description import Batch
from .figures import Figure
from .metrics.health import Verdict
from .storage.checkpoint import Checkpoint

Metrics = dict[str, float]
MicroBatches = Sequence[tuple[slice, Batch]]  # this rank's rows within each micro-batch of a global batch, and the data


class Loader(Protocol):
    """Delivers a plan's batches to this rank."""

    batch_size: int  # global
    epoch_samples: int
    evaluation_samples: int

    def train(self, first: int) -> Iterator[MicroBatches]: ...
    def evaluate(self) -> Iterator[tuple[slice, Batch]]: ...
    @property
    def evaluation_rows(self) -> int: ...  # the most that this rank has in a batch
    def bad_samples(self) -> list[str]: ...  # what this rank could not read
    def pixels(self, ids: Iterable[int]) -> Tensor: ...  # held-out images in [0, 1]
    def held_out(self, ids: Iterable[int]) -> Batch: ...  # held-out samples, as an evaluation has them


class Tracker(Protocol):
    """Takes numbers and verdicts; only the first rank's keeps them."""

    def progress(self, step: int) -> None: ...
    def log(self, step: int, kind: str, values: Metrics) -> None: ...
    def health(self, verdict: Verdict) -> None: ...
    def note(self, text: str) -> None: ...


class Saver(Protocol):
    """Takes checkpoints and samples; only the first rank's keeps them."""

    @property
    def lease_lost(self) -> bool: ...  # whether another job has taken the run over
    def save(self, checkpoint: Checkpoint) -> None: ...
    def show(self, step: int, samples: Tensor | str | Figure) -> None: ...
