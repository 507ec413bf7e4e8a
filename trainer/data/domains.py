"""One data set as two domains, for translation without pairs: two of its classes, or two halves of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config.options import HALVES, UserError
from .dataset import DataSet, Memory, Split, part
from .description import ImageDescription

Ids = Callable[[Split], Tensor]  # which samples of a split belong to a domain


def as_domains(data: DataSet, names: Sequence[str]) -> DataSet:
    """The first domain of a set, with the second one as its partner. Raises UserError where it has no such domains."""
    d = data.description
    if data.partner is not None or not isinstance(d, ImageDescription) or d.mixture:
        reason = "is two sets already" if data.partner is not None else "is no set of images"
        raise UserError(f"data.domains: {d.name} {reason}: remove data.domains")
    if tuple(names) == HALVES:
        names = ("even samples", "odd samples")
        domains = [_domain(data, name, _every_second(start)) for start, name in enumerate(names)]
    else:
        domains = [_domain(data, name, _of_class(_label(name, d))) for name in names]
    first, second = domains
    assert isinstance(first.description, ImageDescription)
    return replace(first, description=replace(first.description, domains=tuple(names)), partner=second)


def _every_second(start: int) -> Ids:
    return lambda split: torch.arange(start, len(split), 2)


def _of_class(label: int) -> Ids:
    return lambda split: (_labels(split) == label).nonzero().flatten()


def _labels(split: Split) -> Tensor:
    return split["label"] if isinstance(split, Memory) else split.labels


def _label(name: str, d: ImageDescription) -> int:
    if name in d.classes:
        return d.classes.index(name)
    near = difflib.get_close_matches(name, d.classes, 3) or d.classes[:10]
    raise UserError(f"data.domains: {name!r} is no class of {d.name}; there are: {', '.join(near)}")


def _domain(data: DataSet, name: str, ids: Ids) -> DataSet:
    train, held_out = (part(split, ids(split)) for split in (data.train, data.held_out))
    for split, samples in (("train", train), (data.split, held_out)):
        if not len(samples):
            raise UserError(
                f"data.domains: {data.description.name} has no {name!r} in its {split} split: add images, or name "
                f"another class"
            )
    description = replace(data.description, train_size=len(train), eval_size=len(held_out))
    return replace(data, train=train, held_out=held_out, description=description)
