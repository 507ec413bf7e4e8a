"""A user's own files: `path/to/gan.py`, `path/to/net.py:Net` or `package.module:name` in place of a built-in name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from .options import RunConfig, UserError


def is_user_code(name: str) -> bool:
    """Whether a name is that of a file or of a module in a package; names of the trainer's own parts have no dot."""
    return "." in name and not name.startswith("torchvision:")


def load_module(setting: str, name: str) -> ModuleType:
    """Import a user's file or module; raises UserError, with the traceback within the file where it fails."""
    if not name.endswith(".py"):
        return _import(setting, name)
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"{setting}: no file {name!r}: the path counts from {Path.cwd()}")
    unique = f"user_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    if (module := sys.modules.get(unique)) is not None:
        return module
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pydantic look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[unique]
        raise UserError(f"{setting}: {name!r} cannot be imported: {_where(error, str(path))}") from None
    return module


def _import(setting: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # of something that it imports
            raise UserError(f"{setting}: {name!r} cannot be imported: {_where(error, '')}") from None
        raise UserError(
            f"{setting}: no module {name!r}: give the path of a .py file, or a module on PYTHONPATH"
        ) from None
    except Exception as error:
        raise UserError(f"{setting}: {name!r} cannot be imported: {_where(error, '')}") from None


def load_attribute(setting: str, name: str, default: str = "") -> Any:
    """What `path/to/file.py:NAME` names; raises UserError."""
    path, _, attribute = name.partition(":")
    attribute = attribute or default
    if not attribute:
        raise UserError(f"{setting}: {name!r} names no function or class: write {name}:NAME")
    module = load_module(setting, path)
    if not hasattr(module, attribute):
        raise UserError(f"{setting}: {path} defines no {attribute!r}: define it, or write {path}:NAME")
    return getattr(module, attribute)


def digests(config: RunConfig, data: bool = True) -> dict[str, str]:
    """The sha256 of each of the user's files that a config names; `data` includes that of the data set."""
    workload = config.workload
    names = {"workload.name": workload.name} | ({"data.name": config.data.name} if data else {})
    names |= {f"workload.{setting}": getattr(workload, setting) for setting in workload.code}
    hashes = {}
    for setting, name in names.items():
        if is_user_code(name):
            path = name.partition(":")[0]
            file = load_module(setting, path).__file__
            hashes[path] = hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    return hashes


def _where(error: Exception, origin: str) -> str:
    """The error, and the traceback from the user's file on, or below our own frames."""
    if isinstance(error, SyntaxError) and error.filename == origin:
        return f'SyntaxError: {error.msg}\n  File "{origin}", line {error.lineno}\n    {(error.text or "").strip()}'
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = next((i for i, frame in enumerate(frames) if frame.filename == origin), min(2, len(frames)))
    reason = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {reason}\n{''.join(traceback.format_list(frames[own:]))}".rstrip()
