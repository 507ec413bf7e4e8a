"""How many of the known modes of a data set a generator covers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.description import Mixture
from .evaluator import Totals


def mixture_totals(points: Tensor, mixture: Mixture) -> Totals:
    """Counts over points (B, 2): by mode, of those within three deviations of its centre (Lin et al. 2018)."""
    centres = torch.tensor(mixture.centres, dtype=torch.float64, device=points.device)
    distance, mode = torch.cdist(points.double(), centres).min(1)
    near = distance <= 3 * mixture.deviation
    return {
        "modes": torch.bincount(mode[near], minlength=len(centres)).double(),
        "nearest": torch.bincount(mode, minlength=len(centres)).double(),
    }


def report(totals: Totals) -> dict[str, float]:
    """Modes with a sample of high quality, the share of such samples, and KL(generated || uniform) in nats."""
    high, nearest = totals["modes"], totals["nearest"]
    shares = nearest / nearest.sum()
    return {
        "modes": float((high > 0).sum()),
        "high_quality": float(high.sum() / nearest.sum()),
        "reverse_kl": float(torch.xlogy(shares, shares * len(shares)).sum()),
    }
