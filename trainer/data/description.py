"""What a sample is, as networks need to know it. Imports no other part of the trainer, so that all may import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

Batch = Mapping[str, Tensor]  # what a data set says that a batch of it holds, row by row, and "id" (B,) int64


@dataclass(frozen=True)
class Mixture:
    """Points in the plane around known centres: what tells how many modes a generator has found."""

    centres: tuple[tuple[float, float], ...]
    deviation: float


@dataclass(frozen=True)
class Description:
    """A data set as networks need to know it; a kind of samples adds what is particular to it."""

    name: str
    train_size: int  # samples to train on
    eval_size: int  # samples of the split that is evaluated; their ids are 0..eval_size-1


@dataclass(frozen=True)
class ImageDescription(Description):
    """Square images: a batch holds "image" (B, C, H, W) float, normalised or in [-1, 1], and "label" (B,) int64.

    Pairs of images, and images of two sets, are described like this too; the data set names the fields of a batch.
    """

    channels: int
    size: int  # height and width in pixels
    classes: tuple[str, ...]  # names in the order of the labels
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    variable_size: bool = False  # whether images are of many sizes, and so are cropped
    mixture: Mixture | None = None  # of points, which are images of 2 channels and 1 pixel
    paired: bool = False  # whether a batch also holds "input", shaped as "image", which that is to be made of
    domains: tuple[str, ...] = ()  # names of the two sets whose images are in a batch, where there are two

    def normalised_to(self, input_range: tuple[float, float] | None) -> ImageDescription:
        """With the mean and deviation that bring pixels into a range; the data set's own for None."""
        if input_range is None:
            return self
        low, high = input_range
        return replace(self, mean=(-low / (high - low),), std=(1 / (high - low),))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)


@dataclass(frozen=True)
class TokenDescription(Description):
    """Windows of a text: a batch holds "tokens" (B, length + 1) int64, of which all but the first are predicted."""

    vocabulary: tuple[str, ...]
    length: int  # tokens to predict in a window
    characters: float = 1.0  # of a token of the training part, on average


KINDS: dict[str, type[Description]] = {"images": ImageDescription, "tokens": TokenDescription}
_ON_DISK = {"train_size": "training", "eval_size": "evaluated", "variable_size": "photographs"}  # names in data.json


def to_json(description: Description) -> dict[str, Any]:
    """Plain data, for data.json."""
    kind = next(name for name, cls in KINDS.items() if type(description) is cls)
    values = {_ON_DISK.get(name, name): value for name, value in asdict(description).items()}
    return values if kind == "images" else {"kind": kind, **values}


def from_json(values: Mapping[str, Any]) -> Description:
    """Raises KeyError, TypeError or AttributeError where these are not the values of a description."""
    cls = KINDS[values.get("kind", "images")]
    names = {field.name: _ON_DISK.get(field.name, field.name) for field in fields(cls)}
    known = {name: values[stored] for name, stored in names.items() if stored in values}  # an older run's has fewer
    for name, value in known.items():
        if isinstance(value, list):
            known[name] = tuple(value)
    if mixture := known.get("mixture"):
        known["mixture"] = Mixture(tuple(map(tuple, mixture["centres"])), mixture["deviation"])
    return cls(**known)
