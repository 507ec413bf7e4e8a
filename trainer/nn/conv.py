"""A convolution whose gradient with respect to its input is as cheap to differentiate as itself.

Penalties on a discriminator's gradient need that. torch's own second derivative convolves with a kernel as large as the
image, and once for every group; but it is two convolutions of the ordinary kind, as the first derivative is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0,
             groups: int = 1) -> Tensor:  # fmt: skip
    """F.conv2d of x (B, C, H, W). A gradient that is to be differentiated (create_graph) is one of x alone."""
    if not torch.is_grad_enabled():
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)
    if torch.is_autocast_enabled(x.device.type):  # which does not reach into the functions below
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    convolved: Tensor = _Convolve.apply(x, weight, bias, stride, padding, groups)
    return convolved


class Conv2d(nn.Conv2d):
    """nn.Conv2d of this kind, for square kernels, strides and paddings without dilation."""

    def forward(self, input: Tensor) -> Tensor:
        stride, padding = self.stride[0], int(self.padding[0])
        return convolve(input, self.weight, self.bias, stride, padding, self.groups)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int,
                groups: int) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding, groups
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _InputGradient.apply(gradient, weight, x.detach(), *ctx.how), *[None] * 5
        return *_gradients(gradient, x, weight, ctx.how, ctx.needs_input_grad[:3]), *[None] * 3


class _InputGradient(torch.autograd.Function):
    """Of a convolution; linear in the output's gradient and in the weight. Of x it needs the shape alone."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, x: Tensor, *how: int) -> Tensor | None:
        ctx.save_for_backward(gradient, weight)
        ctx.how = how
        return _gradients(gradient, x, weight, how, (True, False, False))[0]

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        stride, padding, groups = ctx.how
        of_gradient = F.conv2d(second, weight, None, stride, padding, 1, groups) if ctx.needs_input_grad[0] else None
        of_weight = _gradients(gradient, second, weight, ctx.how, (False, ctx.needs_input_grad[1], False))[1]
        return of_gradient, of_weight, *[None] * 4


def _gradients(gradient: Tensor, x: Tensor, weight: Tensor, how: tuple[int, ...],
               wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of a convolution's input, weight and bias, as far as they are wanted."""
    stride, padding, groups = how
    gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, wanted
    )
    return gradients
