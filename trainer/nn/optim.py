"""Optimizers from settings, and their state by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.options import OptimizerOptions


def build(options: OptimizerOptions, *networks: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over all trainable parameters; weight decay spares norms and biases, which have one axis or none."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if options.weight_decay:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if options.name == "sgd":
        return torch.optim.SGD(
            groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=True
        )  # fmt: skip
    if options.name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=options.lr, alpha=0.99, eps=options.eps, foreach=True)
    kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=0.0, fused=True)


def tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """An optimizer's state by the name of its parameter and of the entry: `generator.weight/exp_avg`."""
    return {
        f"{names[parameter]}/{entry}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for entry, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], stored: Mapping[str, Tensor]) -> None:
    """Take over what `tensors` gave, in copies on the parameters' devices and in their memory format."""
    # torch keeps the step count of non-capturable optimizers on the CPU, and so do we
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = {}
        for name, value in stored.items():
            owner, _, entry = name.rpartition("/")
            if owner != names[parameter]:
                continue
            copy = value.clone() if entry == "step" and not on_device else value.to(parameter.device, copy=True)
            if copy.shape == parameter.shape and parameter.is_contiguous(memory_format=torch.channels_last):
                copy = torch.empty_like(parameter, dtype=copy.dtype).copy_(copy)
            state[entry] = copy
        optimizer.state[parameter] = state
