"""One file a workload: its options, its networks, its losses. The file's name is the registry.

Each file defines `Options` (a WorkloadOptions whose `name` is the file's) and
`build(options, data, optimizer) -> Workload`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..config.options import UserError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a workload; raises UserError."""
    if name not in names():
        raise UserError(f"workload.name: {name!r} is not known; known: {', '.join(names())}")
    return importlib.import_module(f".{name}", __package__)
