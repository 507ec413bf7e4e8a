"""Dropout and stochastic depth from draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.nn.dropout import drawing, use_draws
from trainer.randomness import Draws


def draws(step: int = 0, rows: slice = slice(0, 4)) -> Draws:
    return Draws(0, (step, "classify", 0, 0), rows, torch.device("cpu"))


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_keeps_the_mean_and_is_the_same_for_any_split_of_the_batch(kind: type[nn.Module]) -> None:
    network = use_draws(nn.Sequential(kind(0.25))).train()
    x = torch.ones(96, 8, 5, 5)
    with drawing(network, draws(rows=slice(0, 96))):
        whole = network(x)
    parts = []
    for rows in (slice(0, 33), slice(33, 70), slice(70, 96)):
        with drawing(network, draws(rows=rows)):
            parts.append(network(x[rows]))
    assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(float(whole.mean()) - 1) < 0.05
    if kind is nn.Dropout2d:
        assert torch.equal(whole, whole[:, :, :1, :1].expand_as(whole))
    assert torch.equal(network.eval()(x), x)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_drops_whole_rows_or_the_whole_batch(mode: str) -> None:
    from torchvision.ops import StochasticDepth

    network = use_draws(nn.Sequential(StochasticDepth(0.5, mode))).train()
    unique_values = set()
    for step in range(20):
        with drawing(network, draws(step, slice(0, 64))):
            out = network(torch.ones(64, 3, 2, 2))
        rows = out.flatten(1)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        values = rows[:, 0]
        if mode == "batch":
            assert len(values.unique()) == 1
        unique_values |= set(values.tolist())
    assert unique_values == {0.0, 2.0}


def test_two_dropouts_of_a_network_have_masks_of_their_own() -> None:
    network = use_draws(nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))).train()
    with drawing(network, draws()):
        first, second = network[0](torch.ones(4, 99)), network[1](torch.ones(4, 99))  # type: ignore[index]
    assert not torch.equal(first, second)


def test_a_dropout_without_draws_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError, match="drawing"):
        use_draws(nn.Sequential(nn.Dropout(0.5))).train()(torch.ones(1, 2))
