"""What a data set is: splits of `Memory` (tensors) or of `Stored` (images read by id), and a description.

A split says what a batch of it holds by its fields. Most hold "image" and "label"; a pair of images is two image fields
of one sample; images of two independent sets are a data set with a `partner`, whose fields are in the batch too, as
`partner_image` and so on, in an order of their own; windows of a text are a field that is no image, with `streams` set,
so that each row of the batch continues where it was.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.options import DataOptions, UserError
from .description import Description, ImageDescription
from .plan import BatchPlan, StreamPlan


class Memory:
    """A split in memory: tensors (N, ...) by the name that a batch has them under.

    The fields in `image_fields` are (N, C, H, W) uint8, or float in the same range, and are augmented and normalised;
    all others come as they are.
    """

    def __init__(self, fields: Mapping[str, Tensor], image_fields: tuple[str, ...] = ("image",)) -> None:
        self.fields, self.image_fields = dict(fields), image_fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]

    def rows(self, ids: Tensor) -> Memory:
        return Memory({name: tensor[ids] for name, tensor in self.fields.items()}, self.image_fields)


Encoded = Any  # an image as it is stored (bytes), a PIL image, or the Exception that says why it cannot be had


class Stored(Protocol):
    """A split whose images are read when they are needed, in loader workers, so it opens files late."""

    labels: Tensor
    channels: int
    image_fields: tuple[str, ...]  # of a sample, ("image",) for most

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...  # where a sample is, for the user
    def fetch(self, indices: Sequence[int], field: str) -> list[Encoded]: ...  # UserError where storage is silent


class Part:
    """Some samples of a stored split."""

    def __init__(self, whole: Stored, ids: Tensor) -> None:
        self.whole, self.ids = whole, ids.tolist()
        self.labels, self.channels, self.image_fields = whole.labels[ids], whole.channels, whole.image_fields

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return self.whole.name(self.ids[index])

    def fetch(self, indices: Sequence[int], field: str) -> list[Encoded]:
        return self.whole.fetch([self.ids[index] for index in indices], field)


Split = Memory | Stored


@dataclass(frozen=True)
class DataSet:
    description: Description
    train: Split
    held_out: Split
    split: str  # which split is held out
    streams: bool = False  # whether each row of the batch reads consecutive samples
    partner: DataSet | None = None  # another set, in the same batches, in an order of its own


def part(whole: Split, ids: Tensor) -> Split:
    """Some samples of a split, in the order of `ids`."""
    return whole.rows(ids) if isinstance(whole, Memory) else Part(whole, ids)


def relabelled(data: DataSet, classes: Sequence[str]) -> DataSet:
    """The data set with its classes in another order, among others, by their names; raises UserError for a new one."""
    own = data.description
    if not isinstance(own, ImageDescription) or own.classes == tuple(classes):
        return data
    known = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in own.classes if name not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        near = difflib.get_close_matches(unknown[0], classes, 5, cutoff=0) or classes
        raise UserError(
            f"data.root: the run was not trained with the class {unknown[0]!r}{more}; its classes are: "
            f"{', '.join(near)}{', ...' * (len(near) < len(classes))}: rename or remove it, or train another run"
        )
    labels = torch.tensor([known[name] for name in own.classes])

    def mapped(split: Split) -> Split:
        if isinstance(split, Memory):
            return Memory({**split.fields, "label": labels[split["label"]]}, split.image_fields)
        same = Part(split, torch.arange(len(split)))
        same.labels = labels[split.labels]
        return same

    description = replace(own, classes=tuple(classes))
    return replace(data, description=description, train=mapped(data.train), held_out=mapped(data.held_out))


def subsample(data: DataSet, count: int) -> DataSet:
    """The data set with so many held-out samples, of its partner too: evenly spread, since many sets are sorted by
    class; of a text the first."""
    whole = data.held_out
    partner = data.partner and subsample(data.partner, count)
    count = min(count, len(whole))
    ids = torch.arange(count) if data.streams else torch.arange(count) * len(whole) // count
    description = replace(data.description, eval_size=count)
    return replace(data, held_out=part(whole, ids), description=description, partner=partner)


def plan_of(data: DataSet, seed: int, batch_size: int, accumulation: int = 1, group: int = 1) -> BatchPlan:
    """The order in which a data set is trained on; raises UserError where a text is too short for the rows."""
    size = len(data.train)
    if not data.streams:
        return BatchPlan(seed, size, batch_size, accumulation, group)
    if size < batch_size:
        raise UserError(
            f"batch_size: {batch_size} rows cannot share {size} windows of {data.description.name}: "
            f"lower it to {size} or less"
        )
    return StreamPlan(seed, size // batch_size * batch_size, batch_size, accumulation, group)


def describe(name: str, classes: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float],
             train: Split, held_out: Split, paired: bool = False) -> ImageDescription:  # fmt: skip
    return ImageDescription(
        name, len(train), len(held_out), len(mean), size, tuple(classes), tuple(mean), tuple(std), paired=paired
    )


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a data set's root, and the path in it; raises UserError."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"data.root: {url!r}: {error}") from None
    return fs, str(path).rstrip("/")


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
