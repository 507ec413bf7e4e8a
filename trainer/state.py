"""Everything that changes while training; its snapshot is the checkpoint's schema."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .clock import Meter
from .data.plan import BatchPlan
from .distributed.runtime import Runtime
from .nn import optim
from .nn.row_state import row_states
from .storage.checkpoint import Checkpoint, Groups
from .workload import Workload


class Mismatch(Exception):
    """A checkpoint belongs to another network."""


class TrainState:
    """A workload, its optimizers, the step, and what each rank has of its own: meters, BatchNorm statistics, rows."""

    def __init__(self, workload: Workload, runtime: Runtime, plan: BatchPlan, headline: str, maximise: bool) -> None:
        self.workload, self.runtime = workload, runtime
        self.step = 0
        self.seconds = 0.0  # spent on training, over all attempts at the run
        self.meter = Meter()
        self.headline, self.maximise = headline, maximise  # which checkpoint is the best, for those who prune later
        self.per_rank_buffers = runtime.per_rank_buffers(workload)
        self.row_states = row_states(workload)
        self._rows = [plan.rank_rows(rank, runtime.world) for rank in range(runtime.world)]
        shares = [plan.rows(micro_batch, runtime.rank, runtime.world) for micro_batch in range(plan.accumulation)]
        for state in self.row_states.values():
            state.allocate([rows.stop - rows.start for rows in shares], plan.batch_size)

    def snapshot(self) -> Checkpoint | None:
        """Copies of it all on the CPU, by all ranks at a step boundary; None where a value is not finite.

        The first rank's holds the tensors: `weights`; `optimizer`; `lanes`, the buffers that differ from rank to rank,
        stacked; `rows`, what belongs to the rows of the global batch, in their order.
        """
        runtime, workload = self.runtime, self.workload
        meters = runtime.gather(self.meter.dump())
        norm = torch.nn.utils.get_total_norm(workload.parameters())  # the same on every rank, as the weights are
        if not all(map(math.isfinite, [float(norm), *(value for meter in meters for value, _ in meter.values())])):
            return None
        buffers = _gathered(runtime, self.per_rank_buffers)
        rows = _gathered(runtime, {name: state.value for name, state in self.row_states.items()})
        groups: Groups = {}
        if runtime.main:
            optimizer: dict[str, Tensor] = {}
            for phase in workload.phases:
                optimizer |= optim.tensors(phase.optimizer, self._names(phase.name))
            groups = {"weights": runtime.to_host(workload.state_dict()), "optimizer": runtime.to_host(optimizer)}
            if buffers:
                groups["lanes"] = {name: torch.stack(values) for name, values in buffers.items()}
                groups["weights"].update({name: values.mean(0) for name, values in groups["lanes"].items()})
            if rows:
                order = torch.argsort(torch.cat(self._rows))  # a rank holds a part of every micro-batch
                axes = {name: state.axis for name, state in self.row_states.items()}
                whole = {name: torch.cat(parts, axes[name]) for name, parts in rows.items()}
                groups["rows"] = {name: value.index_select(axes[name], order) for name, value in whole.items()}
        state = {
            "step": self.step, "seconds": self.seconds, "meters": meters, "world_size": runtime.world,
            "headline": self.headline, "maximise": self.maximise,
        }  # fmt: skip
        return Checkpoint(self.step, groups, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint, also one of another world size; raises Mismatch before anything is changed."""
        groups, state, runtime = checkpoint.groups, checkpoint.state, self.runtime
        self._check_rows(groups.get("rows", {}))
        load_weights(self.workload, groups["weights"])
        for phase in self.workload.phases:
            optim.restore(phase.optimizer, self._names(phase.name), groups.get("optimizer", {}))
        self.step, self.seconds = state["step"], state["seconds"]
        self.meter.load(state["meters"], runtime.rank, runtime.world, runtime.device, runtime.dtype)
        for name, values in groups.get("lanes", {}).items():
            if name in self.per_rank_buffers and len(values) == runtime.world:
                self.per_rank_buffers[name].copy_(values[runtime.rank])
        for name, values in groups.get("rows", {}).items():
            own = self.row_states[name]
            own.value.copy_(values.index_select(own.axis, self._rows[runtime.rank]))

    def _check_rows(self, stored: dict[str, Tensor]) -> None:
        rows = sum(map(len, self._rows))
        if stored.keys() != self.row_states.keys():
            raise Mismatch(f"the checkpoint has rows of {sorted(stored)}, the workload has {sorted(self.row_states)}")
        for name, state in self.row_states.items():
            if stored[name].shape[state.axis] != rows:
                raise Mismatch(f"the checkpoint has {stored[name].shape[state.axis]} rows of {name}, the batch {rows}")

    def _names(self, phase: str) -> dict[Tensor, str]:
        return {parameter: f"{phase}/{name}" for name, parameter in self.workload.named_parameters()}


def load_weights(workload: Workload, weights: dict[str, Tensor]) -> None:
    """Copy weights into a workload; raises Mismatch that names what does not fit."""
    own = workload.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in the network" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the network's is {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise Mismatch(f"the checkpoint is of another network: {problems[0]}{more}")
    workload.load_state_dict(weights)


def _gathered(runtime: Runtime, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Each tensor as every rank has it, on the CPU; no collective where there is nothing to gather."""
    ranks = runtime.gather({name: tensor.cpu() for name, tensor in tensors.items()}) if tensors else []
    return {name: [own[name] for own in ranks] for name in tensors}
