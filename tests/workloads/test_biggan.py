"""BigGAN's orthogonal regularisation is the paper's, also where it takes the cheaper way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.workloads.biggan import orthogonal_penalty


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 40), (40, 3), (8, 8)])
def test_the_regularisation_and_its_gradient_are_those_of_the_definition(inputs: int, outputs: int) -> None:
    layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    penalty = orthogonal_penalty(nn.Sequential(layer, nn.Embedding(5, 4)))
    weight = layer.weight.detach().requires_grad_()
    expected = ((weight @ weight.t()) * (1 - torch.eye(outputs))).square().sum()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, layer.weight), torch.autograd.grad(expected, weight))


def test_orthogonal_rows_cost_nothing() -> None:
    layer = nn.Conv2d(4, 8, 3)
    nn.init.orthogonal_(layer.weight)
    assert orthogonal_penalty(layer).item() < 1e-9
