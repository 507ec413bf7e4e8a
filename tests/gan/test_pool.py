"""The history of fakes: what comes out of it, and that it is the same on any number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from trainer.data.plan import share
from trainer.gan.pool import ImagePool
from trainer.randomness import Draws


def draws(step: int, rows: slice, micro_batch: int = 0) -> Draws:
    return Draws(0, (step, "discriminators", 0, micro_batch), rows, torch.device("cpu"))


def fakes(step: int, rows: slice, batch: int) -> Tensor:
    """Each of a number of its own."""
    numbers = torch.arange(rows.start, rows.stop) + step * batch
    return numbers.float()[:, None, None, None].repeat(1, 1, 2, 2)


def exchanged(size: int, batch: int, steps: int, rank: int = 0, world: int = 1) -> tuple[Tensor, ImagePool]:
    """The numbers of what a rank's rows trained on, (steps, rows)."""
    pool, rows = ImagePool(size, (1, 2, 2)), share(batch, rank, world)
    pool.allocate([rows.stop - rows.start], batch)
    seen = [pool.exchange(fakes(step, rows, batch), draws(step, rows), "a")[:, 0, 0, 0] for step in range(steps)]
    return torch.stack(seen) if seen else torch.zeros(0), pool


@pytest.mark.parametrize(("size", "batch", "entries"), [(50, 1, 50), (50, 16, 4), (10, 16, 1), (48, 16, 3)])
def test_the_rows_of_a_batch_share_a_pool_of_about_its_size(size: int, batch: int, entries: int) -> None:
    assert exchanged(size, batch, 0)[1].value.shape == (batch, entries, 4)


def test_fakes_pass_while_the_pool_fills_and_then_half_of_them_wait_in_it() -> None:
    seen = exchanged(size=20, batch=1, steps=2000)[0].flatten()
    assert seen[:20].tolist() == list(range(20))
    late = seen[20:]
    age = torch.arange(20, 2000) - late
    assert (age == 0).double().mean() == pytest.approx(0.5, abs=0.03)
    assert age[age > 0].double().mean() == pytest.approx(40, rel=0.15)  # 20 places, each taken every 40 steps
    assert max(Counter(late.tolist()).values()) == 1  # none twice, but for those of the beginning, which had passed


@pytest.mark.parametrize("world", [2, 3])
def test_each_row_has_its_own_fakes_on_any_number_of_ranks(world: int) -> None:
    whole, _ = exchanged(size=9, batch=5, steps=30)
    assert torch.equal(torch.cat([exchanged(9, 5, 30, rank, world)[0] for rank in range(world)], 1), whole)
    assert torch.equal(whole % 5, torch.arange(5.0).expand(30, 5))
    places = [(whole[step] != torch.arange(5.0) + 5 * step).tolist() for step in range(2, 30)]
    assert any(any(row) and not all(row) for row in places)  # rows decide by themselves


def test_an_evaluation_takes_no_memory_for_it_and_leaves_it_as_it_is() -> None:
    _, pool = exchanged(size=9, batch=5, steps=4)
    before = pool.value.clone()
    with pool.eval().fresh(500):
        assert pool.value.numel() == 0
    with pool.train().fresh(6):  # as a trial of a training step does
        assert pool.value.shape == (6, 2, 4)
    assert torch.equal(pool.value, before)
    seen = pool.exchange(fakes(4, slice(0, 5), 5), draws(4, slice(0, 5)), "a")
    assert (seen[:, 0, 0, 0] != torch.arange(5.0) + 20).any()
