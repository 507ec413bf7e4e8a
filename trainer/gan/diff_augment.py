"""Differentiable augmentation of what a discriminator sees: DiffAugment (Zhao et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..randomness import Draws


def diff_augment(images: Tensor, policies: tuple[str, ...], draws: Draws, name: str) -> Tensor:
    """(B, C, H, W) in [-1, 1]: brightness, saturation and contrast; shifts by an eighth; a grey square of half a side.

    Gradients pass through. The random choices are those of `name`: real and fake images have one each.
    """
    for policy in policies:
        images = {"color": _color, "translation": _translation, "cutout": _cutout}[policy](images, draws, name)
    return images


def _color(images: Tensor, draws: Draws, name: str) -> Tensor:
    brightness, saturation, contrast = draws.uniform(f"{name}/color", (3,))[:, :, None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _translation(images: Tensor, draws: Draws, name: str) -> Tensor:
    size = images.shape[-1]
    reach = (size + 4) // 8
    offsets = draws.integers(f"{name}/translation", 2 * reach + 1, (2,))
    padded = torch.nn.functional.pad(images, [reach] * 4)
    along = torch.arange(size, device=images.device)
    rows, columns = offsets[:, :1] + along, offsets[:, 1:] + along
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, draws: Draws, name: str) -> Tensor:
    size = images.shape[-1]
    side = size // 2
    corner = draws.integers(f"{name}/cutout", size + 1, (2,)) - side // 2
    along = torch.arange(size, device=images.device)
    inside = (along >= corner[:, :, None]) & (along < corner[:, :, None] + side)  # (B, 2, size)
    hidden = inside[:, 0, :, None] & inside[:, 1, None, :]
    return images * ~hidden[:, None]
