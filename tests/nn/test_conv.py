"""The convolution for gradient penalties has the derivatives of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.nn.conv import Conv2d, convolve

CASES = [(3, 1, 1, 1), (3, 1, 1, 2), (1, 1, 0, 1), (4, 2, 1, 4), (3, 2, 1, 1)]  # kernel, stride, padding, groups


def gradients(layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Of a loss with a penalty on the gradient with respect to x, as a discriminator has it."""
    x = x.clone().requires_grad_()
    y = layer(x).sigmoid()
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    loss = y.sum() + slope.square().sum()
    return list(torch.autograd.grad(loss, [x, *layer.parameters()]))


@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), CASES)
def test_the_gradients_of_a_penalty_are_those_of_torchs_convolution(
    kernel: int, stride: int, padding: int, groups: int
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 8, kernel, stride, padding, groups=groups, dtype=torch.float64)
    ours = Conv2d(4, 8, kernel, stride, padding, groups=groups, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    for mine, expected in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_fixed_kernel_gets_no_gradient() -> None:
    kernel, x = torch.ones(4, 1, 4, 4), torch.randn(2, 4, 6, 6, requires_grad=True)
    y = convolve(x, kernel, stride=2, padding=1, groups=4)
    y.square().sum().backward()
    assert kernel.grad is None
    assert x.grad is not None
    assert torch.equal(y, F.conv2d(x, kernel, stride=2, padding=1, groups=4))


def test_a_gradient_to_be_differentiated_is_never_one_of_the_weight_without_a_word() -> None:
    layer = Conv2d(1, 1, 3)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(layer(torch.ones(1, 1, 4, 4)).sum(), layer.weight, create_graph=True)


def test_autocast_reaches_both_derivatives() -> None:
    layer, x = Conv2d(4, 8, 3, padding=1, groups=2), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        low = gradients(layer, x)
    for rough, exact in zip(low, gradients(layer, x), strict=True):
        assert rough.dtype == torch.float32
        assert (rough - exact).norm() < 0.05 * exact.norm()
