"""Adaptive discriminator augmentation (ADA, Karras et al. 2020): what the discriminator sees is moved and recoloured
with a probability p, small enough that the generator learns none of it.

The paper's pixel blitting, geometric and colour transformations. All movements of a sample are one affine map and one
bilinear lookup; the paper's wavelet filter against aliasing is left out, so strong shrinking may alias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import Draws

REACH = 1 / 8  # of a translation, as a share of the image's side
SCALE, STRETCH, SHIFT = 0.2, 0.2, 1 / 8  # deviations: octaves, octaves, sides
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0  # deviations: on a scale of -1 to 1, octaves, octaves


def augment(images: Tensor, p: Tensor | float, draws: Draws, name: str) -> Tensor:
    """(B, C, H, W) in [-1, 1], square, grey or in colour; each operation with probability p in [0, 1] per sample.

    Gradients with respect to the images pass through, twice where a penalty needs it. In full precision. The random
    choices are those of `name`: real and fake images have one each.
    """
    chances = _Chances(p, draws, f"{name}/ada")
    with torch.autocast(images.device.type, enabled=False):  # coordinates in bf16 would be off by pixels
        return _recolour(_move(images.to(draws.dtype), chances), chances)


class _Chances:
    """What happens to each sample: a value where an operation takes place, 0 where it does not."""

    def __init__(self, p: Tensor | float, draws: Draws, name: str) -> None:
        self.p, self.draws, self.name = p, draws, name

    def uniform(
        self, operation: str, low: float, high: float, count: int = 1, p: Tensor | float | None = None
    ) -> Tensor:
        """(B, count) in [low, high), or 0."""
        values = low + (high - low) * self.draws.uniform(f"{self.name}/{operation}", (count,))
        return self._where(operation, values, self.p if p is None else p)

    def whole(self, operation: str, low: int, high: int, count: int = 1) -> Tensor:
        """(B, count) of low, ..., high - 1, or 0."""
        return self.uniform(operation, low, high, count).floor()

    def normal(self, operation: str, deviation: float, count: int = 1) -> Tensor:
        """(B, count) around 0, or 0."""
        return self._where(operation, deviation * self.draws.normal(f"{self.name}/{operation}", (count,)), self.p)

    def _where(self, operation: str, values: Tensor, p: Tensor | float) -> Tensor:
        return torch.where(self.draws.uniform(f"{self.name}/{operation}/chance", (1,)) < p, values, 0.0)


def _move(images: Tensor, chances: _Chances) -> Tensor:
    """Where each pixel comes from is `blit (warp (x + shift) + jump)`, with x from -1 to 1.

    Every operation's inverse is as likely as itself, so that the order alone is that of the paper read backwards.
    """
    size = images.shape[-1]
    flip, quarters = 1 - 2 * chances.whole("flip", 0, 2), chances.whole("quarters", 0, 4)
    blit = _scaling(flip, torch.ones_like(flip)) @ _rotation(quarters * (math.pi / 2))
    reach = round(REACH * size)
    jump = chances.whole("translation", -reach, reach + 1, 2) * (2 / size)
    scale, stretch = chances.normal("scale", SCALE).exp2(), chances.normal("stretch", STRETCH).exp2()
    once = 1 - (1 - chances.p) ** 0.5  # so that one of two rotations takes place with probability p
    first, second = (_rotation(chances.uniform(f"rotation/{i}", -math.pi, math.pi, p=once)) for i in "12")
    warp = first @ _scaling(scale * stretch, scale / stretch) @ second
    shift = warp @ chances.normal("shift", 2 * SHIFT, 2)[:, :, None] + jump[:, :, None]
    grid = F.affine_grid(torch.cat([blit @ warp, blit @ shift], 2), list(images.shape), align_corners=False)
    moved: Tensor = _Lookup.apply(images, grid)
    return moved


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    """(B, 1) each to (B, 2, 2)."""
    return torch.diag_embed(torch.cat([x, y], 1))


def _rotation(angle: Tensor) -> Tensor:
    """(B, 1) to (B, 2, 2)."""
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([cosine, -sine, sine, cosine], 1).unflatten(1, (2, 2))


def _recolour(images: Tensor, chances: _Chances) -> Tensor:
    """Brightness and contrast, then an inverted luma, and in colour another hue and saturation."""
    brightness, contrast = chances.normal("brightness", BRIGHTNESS), chances.normal("contrast", CONTRAST).exp2()
    luma = 1 - 2 * chances.whole("luma", 0, 2)
    brightness, contrast, luma = (values[:, :, None, None] for values in (brightness, contrast, luma))
    images = (images + brightness) * contrast
    if images.shape[1] == 1:
        return images * luma
    hue, saturation = chances.uniform("hue", -math.pi, math.pi), chances.normal("saturation", SATURATION).exp2()
    hue, saturation = hue[:, :, None, None], saturation[:, :, None, None]
    grey = images.mean(1, keepdim=True)
    colour = images - grey  # to be turned around the grey axis; its cross product with that is `across`
    across = (colour.roll(1, 1) - colour.roll(-1, 1)) / math.sqrt(3)
    return grey * luma + (colour * hue.cos() + across * hue.sin()) * saturation


class _Lookup(torch.autograd.Function):
    """Bilinear lookup of images, mirrored beyond their edges, at a fixed grid.

    It is linear in the images, and its gradient is the adjoint map, so each is the other's derivative. Older versions
    of torch cannot differentiate grid_sample twice.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        moved: Tensor = torch.ops.aten.grid_sampler_2d(images, grid, *_BILINEAR_REFLECTED)
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _LookupAdjoint.apply(gradient, ctx.saved_tensors[0], ctx.shape), None


class _LookupAdjoint(torch.autograd.Function):
    """Each pixel's gradient, spread over the pixels that it was looked up from."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        if torch.are_deterministic_algorithms_enabled() and gradient.is_cuda:
            return _spread(gradient, grid, shape)
        like = gradient.new_empty(1).expand(shape)  # the values of the images do not matter
        spread: Tensor = torch.ops.aten.grid_sampler_2d_backward(
            gradient, like, grid, *_BILINEAR_REFLECTED, output_mask=[True, False]
        )[0]
        return spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Lookup.apply(gradient, ctx.saved_tensors[0]), None, None


def _spread(gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint in a fixed order, which torch's own has not on a GPU: four neighbours for each pixel, added up."""
    count, channels, height, width = shape
    x, y = (_reflected((grid[..., axis] + 1) * size / 2 - 0.5, size) for axis, size in ((0, width), (1, height)))
    left, top = x.floor(), y.floor()
    image = torch.arange(count, device=grid.device)[:, None, None] * (height * width)
    values = gradient.permute(0, 2, 3, 1)  # (B, H, W, C)
    spread = gradient.new_zeros(count * height * width, channels)
    for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column, row = left + right, top + below
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        weight = weight * ((column < width) & (row < height))  # a whole pixel beyond the edge has no weight
        place = image + row.clamp(max=height - 1).long() * width + column.clamp(max=width - 1).long()
        spread.index_add_(0, place.flatten(), (values * weight[..., None]).flatten(0, 2))
    return spread.view(count, height, width, channels).permute(0, 3, 1, 2)


def _reflected(position: Tensor, size: int) -> Tensor:
    """A position in pixels, mirrored at the outer edges of an image."""
    inside = (position + 0.5).abs() % (2 * size)
    return (torch.minimum(inside, 2 * size - inside) - 0.5).clamp(0, size - 1)


_BILINEAR_REFLECTED = (0, 2, False)  # interpolation, padding, align_corners
