"""Style transfer (Gatys, Ecker and Bethge 2016): the content of one image in the textures of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .layers import LayeredNetwork

ROUND = 20  # steps between two looks at the picture


@dataclass(frozen=True)
class Style:
    """What makes a picture that of a style, and how it is found."""

    style_layers: tuple[str, ...]
    content_layer: str
    style_weight: float = 1.0
    content_weight: float = 0.02
    tv: float = 0.03  # the weight of the total variation
    steps: int = 200
    optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    rate: float = 0.02  # Adam's only

    @property
    def layers(self) -> set[str]:
        return {*self.style_layers, self.content_layer}


class Losses(NamedTuple):
    """Each 0-d. The first two are relative: 0 where nothing differs, 1 against a picture that shows the layer nothing,
    so that the weights mean the same for any network."""

    style: Tensor  # squared distance of the Gram matrices, the mean over the layers
    content: Tensor  # squared distance of the activations
    tv: Tensor  # total variation: mean absolute difference of neighbouring pixels


def gram(activations: Tensor) -> Tensor:
    """(B, C, H, W) to the mean products of pairs of channels (B, C, C), which tell what there is and not where."""
    flat = activations.flatten(2)
    return flat @ flat.mT / flat.shape[2]


class Target:
    """The content of one image and the style of another, each (1, C, H, W) in [0, 1]."""

    def __init__(self, network: LayeredNetwork, content: Tensor, style: Tensor, wish: Style) -> None:
        self.network, self.wish = network, wish
        with torch.no_grad():
            self.content = network(content, [wish.content_layer])[wish.content_layer]
            self.grams = {name: gram(output) for name, output in network(style, wish.style_layers).items()}

    def losses(self, picture: Tensor) -> Losses:
        outputs = self.network(picture, self.wish.layers)
        style = [_distance(gram(outputs[name]), target) for name, target in self.grams.items()]
        content = _distance(outputs[self.wish.content_layer], self.content)
        tv = picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean()
        return Losses(torch.stack(style).mean(), content, tv)

    def loss(self, picture: Tensor) -> Tensor:
        losses, wish = self.losses(picture), self.wish
        return wish.style_weight * losses.style + wish.content_weight * losses.content + wish.tv * losses.tv


def _distance(value: Tensor, target: Tensor) -> Tensor:
    return (value - target).square().sum() / target.square().sum().clamp(min=1e-12)


def stylize(target: Target, start: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of steps so far and the picture (1, C, H, W) in [0, 1], after every round of steps."""
    wish = target.wish
    picture = start.clone(memory_format=torch.contiguous_format).requires_grad_()  # torch's L-BFGS wants it flat
    optimizer: Any  # torch leaves the step of L-BFGS untyped
    if wish.optimizer == "lbfgs":
        optimizer = torch.optim.LBFGS(
            [picture], max_eval=2 * ROUND, tolerance_grad=0, tolerance_change=0, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
    else:
        optimizer = torch.optim.Adam([picture], lr=wish.rate)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = target.loss(picture)
        loss.backward()
        return loss

    for first in range(0, wish.steps, ROUND):
        count = min(ROUND, wish.steps - first)
        if wish.optimizer == "lbfgs":  # whose step is a search of many
            optimizer.param_groups[0]["max_iter"] = count
            optimizer.step(closure)
        else:
            for _ in range(count):
                optimizer.step(closure)
        yield first + count, picture.detach().clamp(0, 1)
