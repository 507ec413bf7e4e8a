"""DiffAugment: its choices are a sample's own, and gradients pass through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.gan.diff_augment import diff_augment
from trainer.randomness import Draws

POLICIES = ("color", "translation", "cutout")


def draws(rows: slice = slice(0, 12), step: int = 3) -> Draws:
    return Draws(0, (step, "discriminator", 0, 0), rows, torch.device("cpu"), torch.float64)


def images(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("policy", POLICIES)
def test_any_split_over_ranks_gives_the_same_images(policy: str) -> None:
    whole = diff_augment(images(), (policy,), draws(), "real")
    parts = [diff_augment(images()[rows], (policy,), draws(rows), "real") for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, images())


@pytest.mark.parametrize("policy", POLICIES)
def test_choices_differ_by_name_and_step(policy: str) -> None:
    real = diff_augment(images(), (policy,), draws(), "real")
    assert not torch.equal(diff_augment(images(), (policy,), draws(), "fake"), real)
    assert not torch.equal(diff_augment(images(), (policy,), draws(step=4), "real"), real)


def test_gradients_pass_through_all_policies_together() -> None:
    x = images().requires_grad_()
    diff_augment(x, POLICIES, draws(), "real").square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()


def test_a_translation_moves_by_an_eighth_at_most_and_pads_with_zeros() -> None:
    ones = torch.ones(64, 1, 16, 16, dtype=torch.float64)
    moved = diff_augment(ones, ("translation",), draws(slice(0, 64)), "real")
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert moved.sum((1, 2, 3)).min() >= 14 * 14


def test_a_cutout_is_at_most_a_quarter_of_the_image() -> None:
    ones = torch.ones(64, 1, 16, 16, dtype=torch.float64)
    hidden = (diff_augment(ones, ("cutout",), draws(slice(0, 64)), "real") == 0).sum((1, 2, 3))
    assert hidden.max() == 8 * 8
