"""Randomness: published reference values, sane numbers, and draws that do not depend on the split over ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.randomness import BLOCK, Draws, key, permutation, splitmix64, uniforms

CPU = torch.device("cpu")
GAMMA = 0x9E3779B97F4A7C15


def signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def reference(state: int) -> int:
    """SplitMix64's output for a state, in Python's integers; after Vigna's splitmix64.c."""
    z = (state + GAMMA) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def draws(rows: slice, seed: int = 0, scope: tuple[object, ...] = (0, "phase", 0, 0)) -> Draws:
    return Draws(seed, scope, rows, CPU)


def test_splitmix64_gives_the_published_sequence_of_seed_zero() -> None:
    states = torch.tensor([signed(k * GAMMA) for k in range(3)])
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(states).tolist() == [signed(value) for value in published]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_splitmix64_agrees_with_pythons_integers(states: list[int]) -> None:
    hashed = splitmix64(torch.tensor([signed(state) for state in states]))
    assert hashed.tolist() == [signed(reference(state)) for state in states]


def test_a_key_depends_on_every_part_and_on_their_order() -> None:
    keys = {key("a", 1), key(1, "a"), key("a", 1, 0), key("a1"), key("a", 2), key("a", "", 1), key("a", 11)}
    assert len(keys) == 7
    assert all(0 <= value < 2**63 for value in keys)
    assert key("seed", 0) == 8084628605208892704  # frozen: runs are resumed with it


@pytest.mark.parametrize("size", [1, 2, 3, 1797, 60000])
def test_a_permutation_holds_every_id_once(size: int) -> None:
    assert permutation(3, 5, size).sort().values.equal(torch.arange(size))


def test_a_permutation_mixes_well() -> None:
    order = permutation(0, 0, 60000).double()
    correlation = torch.corrcoef(torch.stack([order, torch.arange(60000).double()]))[0, 1]
    following = torch.corrcoef(torch.stack([order[1:], order[:-1]]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(60000)
    assert abs(float(following)) < 4 / math.sqrt(60000)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    count = 20000
    values = uniforms(0, torch.arange(count), torch.zeros(count, dtype=torch.int64), "crop", 8)
    assert values.dtype == torch.float64
    assert values.shape == (count, 8)
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    error = 5 / math.sqrt(count)  # five standard errors of a column
    assert (values.mean(0) - 0.5).abs().max() < error * math.sqrt(1 / 12)
    assert (values.var(0) - 1 / 12).abs().max() < error / 12
    assert (torch.corrcoef(values.T) - torch.eye(8)).abs().max() < error


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(0, 1000), st.integers(0, 2**31 - 1))
def test_a_samples_uniforms_do_not_depend_on_the_rest_of_its_batch(ids: list[int], visit: int, seed: int) -> None:
    numbers = torch.tensor(ids)
    visits = torch.full_like(numbers, visit)
    together = uniforms(seed, numbers, visits, "augment", 8)
    alone = [uniforms(seed, numbers[i : i + 1], visits[i : i + 1], "augment", 8) for i in range(len(ids))]
    assert together.equal(torch.cat(alone))
    assert together[:, :3].equal(uniforms(seed, numbers, visits, "augment", 3))


def test_uniforms_change_with_the_seed_the_sample_the_visit_the_name_and_the_column() -> None:
    def one(seed: int = 0, sample: int = 0, visit: int = 0, name: str = "a") -> list[float]:
        return uniforms(seed, torch.tensor([sample]), torch.tensor([visit]), name, 2)[0].tolist()

    values = one() + one(seed=1) + one(sample=1) + one(visit=1) + one(name="b") + one(sample=1, visit=1)
    assert len(set(values)) == 12


def all_kinds(source: Draws, shape: tuple[int, ...]) -> list[Tensor]:
    return [source.normal("z", shape), source.uniform("u", shape), source.integers("i", 10, shape)]


@settings(max_examples=60)
@given(st.integers(1, 3 * BLOCK + 5), st.lists(st.integers(0, 3 * BLOCK + 5), max_size=4), st.integers(0, 100))
def test_rows_of_any_split_over_ranks_make_up_the_draw_of_one_rank(rows: int, cuts: list[int], seed: int) -> None:
    bounds = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    shares = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    shares.append(slice(rows, rows))  # a rank without rows
    whole = all_kinds(draws(slice(0, rows), seed), (2, 3))
    parts = [all_kinds(draws(cut, seed), (2, 3)) for cut in shares]
    for kind, expected in enumerate(whole):
        assert expected.shape == (rows, 2, 3)
        assert torch.cat([part[kind] for part in parts]).equal(expected)


def test_draws_are_distributed_as_they_say() -> None:
    source = draws(slice(0, 4096))
    normal, uniform, integers = source.normal("z", [8]), source.uniform("u", [8]), source.integers("i", 10, [8])
    error = 5 / math.sqrt(normal.numel())
    assert abs(float(normal.mean())) < error
    assert abs(float(normal.std()) - 1) < error
    assert abs(float(uniform.mean()) - 0.5) < error * 0.3
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert integers.dtype == torch.int64
    assert (torch.bincount(integers.flatten(), minlength=10) / integers.numel() - 0.1).abs().max() < error
    assert normal[:BLOCK].ne(normal[BLOCK : 2 * BLOCK]).all()  # blocks do not repeat each other
    assert source.integers("label", 10).shape == (4096,)


def test_draws_follow_the_precision() -> None:
    exact = Draws(0, (0,), slice(0, 5), CPU, torch.float64)
    assert exact.normal("z", [3]).dtype == exact.uniform("z", [3]).dtype == torch.float64


def test_draws_differ_by_name_step_phase_time_micro_batch_and_seed_and_repeat_otherwise() -> None:
    rows = slice(0, 4)
    scopes: list[tuple[object, ...]] = [
        (0, "critic", 0, 0), (1, "critic", 0, 0), (0, "generator", 0, 0), (0, "critic", 1, 0), (0, "critic", 0, 1),
    ]  # fmt: skip
    values = [draws(rows, 0, scope).normal("z", [2]) for scope in scopes]
    values += [draws(rows, 0, scopes[0]).normal("mask", [2]), draws(rows, 1, scopes[0]).normal("z", [2])]
    assert len({tuple(value.flatten().tolist()) for value in values}) == 7
    assert draws(rows, 0, scopes[0]).normal("z", [2]).equal(values[0])


def test_shared_is_the_same_on_every_rank_and_differs_by_name_and_step() -> None:
    ranks = [draws(slice(start, start + 5)).shared("mix").random() for start in (0, 5, 500)]
    assert len(set(ranks)) == 1
    others = [draws(slice(0, 5)).shared("other"), draws(slice(0, 5), scope=(1, "phase", 0, 0)).shared("mix")]
    assert len({ranks[0], *(other.random() for other in others)}) == 3


def test_drawing_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    all_kinds(draws(slice(0, 100)), (2,))
    assert torch.get_rng_state().equal(before)
