"""Optimizers from settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
