"""What a sample is, as networks need to know it. Imports no other part of the trainer, so that all may import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

Batch = Mapping[str, Tensor]  # "image" (B, C, H, W) float, normalised or in [-1, 1]; "label" and "id" (B,) int64
_ON_DISK = {"train_size": "training", "eval_size": "evaluated", "variable_size": "photographs"}  # names in data.json


@dataclass(frozen=True)
class Mixture:
    """Points in the plane around known centres: what tells how many modes a generator has found."""

    centres: tuple[tuple[float, float], ...]
    deviation: float


@dataclass(frozen=True)
class Description:
    """A data set as networks need to know it."""

    name: str
    channels: int
    size: int  # height and width in pixels
    classes: tuple[str, ...]  # names in the order of the labels
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    train_size: int  # samples to train on
    eval_size: int  # samples of the split that is evaluated; their ids are 0..eval_size-1
    variable_size: bool = False  # whether images are of many sizes, and so are cropped
    mixture: Mixture | None = None  # of points, which are images of 2 channels and 1 pixel

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def to_json(self) -> dict[str, Any]:
        return {_ON_DISK.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Description:
        """Raises KeyError, TypeError or AttributeError where these are not the values of a description."""
        values = {name: values[_ON_DISK.get(name, name)] for name in cls.__dataclass_fields__}
        mixture = values.pop("mixture")
        lists: dict[str, Any] = {name: tuple(values.pop(name)) for name in ("classes", "mean", "std")}
        centres = Mixture(tuple(map(tuple, mixture.pop("centres"))), **mixture) if mixture else None
        return cls(**values, **lists, mixture=centres)
