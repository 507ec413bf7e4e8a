"""train and update: the only loop. It has no branch on the kind of workload, and no host sync between logs.

What happens between two steps is in boundary.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .boundary import Boundary, Outcome
from .config.status import Status
from .distributed.runtime import PhaseModule
from .graphs import Computed, Graphs, Means
from .randomness import Draws, key
from .schedule import Schedule
from .services import MicroBatches
from .workload import Phase, Scalars

Due = tuple[tuple[Callable[[int], bool], Callable[[], Status | None]], ...]  # when, and what; a status ends training
KEPT: tuple[Status, ...] = ("done", "preempted", "mode_collapse", "convergence_failure", "diverged")  # end with a save

NOTHING = contextlib.nullcontext()


def always(step: int) -> bool:
    return True


@dataclass
class Engine:
    boundary: Boundary
    schedule: Schedule
    rollbacks: int = 0  # how often the run went back to a checkpoint; each time the noise is another
    clip_norm: float | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        self.state, self.runtime, self.loader = self.boundary.state, self.boundary.runtime, self.boundary.loader
        self.workload = self.state.workload
        self.phases = [(phase, self.runtime.ddp(phase), phase.parameters) for phase in self.workload.phases]
        owned = [id(parameter) for _, _, parameters in self.phases for parameter in parameters]
        assert len(owned) == len(set(owned)), "two phases train one parameter: DDP would reduce its gradient twice"
        self.peak_rates = [[group["lr"] for group in phase.optimizer.param_groups] for phase in self.workload.phases]
        seed = self.boundary.seed
        self.noise = key(seed, "attempt", self.rollbacks) if self.rollbacks else seed
        self.graphs: Graphs | None = None
        if self.cuda_graphs and self.runtime.can_capture:
            optimizers = [phase.optimizer for phase in self.workload.phases]
            self.graphs = Graphs(self.compute, optimizers, self.boundary.tracker.note)

    def train(self) -> Outcome:
        """From the state's step to the end of the run, or until any rank must stop."""
        boundary, state, limits = self.boundary, self.state, self.boundary.limits
        boundary.begin()
        batches = self.loader.train(state.step * self.workload.batches_per_step)
        self.workload.train()

        # Samples and evaluation come before the question whether to stop, so that a run that stops here has them. The
        # log comes before the checkpoint, which ends a segment of it.
        before_step: Due = (
            (limits.samples.due, boundary.sample),
            (boundary.evaluation_due, boundary.evaluate),
            (always, boundary.check_health),
            (always, boundary.vote),
        )
        after_step: Due = (
            (limits.log.due, boundary.log),
            (boundary.save_due, boundary.save),
            (always, boundary.show_progress),
        )
        status = self.run_due(before_step)
        while status is None:
            boundary.clock.start()
            read = list(itertools.islice(batches, self.workload.batches_per_step))
            boundary.clock.stop_waiting()
            self.update(read, with_norm=limits.log.due(state.step + 1))
            state.step += 1
            status = self.run_due(after_step) or self.run_due(before_step)
        return self.finish(status)

    def run_due(self, due: Due) -> Status | None:
        """Do what is due, in its order, up to the first that ends training."""
        for when, action in due:
            if when(self.state.step) and (status := action()) is not None:
                return status
        return None

    def finish(self, status: Status) -> Outcome:
        """The last samples and the evaluation of a run that is done; and a checkpoint, where there is one to keep."""
        boundary, step = self.boundary, self.state.step
        if status == "done":
            if not boundary.limits.samples.due(step):
                boundary.sample()
            known = step == boundary.last_eval_step  # perhaps to an attempt that ended before it could draw its figures
            stopped = None if known and boundary.totals else boundary.evaluate(record=not known)
            status = stopped or ("bad_data" if boundary.bad_data() else status)
        self.runtime.settle()
        boundary.end_interval()
        if status in KEPT:
            status = boundary.save() or status
        return boundary.outcome(status)

    def update(self, batches: Sequence[MicroBatches], with_norm: bool = False) -> None:
        """One step: every phase that is due in its turn, with only its own parameters trainable."""
        step, factor = self.state.step, self.schedule(self.state.step)
        for (phase, _, _), rates in zip(self.phases, self.peak_rates, strict=True):
            for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor
        if self.graphs is None:
            means, inputs = self.compute(batches, lambda draws: draws, with_norm)
        else:
            due = tuple(step % phase.every == 0 for phase, _, _ in self.phases)
            means, inputs = self.graphs(step, due, batches, with_norm)
        for scalars, share, first in means:
            self.state.meter.add(scalars, share, first)
        self.workload.after_step(step, self.runtime.sum_scalars(inputs))

    def compute(
        self, batches: Sequence[MicroBatches], watched: Callable[[Draws], Draws], with_norm: bool
    ) -> Computed:  # fmt: skip
        """What a step does on the device. `watched` may put other draws in the place of the step's."""
        step = self.state.step
        inputs: Scalars = {}
        means: Means = []
        for phase, loss, parameters in self.phases:
            if step % phase.every:
                continue
            self.freeze_all_but(phase, parameters)
            for turn, micro_batches in enumerate(batches[: phase.times]):
                added = self.accumulate(loss, micro_batches, (step, phase.name, turn), watched, means)
                for name, value in added.items():
                    inputs[name] = inputs.get(name, 0) + value / phase.times
                if self.clip_norm is not None or with_norm:
                    means.append(self.clip(phase, parameters))
                phase.optimizer.step()
                for parameter in parameters:  # optimizer.zero_grad() does this too, and costs 20 microseconds more
                    parameter.grad = None
        return means, inputs

    def freeze_all_but(self, phase: Phase, parameters: list[torch.nn.Parameter]) -> None:
        """So that a phase never fills the gradients of another, and DDP never reduces them."""
        if len(self.phases) == 1:
            return
        kept = [parameter for network in phase.keeps_graph_of for parameter in network.parameters()]
        for _, _, others in self.phases:
            for parameter in others:
                parameter.requires_grad_(False)
        for parameter in (*parameters, *kept):
            parameter.requires_grad_(True)

    def accumulate(
        self, loss: PhaseModule, micro_batches: MicroBatches, scope: tuple[object, ...],
        watched: Callable[[Draws], Draws], means: Means,
    ) -> Scalars:  # fmt: skip
        """Gradients of the mean over the global batch: each share's mean, weighted by the share.

        Adds to the means that are logged, and returns this rank's part of the controllers' inputs.
        """
        runtime, last = self.runtime, len(micro_batches) - 1
        inputs: Scalars = {}
        for index, (rows, batch) in enumerate(micro_batches):
            draws = watched(Draws(self.noise, (*scope, index), rows, runtime.device, runtime.dtype))
            share = (rows.stop - rows.start) / self.loader.batch_size
            with NOTHING if index == last else runtime.no_sync(loss):
                with runtime.autocast():
                    value, scalars = loss(batch, draws)
                # DDP divides the sum over the ranks by their number; the weights make that the global mean.
                (value if share == 1 else value * (share * runtime.world)).backward()
            means.append((scalars, share, index == 0))
            for name in self.workload.controller_inputs:
                if name in scalars:
                    inputs[name] = inputs.get(name, 0) + scalars[name] * share
        return inputs

    def clip(self, phase: Phase, parameters: list[torch.nn.Parameter]) -> tuple[Scalars, float, bool]:
        """Clip the gradients where that is wanted; returns their norm, to be logged."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        name = "grad_norm" if len(self.phases) == 1 else f"{phase.name}_grad_norm"
        return {name: norm.detach()}, 1 / self.runtime.world, True
