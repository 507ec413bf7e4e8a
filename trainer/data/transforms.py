"""Augmentation, a function of (seed, sample, visit): the same for any rank, loader worker, device or restart.

Photographs are cropped and resized one by one, where they are read. Everything else works on uint8 batches on the
device, so that the resident and the streaming path share it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.options import DataOptions
from ..randomness import key, uniforms
from .description import ImageDescription


class Crop:
    """A PIL image of any size to (C, size, size) uint8: cropped at random in training, in the centre otherwise."""

    def __init__(self, options: DataOptions, size: int, seed: int, train: bool, variable_size: bool) -> None:
        self.size, self.seed, self.policy = size, seed, options.policy if train else "none"
        self.background = options.background
        self.share = 0.875 if variable_size and size >= 128 else 1.0  # of the shorter side
        self.random = train and (variable_size if options.resized_crop is None else options.resized_crop)

    def __call__(self, image: Any, index: int, visit: int) -> Tensor:
        from PIL import Image

        box = self._random_box(image.width, image.height, index, visit) if self.random else self._centre(image)
        resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        pixels = torch.from_numpy(np.array(resized)).view(self.size, self.size, -1).permute(2, 0, 1).contiguous()
        return apply_policy(self.policy, pixels, self.seed, index, visit)

    def _centre(self, image: Any) -> tuple[float, float, float, float]:
        """The middle square: 7/8 of the shorter side, as is customary at 224 pixels; all of a small image or a pair."""
        side = min(image.width, image.height) * self.share
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return left, top, left + side, top + side

    def _random_box(self, width: int, height: int, index: int, visit: int) -> tuple[float, float, float, float]:
        """8 to 100 % of the area in an aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015)."""
        uniform = uniforms(self.seed, torch.tensor([index]), torch.tensor([visit]), "crop", 40)[0].tolist()
        for attempt in range(10):
            area, ratio, x, y = uniform[4 * attempt : 4 * attempt + 4]
            area = (0.08 + 0.92 * area) * width * height
            ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def apply_policy(policy: str, image: Tensor, seed: int, index: int, visit: int) -> Tensor:
    """torchvision's TrivialAugment or RandAugment on (C, H, W) uint8, with its random choices keyed by the sample."""
    if policy == "none":
        return image
    from torchvision.transforms import v2

    transform = v2.TrivialAugmentWide() if policy == "trivial" else v2.RandAugment()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "policy", index, visit))
        return transform(image)


class Augment:
    """(B, C, H, W) uint8 to normalised floating point, on the device of the images."""

    def __init__(self, options: DataOptions, data: ImageDescription, seed: int, train: bool, device: torch.device,
                 dtype: torch.dtype, channels_last: bool) -> None:  # fmt: skip
        self.pad_crop = options.pad_crop if train else 0
        self.flip = options.flip and train
        self.erase = options.erase if train else 0.0
        self.seed, self.dtype = seed, dtype
        self.random = bool(self.pad_crop or self.flip or self.erase)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (data.mean, data.std))
        self.scale = (1 / (255 * std)).to(device, dtype)
        self.shift = (-mean / std).to(device, dtype)

    def __call__(self, images: Tensor, ids: Tensor, visits: Tensor | None) -> Tensor:
        if not self.random:
            return self.normalise(images)
        assert visits is not None
        # A copy that blocks would have the host wait for the steps before.
        uniform = uniforms(self.seed, ids, visits, "augment", 8).to(images.device, non_blocking=True)
        if self.pad_crop:
            images = _pad_crop(images, self.pad_crop, uniform[:, 0:2])
        if self.flip:
            images = torch.where((uniform[:, 2] < 0.5)[:, None, None, None], images.flip(3), images)
        floats = self.normalise(images)
        return _erase(floats, self.erase, uniform[:, 3:8]) if self.erase else floats

    def normalise(self, images: Tensor) -> Tensor:
        return images.to(self.dtype, memory_format=self.memory_format).mul_(self.scale).add_(self.shift)


def _pad_crop(images: Tensor, pad: int, uniform: Tensor) -> Tensor:
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, [pad] * 4)
    offsets = (uniform * (2 * pad + 1)).long()
    device = images.device
    rows = offsets[:, 0, None] + torch.arange(height, device=device)
    columns = offsets[:, 1, None] + torch.arange(width, device=device)
    batch = torch.arange(len(images), device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _erase(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Grey boxes of 2 to 33 % of the area in an aspect ratio of 0.3 to 3.3, cut off at the edges; in place."""
    height, width = images.shape[2:]
    area = (0.02 + 0.31 * uniform[:, 1]) * height * width
    ratio = torch.exp((2 * uniform[:, 2] - 1) * math.log(3.3))
    half_h, half_w = (area * ratio).sqrt() / 2, (area / ratio).sqrt() / 2
    y = torch.arange(height, device=images.device) + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    inside_y = (y - uniform[:, 3, None] * height).abs() < half_h[:, None]
    inside_x = (x - uniform[:, 4, None] * width).abs() < half_w[:, None]
    mask = (uniform[:, 0] < probability)[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    return images.masked_fill_(mask[:, None], 0)  # out of place it would forget channels_last
