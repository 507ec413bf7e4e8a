"""Which sample goes where: pure arithmetic, so that resuming needs one integer and ranks need not talk.

The stream of samples is epochs laid end to end, each a permutation of the data set; the k-th global batch is a slice of
that stream. Hence no partial batch and no dropped sample, and every sample comes exactly once an epoch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..randomness import permutation


def share(rows: int, rank: int, world: int, group: int = 1) -> slice:
    """This rank's rows of `rows`; shares differ by at most one group, and groups of rows stay together.

    What is left over behind the last whole group counts as a group; the last rank has it.
    """
    groups = -(-rows // group)
    first, last = (min(groups * r // world * group, rows) for r in (rank, rank + 1))
    return slice(first, last)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> Tensor:
    return permutation(seed, epoch, size)


@dataclass(frozen=True)
class BatchPlan:
    """Global batches of `batch_size` samples out of `size`, each cut into `accumulation` micro-batches."""

    seed: int
    size: int
    batch_size: int
    accumulation: int = 1
    group: int = 1

    def samples(self, k: int, count: int = 1) -> tuple[Tensor, Tensor]:
        """Sample ids and visit numbers (how often each was seen before) of batches k to k+count-1, int64."""
        start, stop = k * self.batch_size, (k + count) * self.batch_size
        ids, visits = [], []
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            first, last = max(start - epoch * self.size, 0), min(stop - epoch * self.size, self.size)
            ids.append(_order(self.seed, epoch, self.size)[first:last])
            visits.append(torch.full((last - first,), epoch))
        return torch.cat(ids), torch.cat(visits)

    @functools.cached_property
    def micro_batches(self) -> list[slice]:
        """Where each micro-batch lies in the global batch; the same for every world size."""
        return [share(self.batch_size, m, self.accumulation, self.group) for m in range(self.accumulation)]

    def rows(self, micro: int, rank: int, world: int) -> slice:
        """This rank's rows, counted within the micro-batch."""
        whole = self.micro_batches[micro]
        return share(whole.stop - whole.start, rank, world, self.group)
