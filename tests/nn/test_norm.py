"""BatchNorm over the global batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.distributed.runtime import Runtime
from trainer.nn.norm import SyncBatchNorm

from ..workers import on_ranks


def norm_gradients(runtime: Runtime, sizes: tuple[int, ...], axes: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output and input gradient of this rank's rows, and the norm's own state, gradients summed over ranks."""
    shape = (sum(sizes), 5, 4, 3)[: 2 + axes]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 100  # far from zero: cancellation would show
    wanted = torch.randn(shape, generator=generator, dtype=torch.float64)
    start = sum(sizes[: runtime.rank])
    rows = slice(0, sum(sizes)) if runtime.world == 1 else slice(start, start + sizes[runtime.rank])
    kind = SyncBatchNorm if runtime.world > 1 else (nn.BatchNorm1d if axes == 0 else nn.BatchNorm2d)
    norm = kind(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(5) + 0.5)
    mine = x[rows].requires_grad_(True)
    out = norm(mine)
    F.mse_loss(out, wanted[rows], reduction="sum").backward()
    assert mine.grad is not None
    state = {name: value.clone() for name, value in norm.named_buffers()}
    gradients = {name: p.grad.clone() for name, p in norm.named_parameters() if p.grad is not None}
    return out.detach(), mine.grad, {**state, **runtime.total(gradients)}


@pytest.mark.parametrize("axes", [0, 2])
@pytest.mark.parametrize("sizes", [(6, 6), (7, 2, 3)])
def test_batch_norm_over_ranks_is_batch_norm_over_the_global_batch(sizes: tuple[int, ...], axes: int) -> None:
    ((out, grad, state),) = on_ranks(1, norm_gradients, sizes, axes)
    several = on_ranks(len(sizes), norm_gradients, sizes, axes)
    torch.testing.assert_close(torch.cat([part[0] for part in several]), out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([part[1] for part in several]), grad, rtol=1e-9, atol=1e-9)
    for _, _, rank_state in several:
        for name, value in state.items():
            torch.testing.assert_close(rank_state[name], value, rtol=1e-9, atol=1e-9)
