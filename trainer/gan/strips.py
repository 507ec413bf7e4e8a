"""Translated images beside what they were made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..figures import ImageGrid, Panels
from .adversarial import unit

PANELS = 3  # at most, beside each other
PIXELS = 1 << 20  # of a kind of image, about: fewer samples are shown of large images


def shown_ids(wanted: int, available: int, size: int) -> list[int]:
    """Which held-out samples of `size` pixels to show: evenly spread, as many as wanted unless the picture would be
    too large."""
    count = min(wanted, available, max(4, PIXELS // size**2))
    return [i * available // count for i in range(count)]


def strips(kinds: Mapping[str, Tensor]) -> Panels:
    """A row for each sample, in panels: its images of every kind, each (N, C, H, W) in [-1, 1], by their names."""
    rows = torch.stack([unit(images) for images in kinds.values()], 1)
    panels = rows.chunk(min(PANELS, len(rows)))
    title = " | ".join(kinds)
    return Panels(tuple(ImageGrid(part.flatten(0, 1), columns=len(kinds), title=title) for part in panels))
