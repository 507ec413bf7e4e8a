"""Order: epochs are permutations laid end to end, shares partition every micro-batch, nothing depends on ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.plan import BatchPlan, share


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    batch_size = draw(st.integers(1, 40))
    return BatchPlan(
        seed=draw(st.integers(0, 2**31 - 1)), size=draw(st.integers(1, 60)), batch_size=batch_size,
        accumulation=draw(st.integers(1, batch_size)), group=draw(st.integers(1, 4)),
    )  # fmt: skip


def stream(plan: BatchPlan, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, visits = zip(*(plan.samples(k) for k in range(batches)), strict=True)
    return torch.cat(ids), torch.cat(visits)


@given(plans())
def test_epochs_are_permutations_laid_end_to_end(plan: BatchPlan) -> None:
    batches = -(-3 * plan.size // plan.batch_size)
    ids, visits = stream(plan, batches)
    assert len(ids) == len(visits) == batches * plan.batch_size
    for epoch in range(3):
        part = slice(epoch * plan.size, (epoch + 1) * plan.size)
        assert sorted(ids[part].tolist()) == list(range(plan.size))
        assert visits[part].tolist() == [epoch] * plan.size


@given(plans(), st.integers(0, 1000))
def test_a_batch_is_a_function_of_its_number_alone(plan: BatchPlan, k: int) -> None:
    fresh = BatchPlan(plan.seed, plan.size, plan.batch_size, accumulation=1, group=1)
    for mine, other in zip(plan.samples(k), fresh.samples(k), strict=True):
        assert mine.dtype == torch.int64
        assert mine.tolist() == other.tolist()


@given(plans(), st.integers(1, 9))
def test_the_ranks_shares_partition_every_micro_batch_and_keep_groups_together(plan: BatchPlan, world: int) -> None:
    assert [row for cut in plan.micro_batches for row in range(cut.start, cut.stop)] == list(range(plan.batch_size))
    for micro, cut in enumerate(plan.micro_batches):
        shares = [plan.rows(micro, rank, world) for rank in range(world)]
        length = cut.stop - cut.start
        assert [row for rows in shares for row in range(rows.start, rows.stop)] == list(range(length))
        assert all(rows.start % plan.group == 0 or rows.start == length for rows in shares)
        assert cut.start % plan.group == 0 or cut.start == plan.batch_size


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 5))
def test_shares_differ_by_one_group_at_most(rows: int, world: int, group: int) -> None:
    lengths = [cut.stop - cut.start for cut in (share(rows, rank, world, group) for rank in range(world))]
    assert sum(lengths) == rows
    assert max(lengths) - min(lengths) <= group


def test_seven_rows_in_pairs_are_shared_by_two_ranks_as_four_and_three() -> None:
    assert [share(7, rank, 2, group=2) for rank in range(2)] == [slice(0, 4), slice(4, 7)]


def test_order_differs_from_epoch_to_epoch_and_from_seed_to_seed() -> None:
    epochs = [tuple(BatchPlan(seed, 100, 100).samples(k)[0].tolist()) for seed in (0, 1) for k in range(3)]
    assert len(set(epochs)) == 6


def test_the_order_of_a_seed_never_changes() -> None:
    # Resuming a run with a newer version of this code or of torch relies on it.
    assert BatchPlan(seed=0, size=10, batch_size=10).samples(0)[0].tolist() == [4, 0, 9, 2, 8, 6, 5, 3, 1, 7]
    assert BatchPlan(seed=7, size=10, batch_size=10).samples(3)[0].tolist() == [2, 6, 8, 5, 9, 1, 3, 0, 4, 7]


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_batch_may_be_larger_than_the_data_set(size: int) -> None:
    ids, visits = BatchPlan(seed=0, size=size, batch_size=2 * size + 1).samples(0)
    assert torch.bincount(ids, minlength=size).max() == 3
    assert visits.tolist() == [0] * size + [1] * size + [2]
