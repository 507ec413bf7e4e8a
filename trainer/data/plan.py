"""Which sample goes where: pure arithmetic, so that resuming needs one integer and ranks need not talk.

The stream of samples is epochs laid end to end, each a permutation of the data set; the k-th global batch is a slice of
that stream. Hence no partial batch and no dropped sample, and every sample comes exactly once an epoch. A text is read
in order instead.
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


@functools.lru_cache(maxsize=4)
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

    def evaluation_batches(self, size: int, rows: int, rank: int, world: int) -> list[tuple[Tensor, slice]]:
        """The ids 0..size-1 in batches of `rows`, and this rank's part of each, which may be empty.

        Each comes as the rank's ids and where they lie in the order of the whole evaluation.
        """
        batches = []
        for start in range(0, size, rows):
            own = share(min(rows, size - start), rank, world)
            span = slice(start + own.start, start + own.stop)
            batches.append((torch.arange(span.start, span.stop), span))
        return batches

    @functools.cached_property
    def micro_batches(self) -> list[slice]:
        """Where each micro-batch lies in the global batch; the same for every world size."""
        return [share(self.batch_size, m, self.accumulation, self.group) for m in range(self.accumulation)]

    def rows(self, micro: int, rank: int, world: int) -> slice:
        """This rank's rows, counted within the micro-batch."""
        whole = self.micro_batches[micro]
        return share(whole.stop - whole.start, rank, world, self.group)

    def rank_rows(self, rank: int, world: int) -> Tensor:
        """This rank's rows of the global batch, int64, micro-batch after micro-batch."""
        own = [(whole.start, self.rows(m, rank, world)) for m, whole in enumerate(self.micro_batches)]
        return torch.cat([torch.arange(start + rows.start, start + rows.stop) for start, rows in own])


@dataclass(frozen=True)
class StreamPlan(BatchPlan):
    """Each row of the batch reads its own part of the data set in order: windows of a text, with a carried state.

    In the next epoch a row continues with its neighbour's part, where its own ends. Samples behind the last
    whole part are not trained on. `size` is that of an epoch, a multiple of `batch_size`.
    """

    def samples(self, k: int, count: int = 1) -> tuple[Tensor, Tensor]:
        length = self.size // self.batch_size
        batches = torch.arange(k, k + count)[:, None]
        parts = (torch.arange(self.batch_size)[None] + batches // length) % self.batch_size
        ids = parts * length + batches % length
        return ids.flatten(), (batches // length).expand_as(ids).flatten()

    def evaluation_batches(self, size: int, rows: int, rank: int, world: int) -> list[tuple[Tensor, slice]]:
        """Consecutive samples in one row here too. The last row has what remains, and may end earlier."""
        rows = min(rows, size)
        length = -(-size // rows)
        rows = -(-size // length)  # of so many samples each, the last of what is left
        own, batches, start = share(rows, rank, world), [], 0
        for k in range(length):
            alive = rows if (rows - 1) * length + k < size else rows - 1
            first, last = min(own.start, alive), min(own.stop, alive)
            batches.append((torch.arange(first, last) * length + k, slice(start + first, start + last)))
            start += alive
        return batches
