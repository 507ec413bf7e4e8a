"""A picture comes near to the style of one image and the content of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from trainer.pixels.style import Style, Target, gram, stylize

from .test_layers import image, layered, small

READER = layered(small())
WISH = Style(("1", "4"), "4", steps=30, content_weight=0.1)


def stripes() -> Tensor:
    return (torch.arange(40) // 4 % 2).float().expand(1, 3, 24, 40).contiguous()


def last(wish: Style) -> tuple[Target, Tensor]:
    target = Target(READER, image(24, 40), stripes(), wish)
    return target, list(stylize(target, image(24, 40)))[-1][1]


def test_a_gram_matrix_holds_mean_products_of_channels() -> None:
    x = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    matrix = gram(x)
    assert matrix.shape == (1, 3, 3)
    assert float(matrix[0, 0, 2]) == pytest.approx(float((x[0, 0] * x[0, 2]).mean()), rel=1e-5)
    torch.testing.assert_close(gram(x.flip(3)), matrix)  # where things are does not count


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_style_comes_near_and_the_content_stays(optimizer: Literal["lbfgs", "adam"]) -> None:
    target, picture = last(replace(WISH, optimizer=optimizer))
    before, after = target.losses(image(24, 40)), target.losses(picture)
    assert after.style < 0.3 * before.style
    _, careless = last(replace(WISH, optimizer=optimizer, content_weight=0))
    assert after.content < 0.8 * target.losses(careless).content
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1


def test_the_losses_vanish_for_the_images_themselves() -> None:
    target = Target(READER, image(24, 40), stripes(), WISH)
    assert target.losses(image(24, 40)).content == 0
    assert target.losses(stripes()).style < 1e-10
    assert target.losses(torch.full((1, 3, 8, 8), 0.3)).tv == 0


def test_more_weight_on_the_variation_makes_it_smoother() -> None:
    variations = [float(target.losses(picture).tv) for target, picture in
                  (last(replace(WISH, tv=weight)) for weight in (0, 1))]  # fmt: skip
    assert variations[1] < 0.7 * variations[0]


def test_rounds_add_up_to_the_steps() -> None:
    target = Target(READER, image(24, 40), stripes(), replace(WISH, steps=25))
    assert [step for step, _ in stylize(target, image(24, 40))] == [20, 25]
