"""The moving average of a network's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.nn.average import WeightAverage


def test_the_average_follows_its_formula_and_copies_the_buffers() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    with torch.no_grad():
        network[0].weight.fill_(0.0)  # type: ignore[operator, union-attr]
    average = WeightAverage(network, 0.5)
    expected = 0.0
    for step in range(1, 20):
        with torch.no_grad():
            network[0].weight.fill_(float(step))  # type: ignore[operator, union-attr]
        network[1].running_mean.fill_(-step)  # type: ignore[operator, union-attr]
        average.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.module[0].weight) == pytest.approx(expected, rel=1e-6)  # type: ignore[index, arg-type]
        assert float(average.module[1].running_mean) == -step  # type: ignore[index, arg-type]
    assert not any(p.requires_grad for p in average.parameters())
