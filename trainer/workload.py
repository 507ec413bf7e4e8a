"""What a workload must say about itself: its phases, how it is evaluated, what it shows.

A workload never sees ranks, devices, precision, W&B or files. The engine runs its phases in order; each phase returns
the mean loss over the rows that it is given, and the engine weighs that by the rows' share of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .data.description import Batch, Description
from .figures import Figure
from .randomness import Draws

Scalars = dict[str, Tensor]  # 0-d, detached; stays on the device until it is logged
Totals = dict[str, Tensor]  # sums and counts: may be added over batches and over ranks


@dataclass(frozen=True)
class Phase:
    """One optimizer's turn within a step."""

    name: str
    loss: Callable[[Batch, Draws], tuple[Tensor, Scalars]]
    optimizer: Optimizer  # the phase trains exactly the parameters that this holds; all else is frozen meanwhile
    every: int = 1  # run only on steps divisible by this
    times: int = 1  # updates a step, each on a batch of its own (critic steps)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class Quality(Protocol):
    """Judges generated images against real ones; given to workloads that generate images."""

    headline: str  # the reported metric that picks the best checkpoint; smaller is better

    def totals(self, images: Tensor, ids: Tensor) -> Totals:
        """Sums over images (B, C, H, W) in [-1, 1]; each stands beside the held-out sample of that id."""

    def report(self, totals: Totals) -> dict[str, float]: ...

    def classify(self, images: Tensor) -> Tensor | None:
        """The classes (B,) of images, where they are compared by the features of a classifier of their classes."""


class Workload(nn.Module):
    """Its parameters and buffers are what is saved; nothing else may change while training."""

    data: Description
    phases: tuple[Phase, ...]
    controller_inputs: tuple[str, ...] = ()  # scalars that after_step needs as means over the global batch, every step
    group: int = 1  # consecutive rows that must stay on one rank: mixup pairs, packing, minibatch deviation
    whole_groups: bool = False  # whether the batch must be a multiple of that
    channels_last: bool = False  # whether this memory format makes the networks faster
    symmetric: bool = False  # whether images come in [-1, 1], not normalised by the data set's mean and deviation
    generates: bool = False  # whether `samples` gives images that have a quality
    quality: Quality | None = None  # their judge
    bands: Mapping[str, tuple[float, float]] = {}  # where the logged values of a stable run lie, for the plots
    headline: str = "loss"  # the reported metric that the progress bar shows and that picks the best checkpoint
    maximise: bool = False  # whether a larger headline is better

    @property
    def batches_per_step(self) -> int:
        """How many global batches a step takes: as many as the phase with the most updates."""
        return max(phase.times for phase in self.phases)

    def after_step(self, step: int, means: Scalars) -> None:
        """Move what no gradient moves (weight averages, controllers), equally on every rank."""

    def evaluate(self, batch: Batch, draws: Draws) -> Totals:
        """Counts and sums over the rows of a batch; divided once, after the reduction over batches and ranks."""
        raise NotImplementedError

    def report(self, totals: Totals) -> dict[str, float]:
        """Metrics of the whole set from its totals, which are float64 and on the CPU."""
        raise NotImplementedError

    def pictures(self, totals: Totals, images: Callable[[Iterable[int]], Tensor], draws: Draws) -> dict[str, Figure]:
        """What to show after the last evaluation; `images(ids)` gives samples of the evaluated split in [0, 1]."""
        return {}

    def inference(self) -> nn.Module:
        """The network that a user deploys, with averaged weights where there are some."""
        raise NotImplementedError

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of `inference()` for two samples, float32."""
        return (torch.rand(2, *self.data.shape, generator=torch.Generator().manual_seed(0)),)

    def samples(self, draws: Draws, label: int | None = None, truncation: float | None = None) -> Tensor | str | None:
        """As many images (N, C, H, W) in [-1, 1] as `draws` has rows, or text; None where nothing is generated."""
        return None
