"""Deep dream raises what it is to raise, and changes nothing more than it has to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.pixels.dream import Dream, dream

from .test_layers import image, layered, small

READER = layered(small())


def last(wish: Dream, start: Tensor) -> Tensor:
    return list(dream(READER, start, wish))[-1]


@pytest.mark.parametrize(("layer", "channel"), [("1", None), ("3", None), ("4", 2)])
def test_the_activation_rises(layer: str, channel: int | None) -> None:
    start = image(48, 64)
    wish = Dream(layer, channel, octaves=2, steps=10, rate=0.01, jitter=4)
    assert wish.objective(READER, last(wish, start)) > 1.5 * wish.objective(READER, start)


def test_a_class_rises_where_the_image_has_the_networks_size() -> None:
    wish = Dream("6", 3, octaves=1, steps=10, rate=0.01, jitter=0)
    picture = last(wish, image())
    assert wish.objective(READER, picture) > wish.objective(READER, image()) + 0.3


def test_octaves_grow_to_the_size_of_the_image() -> None:
    wish = Dream("1", octaves=3, octave_scale=2, steps=1)
    assert [picture.shape for picture in dream(READER, image(40, 64), wish)] == [
        (1, 3, 10, 16), (1, 3, 20, 32), (1, 3, 40, 64),
    ]  # fmt: skip


def test_a_step_changes_pixels_by_the_rate_on_average() -> None:
    start = 0.4 + 0.2 * image()  # far from black and white
    change = last(Dream("1", octaves=1, steps=1, rate=0.003), start) - start
    assert float(change.abs().mean()) == pytest.approx(0.003, rel=1e-3)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another_one() -> None:
    wishes = [Dream("3", octaves=2, steps=3, seed=seed) for seed in (0, 0, 1)]
    first, second, other = (last(wish, image()) for wish in wishes)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
