"""One file a workload: its options, its networks, its losses. The file's name is the registry; a path is a user's own.

Each file defines `Options` (a WorkloadOptions) and `build(options, data, optimizer) -> Workload`; and `DATA`, the kind
of description that it takes, where that is not of images.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any, Literal, cast

import torch
from pydantic import Field, create_model

from ..config.options import RunConfig, UserError, WorkloadOptions
from ..config.settings import config_class
from ..config.user_code import is_user_code, load_module
from ..data.description import Description, ImageDescription
from ..workload import Workload


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a workload; raises UserError."""
    if is_user_code(name):
        module = load_module("workload.name", name)
        for needed in ("Options", "build"):
            if not hasattr(module, needed):
                raise UserError(f"workload.name: {name} defines no {needed!r}: see 'How to add a GAN' in README.md")
        return module
    if name not in names():
        raise UserError(f"workload.name: {name!r} is not known; known: {', '.join(names())}, or path/to/file.py")
    return importlib.import_module(f".{name}", __package__)


def options_class(name: str) -> type[WorkloadOptions]:
    """The options of a workload, which go by its name, or the path that it was named by."""
    kind: Any = Literal[name]
    field = Field(name, description=WorkloadOptions.model_fields["name"].description)
    return cast(type[WorkloadOptions], create_model("Options", __base__=load(name).Options, name=(kind, field)))


def config_model(name: str) -> type[RunConfig]:
    """The settings of a run of this workload."""
    options = options_class(name)
    return config_class(options, default=options())


def build(config: RunConfig, data: Description) -> Workload:
    """The workload with its initial weights, which depend on the seed alone; raises UserError."""
    module = load(config.workload.name)
    wanted = getattr(module, "DATA", ImageDescription)
    if not isinstance(data, wanted):
        kinds = {"ImageDescription": "images", "TokenDescription": "a text"}
        is_, takes = (kinds.get(kind.__name__, kind.__name__) for kind in (type(data), wanted))
        raise UserError(f"workload.name: {config.workload.name} takes {takes}, and {data.name} is {is_}: use another")
    torch.manual_seed(config.seed)
    try:
        workload: Workload = module.build(config.workload, data, config.optimizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    return workload
