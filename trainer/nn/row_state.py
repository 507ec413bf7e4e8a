"""State that belongs to the rows of the global batch, not to the network and not to a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..randomness import Draws


class RowState(nn.Module):
    """A tensor with an entry for each row of the global batch: the hidden state of a text, an image pool.

    A workload assigns one as it assigns a network. A rank holds the entries of its rows; a checkpoint gathers them
    along `axis`, and another world size cuts them again. Zero in the beginning, and in every evaluation.
    """

    value: Tensor

    def __init__(self, shape: Sequence[int], axis: int = 0, evaluated: bool = True) -> None:
        """`shape` is that of one row's entry; `axis` is where the rows are inserted. What only training reads is not
        `evaluated`, and then takes no memory in an evaluation."""
        super().__init__()
        self.shape, self.axis, self.evaluated = tuple(shape), axis, evaluated
        self.starts = [0]  # of each micro-batch among the rank's rows
        self.register_buffer("value", torch.zeros(0), persistent=False)

    def allocate(self, rows: Sequence[int], batch_size: int) -> None:
        """Zeros for so many rows in each micro-batch, of a global batch of that size."""
        self.starts = [sum(rows[:index]) for index in range(len(rows))]
        self.value = self.value.new_zeros(*self.shape[: self.axis], sum(rows), *self.shape[self.axis :])

    def _of(self, draws: Draws) -> Tensor:
        micro_batch = draws.micro_batch if len(self.starts) > 1 else 0
        return self.value.narrow(self.axis, self.starts[micro_batch], draws.rows.stop - draws.rows.start)

    def read(self, draws: Draws) -> Tensor:
        """The entries of the rows of this micro-batch, without a graph."""
        return self._of(draws).clone()

    def write(self, draws: Draws, value: Tensor) -> None:
        self._of(draws).copy_(value.detach())

    @contextlib.contextmanager
    def fresh(self, rows: int) -> Iterator[None]:
        """Zeros for so many rows, for an evaluation; then the entries of training again."""
        kept = self.value, self.starts
        self.allocate([rows] if self.evaluated or self.training else [], rows)
        try:
            yield
        finally:
            self.value, self.starts = kept


def row_states(network: nn.Module) -> dict[str, RowState]:
    """Those of a workload, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, RowState)}


@contextlib.contextmanager
def fresh_rows(network: nn.Module, rows: int) -> Iterator[None]:
    """Zeros for so many rows in all row states, whose entries of training come back afterwards."""
    with contextlib.ExitStack() as stack:
        for state in row_states(network).values():
            stack.enter_context(state.fresh(rows))
        yield
