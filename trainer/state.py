"""Everything that changes while training: a workload, its optimizers, the step. Schedules are functions of the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .workload import Workload

Groups = dict[str, dict[str, Tensor]]  # tensors by checkpoint file and name


class Mismatch(Exception):
    """A checkpoint belongs to another network."""


class TrainState:
    """What a checkpoint holds. Its groups are the checkpoint's files."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.step = 0
        self.seconds = 0.0  # spent on training, over all lives of the run

    def _named_states(self) -> list[tuple[str, torch.optim.Optimizer, Tensor]]:
        names = {parameter: name for name, parameter in self.workload.named_parameters()}
        return [
            (f"{phase.name}/{names[parameter]}", phase.optimizer, parameter)
            for phase in self.workload.phases
            for parameter in phase.parameters
        ]

    def snapshot(self) -> Groups:
        """Copies of all tensors on the CPU, taken at a step boundary."""
        optimizer = {
            f"{name}/{key}": value
            for name, opt, parameter in self._named_states()
            for key, value in opt.state.get(parameter, {}).items()
            if value is not None
        }
        return {"weights": _copies(self.workload.state_dict()), "optimizer": _copies(optimizer)}

    def restore(self, groups: Groups, state: dict[str, Any]) -> None:
        """Take over a checkpoint; raises Mismatch before anything is changed."""
        load_weights(self.workload, groups["weights"])
        stored = groups.get("optimizer", {})
        for name, optimizer, parameter in self._named_states():
            entries = {k.rpartition("/")[2]: v for k, v in stored.items() if k.rpartition("/")[0] == name}
            # torch keeps the step count of non-capturable optimizers on the CPU, and so do we
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" and not _fused(optimizer) else value.to(parameter.device, copy=True)
                for key, value in entries.items()
            }
            for key, value in optimizer.state[parameter].items():
                if value.shape == parameter.shape and parameter.is_contiguous(memory_format=torch.channels_last):
                    optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.step = state["step"]
        self.seconds = state["seconds"]


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Independent, contiguous copies on the CPU, whole before this returns."""
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(
            tensor.detach(), non_blocking=True
        )
        for name, tensor in tensors.items()
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


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
