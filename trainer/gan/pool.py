"""A history of generated images for a discriminator to train on, so that it does not forget them (Shrivastava et al.
2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn.row_state import RowState
from ..randomness import Draws


class ImagePool(RowState):
    """About `size` earlier fakes, shared out among the rows of the global batch, so that no rank needs those of others.

    Each row keeps size / batch_size of its own fakes, at least one: with a batch of one, the pool of the paper.
    """

    def __init__(self, size: int, image: Sequence[int]) -> None:
        """`image` is the shape (C, H, W) of a fake."""
        super().__init__((0, torch.Size(image).numel()), evaluated=False)  # flat: no memory format has five axes
        self.size = size

    def allocate(self, rows: Sequence[int], batch_size: int) -> None:
        self.shape = (-(-self.size // batch_size), self.shape[1])
        super().allocate(rows, batch_size)

    def exchange(self, fakes: Tensor, draws: Draws, name: str) -> Tensor:
        """What to train on: each fake (B, C, H, W), or with even odds an earlier one, whose place it takes.

        Until a row has filled its places, a fake a step, it trains on its fakes as they come.
        """
        images, new = self._of(draws), fakes.detach().flatten(1).to(self.value.dtype)
        entries, rows = images.shape[1], torch.arange(len(new), device=new.device)
        if draws.step < entries:
            images[:, draws.step] = new
            return fakes
        place = draws.integers(f"{name}/place", entries)
        old = images[rows, place]
        swap = draws.uniform(f"{name}/swap", (1,)) < 0.5
        images[rows, place] = torch.where(swap, new, old)
        return torch.where(swap, old, new).view(fakes.shape)
