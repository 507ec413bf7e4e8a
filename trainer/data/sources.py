"""Opens the data set that a config names, one of the table or a user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

from ..config.data_sets import DATA_SETS
from ..config.options import DataOptions, UserError
from ..config.user_code import load_attribute
from .dataset import DataSet, reason_of, subsample
from .description import KINDS, ImageDescription
from .domains import as_domains

Open = Callable[[DataOptions, str, str], DataSet]  # of options, root and the split to evaluate


def opener(name: str) -> Open:
    """The function behind a name; raises UserError."""
    if name not in DATA_SETS:
        opened: Open = load_attribute("data.name", name, "open")
        return opened
    module, _, function = DATA_SETS[name].partition(":")
    builtin: Open = getattr(importlib.import_module(f".{module}", __package__), function)
    return builtin


def open_data(options: DataOptions, root: str, split: str) -> DataSet:
    """The data set of a config; raises UserError. `split` is the one to evaluate: auto, val, test or train."""
    try:
        data = opener(options.name)(options, root, split)
    except UserError:
        raise
    except Exception as error:
        if "://" not in root:
            raise
        raise UserError(f"data.root: {root!r} cannot be read: {reason_of(error)}") from error
    data = _checked(data, options, root)
    return _two_sets(as_domains(data, options.domains) if options.domains else data)


def _checked(data: DataSet, options: DataOptions, root: str) -> DataSet:
    """The data set in the size that was asked for; raises UserError for what cannot be trained on."""
    d = data.description
    if type(d) not in KINDS.values():
        kinds = ", ".join(kind.__name__ for kind in KINDS.values())
        raise UserError(f"data.name: {options.name} describes its samples by {type(d).__name__}: use one of {kinds}")
    if isinstance(d, ImageDescription) and options.size not in (None, d.size):
        from .in_memory import resized

        data = resized(data, options.size)
    for name, part in (("train", data.train), (data.split, data.held_out)):
        if not len(part):
            raise UserError(f"data.name: {options.name}: the {name} split in {root!r} is empty: check data.root")
    return data if data.partner is None else replace(data, partner=_checked(data.partner, options, root))


def _two_sets(data: DataSet) -> DataSet:
    """Where there is a partner, both by their names, and with as many held-out samples: what is made of one is compared
    with the other."""
    d, partner = data.description, data.partner
    if partner is None:
        return data
    if isinstance(d, ImageDescription) and not d.domains:
        data = replace(data, description=replace(d, domains=(d.name, partner.description.name)))
    return subsample(data, min(len(data.held_out), len(partner.held_out)))
