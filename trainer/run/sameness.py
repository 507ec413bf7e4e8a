"""Whether all ranks run the same: config, data, versions. If not, they would end with weights that belong to none."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from typing import Any

import torch

from .. import __version__
from ..config.options import differences
from ..data.dataset import DataSet, Memory, Split
from ..data.description import to_json
from ..distributed.runtime import Runtime
from .build import Recipe

OF_A_NODE = ("data.root", "data.workers", "threads", "wandb")  # settings that may differ from one to another


def difference(runtime: Runtime, recipe: Recipe) -> str:
    """A line for the user where a rank runs something else than the first; '' where all agree, as all then know."""
    if runtime.world == 1:
        return ""
    own = facts(recipe)
    digests = runtime.gather(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest())
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not others:
        return ""
    everyone = runtime.gather(own if runtime.rank in (0, others[0]) else None)
    (name, (first, other)), *more = differences(everyone[0], everyone[others[0]]).items()
    which = f"rank {others[0]}" if len(others) == 1 else f"rank {others[0]} and {len(others) - 1} more"
    return (
        f"{name}: {_shown(first)} on rank 0, {_shown(other)} on {which}{f'; {len(more)} more differ' if more else ''}: "
        f"give all ranks the same config, environment, data and versions"
    )


def facts(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same on all ranks, in groups."""
    settings = recipe.config.model_dump(mode="json")
    for name in OF_A_NODE:
        group, _, key = name.rpartition(".")
        del (settings[group] if group else settings)[key]
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "trainer": __version__}
    return {**settings, "data set": of_data(recipe.data), "version": versions}


def of_data(data: DataSet) -> dict[str, Any]:
    """What a data set holds."""
    splits = {"training": data.train, data.split: data.held_out}
    own = {**to_json(data.description), **{f"{name} samples": digest(split) for name, split in splits.items()}}
    return own | ({f"partner, {name}": value for name, value in of_data(data.partner).items()} if data.partner else {})


def digest(split: Split) -> str:
    """Of all that a split in memory holds; of the names and labels of one whose images are read by id.

    The names count from where they begin to differ, since nodes may keep a set in different places.
    """
    hashed = hashlib.blake2b(digest_size=8)
    if isinstance(split, Memory):
        for name, tensor in sorted(split.fields.items()):
            hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return hashed.hexdigest()
    names = [split.name(index) for index in range(len(split))]
    start = len(os.path.commonprefix(names))  # noqa: RUF071 - of characters
    for name in names:
        hashed.update(name[start:].encode(errors="surrogateescape") + b"\0")
    hashed.update(split.labels.numpy().data)
    return hashed.hexdigest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
