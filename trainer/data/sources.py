"""The data sets by their names in a config."""

from __future__ import annotations

from collections.abc import Callable

from ..config.options import DataOptions, UserError
from . import in_memory, stored
from .dataset import DataSet, reason_of

KINDS: dict[str, Callable[[DataOptions, str, str], DataSet]] = {
    "digits": in_memory.digits,
    "mnist": in_memory.idx,
    "fashion_mnist": in_memory.idx,
    "cifar10": in_memory.cifar,
    "cifar100": in_memory.cifar,
    "lsun": stored.lsun,
    "imagenet": stored.imagenet,
    "folder": stored.folder,
    "shards": stored.shards,
    "fake": in_memory.fake,
    "ring8": in_memory.points,
    "grid25": in_memory.points,
    "stacked_mnist": in_memory.stacked,
}


def open_data(options: DataOptions, root: str, split: str) -> DataSet:
    """The data set of a config; raises UserError. `split` is the one to evaluate: auto, val, test or train."""
    try:
        data = KINDS[options.name](options, root, split)
    except UserError:
        raise
    except Exception as error:
        if "://" not in root:
            raise
        raise UserError(f"data.root: {root!r} cannot be read: {reason_of(error)}") from error
    if options.size not in (None, data.description.size):
        data = in_memory.resized(data, options.size)
    for name, part in (("train", data.train), (data.split, data.held_out)):
        if not len(part):
            raise UserError(f"data.name: {options.name}: the {name} split in {root!r} is empty: check data.root")
    return data
