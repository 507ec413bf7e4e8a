"""Training steps as CUDA graphs: a GPU computes small networks faster than a host can launch their kernels.

A step is recorded, captured and from then on replayed, with its inputs in fixed places: the batch, the learning rates
and what the step draws, which comes from the same generators as ever. What a step does may depend on nothing else;
steps that read their own number (`Draws.step`) or a decision for all rows (`Draws.shared`) are not captured.
`Draws.due` may depend on the step: each combination of what is due has a graph of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .randomness import Draws
from .services import MicroBatches
from .workload import Scalars

Means = list[tuple[Scalars, float, bool]]  # scalars, their share of a global batch, and whether they open one
Computed = tuple[Means, Scalars]  # to be logged, and the controllers' inputs
Compute = Callable[[Sequence[MicroBatches], Callable[[Draws], Draws], bool], Computed]
Key = tuple[object, ...]


@dataclass
class Tape:
    """What a step draws, in its order, and where the numbers lie."""

    draws: list[tuple[Draws, str, tuple[object, ...]]] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    position: int | None = None  # of the next draw that is read; None while recording
    alike: bool = True  # whether steps differ in nothing but their inputs
    periods: set[int] = field(default_factory=set)

    def draw(self, draws: Draws, method: str, arguments: tuple[object, ...]) -> Tensor:
        if self.position is None:
            self.draws.append((draws, method, arguments))
            self.places.append(getattr(draws, method)(*arguments))
            return self.places[-1].clone()  # which may be changed in place
        recorded, *what = self.draws[self.position]
        if what != [method, arguments] or recorded.scope[1:] != draws.scope[1:] or recorded.rows != draws.rows:
            raise RuntimeError(f"a step draws {method}{arguments} where the one before drew {what}")
        self.position += 1
        return self.places[self.position - 1].clone()

    def renew(self, step: int) -> None:
        """Draw for another step, into the same places."""
        for (draws, method, arguments), place in zip(self.draws, self.places, strict=True):
            place.copy_(getattr(replace(draws, scope=(step, *draws.scope[1:])), method)(*arguments))


@dataclass(frozen=True)
class TapedDraws(Draws):
    """Draws that a tape keeps, and that notice what else a step depends on."""

    tape: Tape = field(default_factory=Tape)

    @property
    def step(self) -> int:
        self.tape.alike = False
        return super().step

    @property
    def index(self) -> tuple[int, int]:
        return 0, self.micro_batch  # the same for all phases of a step, which is all that is asked of it

    def due(self, every: int) -> bool:
        self.tape.periods.add(every)
        return Draws.step.fget(self) % every == 0  # type: ignore[attr-defined]

    def shared(self, name: str) -> random.Random:
        self.tape.alike = False
        return super().shared(name)

    def _plain(self) -> Draws:
        return Draws(self.seed, self.scope, self.rows, self.device, self.dtype)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.tape.draw(self._plain(), "normal", (name, tuple(shape)))

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.tape.draw(self._plain(), "uniform", (name, tuple(shape)))

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        return self.tape.draw(self._plain(), "integers", (name, high, tuple(shape)))


@dataclass
class Replay:
    """A captured step."""

    replay: Callable[[], None]
    batches: list[list[tuple[slice, dict[str, Tensor]]]]
    tape: Tape
    computed: Computed

    def __call__(self, step: int, batches: Sequence[MicroBatches]) -> Computed:
        places = [t for own in self.batches for _, batch in own for t in batch.values()]
        torch._foreach_copy_(places, [t for own in batches for _, batch in own for t in batch.values()])
        self.tape.renew(step)
        self.replay()
        return self.computed


class Graphs:
    """Computes steps, by replaying them from the third of a kind on."""

    def __init__(
        self, compute: Compute, optimizers: Sequence[torch.optim.Optimizer], note: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.compute, self.note = compute, note
        self.replays: dict[Key, Replay] = {}
        self.tapes: dict[Key, Tape] = {}
        self.periods: set[int] = set()
        self.usable = all(optimizer.defaults.get("fused") for optimizer in optimizers)
        if self.usable:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                parameter = group["params"][0]
                group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=parameter.device)
                if "capturable" in group:
                    group["capturable"] = True

    def __call__(self, step: int, phases: Key, batches: Sequence[MicroBatches], with_norm: bool) -> Computed:
        if with_norm or not self.usable:  # the norms are wanted too seldom for graphs of their own
            return self.compute(batches, lambda draws: draws, with_norm)
        key = (*phases, *(step % every == 0 for every in sorted(self.periods)))
        if key in self.replays:
            return self.replays[key](step, batches)
        if key in self.tapes:
            return self._capture(key, step, batches)
        tape = Tape()
        computed = self.compute(batches, lambda draws: _taped(draws, tape), False)
        self.usable = tape.alike
        if new := tape.periods - self.periods:  # the keys of before do not tell these steps apart
            self.periods |= new
            self.tapes, self.replays = {}, {}
        else:
            self.tapes[key] = tape
        return computed

    def _capture(self, key: Key, step: int, batches: Sequence[MicroBatches]) -> Computed:
        tape = self.tapes.pop(key)
        own = [[(rows, {name: t.clone() for name, t in batch.items()}) for rows, batch in part] for part in batches]

        def compute() -> Computed:
            tape.position = 0
            return self.compute(own, lambda draws: _taped(draws, tape), False)

        try:
            replay, computed = captured(compute)
        except RuntimeError as error:
            self.usable = False
            self.note(f"steps are not replayed as CUDA graphs: {str(error).splitlines()[0]}")
            return self.compute(batches, lambda draws: draws, False)
        self.replays[key] = Replay(replay, own, tape, computed)
        return self.replays[key](step, batches)


def captured(compute: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
    """What computes a step again, and where its results then are; raises RuntimeError where the device refuses."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what the graph takes, the steps before it have left
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        computed = compute()
    return graph.replay, computed


def _taped(draws: Draws, tape: Tape) -> Draws:
    return TapedDraws(draws.seed, draws.scope, draws.rows, draws.device, draws.dtype, tape)
