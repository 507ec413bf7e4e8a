"""What a data set is: splits of `Memory` (a uint8 tensor) or of `Stored` (images read by id), and a description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..config.options import DataOptions, UserError
from .description import Description


@dataclass(frozen=True)
class Memory:
    """A split that is one tensor: images (N, C, H, W) uint8, or float in the same range; labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


Encoded = bytes | Exception  # an image as it is stored, or why it cannot be had


class Stored(Protocol):
    """A split whose images are read when they are needed, in loader workers, so it opens files late."""

    labels: Tensor
    channels: int

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...  # where an image is, for the user
    def fetch(self, indices: Sequence[int]) -> list[Encoded]: ...  # raises UserError where storage does not answer


class Part:
    """Some samples of a stored split."""

    def __init__(self, whole: Stored, ids: Tensor) -> None:
        self.whole, self.ids = whole, ids.tolist()
        self.labels, self.channels = whole.labels[ids], whole.channels

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return self.whole.name(self.ids[index])

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        return self.whole.fetch([self.ids[index] for index in indices])


@dataclass(frozen=True)
class DataSet:
    description: Description
    train: Memory | Stored
    held_out: Memory | Stored
    split: str  # which split is held out


def subsample(data: DataSet, count: int) -> DataSet:
    """The data set with so many held-out samples, evenly spread, since many sets are sorted by class."""
    whole = data.held_out
    count = min(count, len(whole))
    ids = torch.arange(count) * len(whole) // count
    part = Memory(whole.images[ids], whole.labels[ids]) if isinstance(whole, Memory) else Part(whole, ids)
    return replace(data, held_out=part, description=replace(data.description, eval_size=count))


def describe(name: str, classes: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float],
              train: Memory | Stored, held_out: Memory | Stored) -> Description:  # fmt: skip
    return Description(name, len(mean), size, tuple(classes), tuple(mean), tuple(std), len(train), len(held_out))


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def local_root(options: DataOptions, root: str) -> Path:
    """The root of a data set that only a local folder can hold."""
    if "://" in root:
        raise UserError(
            f"data.root: {options.name} is read from a local folder, not from {root!r}: "
            f"copy it and set data.root or TRAINER_DATA to the folder"
        )
    return Path(root).expanduser()


def choose_split(wanted: str, available: Sequence[str], name: str) -> str:
    """The split to evaluate on."""
    if wanted == "auto":
        wanted = next((split for split in ("val", "test") if split in available), "val")
    if wanted not in available:
        raise UserError(
            f"evaluate.split: {name} has no {wanted!r} split; it has: {', '.join(available)}: "
            f"add one or set evaluate.split"
        )
    return wanted
