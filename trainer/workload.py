"""What a workload must say about itself: its phases, how it is evaluated, what it shows.

A workload never sees ranks, devices, precision, W&B or files. The engine runs its phases in order; each phase returns
the mean loss over the rows that it is given, and the engine weighs that by the rows' share of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from .data.description import Batch, Description
from .figures import Figure, ScalarDisplay
from .metrics.evaluator import Evaluator, Scores, Totals
from .metrics.health import Rule
from .randomness import Draws

Scalars = dict[str, Tensor]  # 0-d, detached; stays on the device until it is logged
HeldOut = Callable[[Iterable[int]], Batch]  # held-out samples by their ids, as an evaluation has them


@dataclass(frozen=True)
class Phase:
    """One optimizer's turn within a step."""

    name: str
    loss: Callable[[Batch, Draws], tuple[Tensor, Scalars]]
    optimizer: Optimizer  # the phase trains exactly the parameters that this holds; all else is frozen meanwhile
    every: int = 1  # run only on steps divisible by this
    times: int = 1  # updates a step, each on a batch of its own (critic steps)
    keeps_graph_of: tuple[nn.Module, ...] = ()  # not frozen: the next phase differentiates what this one made with them

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class Workload(nn.Module):
    """Its parameters, buffers and row states are what is saved; nothing else may change while training."""

    data: Description
    phases: tuple[Phase, ...]
    controller_inputs: tuple[str, ...] = ()  # scalars that after_step needs as means over the global batch, every step
    group: int = 1  # consecutive rows that must stay on one rank: mixup pairs, packing, minibatch deviation
    whole_groups: bool = False  # whether the batch must be a multiple of that
    channels_last: bool = False  # whether this memory format makes the networks faster
    input_range: tuple[float, float] | None = None  # of images; None: normalised by the data set's mean and deviation
    generates: bool = False  # whether it makes images: `samples`, or of other images `translate`
    directions: tuple[str, ...] = ()  # in which `translate` goes, the usual one first; none where it cannot
    writes: bool = False  # whether it makes text, which `write` goes on with
    conditional: bool = False  # whether these are of a class that can be chosen
    scalars: Mapping[str, ScalarDisplay] = {"loss": ScalarDisplay(True), "accuracy": ScalarDisplay(True)}
    health_rules: tuple[Rule, ...] = ()  # of this workload alone; those of every generator are in metrics/health.py

    @property
    def batches_per_step(self) -> int:
        """How many global batches a step takes: as many as the phase with the most updates."""
        return max(phase.times for phase in self.phases)

    def after_step(self, step: int, means: Scalars) -> None:
        """Move what no gradient moves (weight averages, controllers), equally on every rank."""

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        """What evaluates this workload. `scores` opens those of generated images; only who needs them calls it."""
        raise NotImplementedError

    def figures(self, totals: Totals, images: Callable[[Iterable[int]], Tensor], draws: Draws) -> dict[str, Figure]:
        """What to show after the last evaluation; `images(ids)` gives samples of the evaluated split in [0, 1]."""
        return {}

    def inference(self) -> nn.Module:
        """The network that a user deploys, with averaged weights where there are some."""
        raise NotImplementedError

    def example(self) -> dict[str, Tensor]:
        """Inputs of `inference()` for two samples, by name, float32."""
        raise NotImplementedError

    def samples(self, draws: Draws, label: int | None = None, truncation: float | None = None) -> Tensor | str | None:
        """As many images (N, C, H, W) in [-1, 1] as `draws` has rows, or text; None where nothing is generated."""
        return None

    def input_of(self, images: Tensor) -> Tensor:
        """What `translate` takes, of images that a user has: another, where a workload derives its inputs."""
        return images

    def translate(self, inputs: Tensor, draws: Draws, direction: str) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], made of others."""
        raise NotImplementedError

    def shown(self, held_out: HeldOut, draws: Draws) -> Tensor | str | Figure | None:
        """What to show while training: samples, or what is made of held-out ones."""
        return self.samples(draws)

    def write(self, draws: Draws, prompt: str, length: int, temperature: float) -> list[str]:
        """A text for each row of `draws`: the prompt and so many tokens more. Raises ValueError for a prompt of other
        characters than those of the training text."""
        raise NotImplementedError
