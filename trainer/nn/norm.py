"""BatchNorm over the global batch: Ioffe and Szegedy 2015, with statistics summed over all ranks; other norms by name.

nn.SyncBatchNorm runs on accelerators only; on the CPU this one takes its place. It reduces sums and counts, so uneven
shares of a batch stay right. Neither can be differentiated twice: critics with a gradient penalty use other norms.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Norm = Literal["batch", "instance"]


def normalisation(norm: Norm, channels: int) -> nn.Module:
    """BatchNorm, or InstanceNorm (Ulyanov et al. 2016): as BatchNorm, with statistics of each image by itself."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels, affine=True)


class _Normalise(torch.autograd.Function):
    """Batch norm in training over all ranks; one small all-reduce each way.

    Means and squared deviations of the ranks are merged as in Chan, Golub and LeVeque 1983, which loses no digits to
    cancellation. Gradients of weight and bias are the local ones, since DDP adds them up.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        shape = _channels(x)
        wide = x if x.dtype == torch.float64 else x.float()
        # Not torch.var_mean, which takes eight times as long over the axes of channels_last images on a CPU.
        _, mean, inverse = torch.native_batch_norm(wide, None, None, None, None, True, 0.0, eps)
        variance = (inverse.pow(-2) - eps).clamp_min(0)
        rows = mean.new_zeros(dist.get_world_size(), 2 * len(mean) + 1)
        rows[dist.get_rank()] = torch.cat([mean, variance, mean.new_tensor([x.numel() / len(mean)])])
        dist.all_reduce(rows)  # each rank fills its own row: a gather that every backend has
        means, variances, counts = torch.split(rows, [len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        inverse = torch.rsqrt(variance + eps)
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        out = torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        x, weight, mean, inverse, count = ctx.saved_tensors
        shape = _channels(x)
        grad, wide = grad.to(mean.dtype), x.to(mean.dtype)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, wide, None, None, None, mean, inverse, True, ctx.eps, [False, True, True]
        )
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        sums /= count
        scale = inverse if weight is None else inverse * weight
        offset, slope = torch.split(sums, len(mean))
        slope = scale * inverse * slope
        offset = scale * offset - slope * mean
        grad_x = torch.addcmul(-offset.view(shape), wide, -slope.view(shape)).addcmul_(grad, scale.view(shape))
        affine = (None, None) if weight is None else (grad_weight, grad_bias)
        return grad_x.to(x.dtype), *affine, None


def _channels(x: Tensor) -> list[int]:
    """The shape that lines a channel vector up with `x`."""
    return [1, x.shape[1]] + [1] * (x.dim() - 2)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d/2d/3d whose training statistics are those of the rows of all ranks."""

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2, "expected (B, C, ...)"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        out, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        return out


def convert_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm below `module` in place; parameters and buffers stay the same objects."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            sync = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            sync.weight, sync.bias = child.weight, child.bias
            for key, buffer in child.named_buffers(recurse=False):
                setattr(sync, key, buffer)
            sync.train(child.training)
            setattr(module, name, sync)
        else:
            convert_batch_norm(child)
