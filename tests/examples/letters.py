"""A data set of one's own: windows of a made-up text, for `--data.name path/to/letters.py:open_letters`."""

from __future__ import annotations

import torch

from trainer.config.options import DataOptions
from trainer.data.dataset import DataSet, Memory
from trainer.data.description import TokenDescription

LENGTH = 8  # tokens that a window predicts
VOCABULARY = tuple("abcdefg")


def open_letters(options: DataOptions, root: str, split: str) -> DataSet:
    """A letter is the one before, plus one or, at random, plus three: a window overlaps with the next by one letter."""
    steps = torch.randint(0, 2, (2000,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    text = torch.cumsum(steps, 0) % len(VOCABULARY)
    train, held_out = (
        Memory({"tokens": part.unfold(0, LENGTH + 1, LENGTH)}, image_fields=()) for part in (text[:1500], text[1500:])
    )
    description = TokenDescription("letters", len(train), len(held_out), VOCABULARY, LENGTH)
    return DataSet(description, train, held_out, "tail", streams=True)
