"""Deep dream (Mordvintsev, Olah and Tyka 2015): an image is changed until a layer sees more of what it looks for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import key
from .layers import LayeredNetwork


@dataclass(frozen=True)
class Dream:
    """What is dreamt of, and how."""

    layer: str
    channel: int | None = None  # of the layer: its mean is raised; None: the root mean square over all channels
    octaves: int = 4
    octave_scale: float = 1.4
    steps: int = 20  # in each octave
    rate: float = 0.004  # mean change of a pixel in a step; pixels are in [0, 1]
    jitter: int = 16  # pixels that the image is shifted by at most, so that the strides of the network do not show
    seed: int = 0  # of the jitter

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Heights and widths of the octaves, the smallest first."""
        scales = [self.octave_scale**-octave for octave in reversed(range(self.octaves))]
        return [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in scales]

    def objective(self, network: LayeredNetwork, image: Tensor) -> Tensor:
        output = network(image, [self.layer])[self.layer]
        return output.square().mean().sqrt() if self.channel is None else output[:, self.channel].mean()


def dream(network: LayeredNetwork, image: Tensor, wish: Dream) -> Iterator[Tensor]:
    """The image (1, C, H, W) in [0, 1] after each octave, at the octave's size, which ends with the image's own.

    What the ascent has added at one size is enlarged and added to the image at the next, as in the original.
    """
    added = torch.zeros_like(image)
    chance = random.Random(key(wish.seed, "jitter"))
    for size in wish.sizes(*image.shape[2:]):
        base = F.interpolate(image, size, mode="bilinear", antialias=True)
        pixels = (base + F.interpolate(added, size, mode="bilinear", antialias=True)).clamp(0, 1)
        for _ in range(wish.steps):
            down, right = (chance.randint(-wish.jitter, wish.jitter) for _ in size)
            shifted = pixels.roll((down, right), (2, 3)).requires_grad_()
            (gradient,) = torch.autograd.grad(wish.objective(network, shifted), shifted)
            step = wish.rate * gradient / gradient.abs().mean().clamp(min=1e-12)  # zero where a channel is silent
            pixels = (shifted.detach() + step).clamp(0, 1).roll((-down, -right), (2, 3))
        added = pixels - base
        yield pixels
