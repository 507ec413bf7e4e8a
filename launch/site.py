"""The description of a cluster: slurm/site.yaml, or the file that --site or $LAUNCH_SITE names."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.config.yaml_file import YamlError, read_file

from . import Refused

DEFAULT_FILE = "slurm/site.yaml"


@dataclass(frozen=True)
class Container:
    """An image that the trainer runs in; `kind` is the program that starts it."""

    kind: Literal["apptainer", "enroot"]
    image: str
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """The fields are the keys of site.yaml, which explains them; flags of `launch slurm` override them."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    container: Container | None = None
    scratch: str | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    cpus_per_rank: int = 1
    signal_seconds: int = 120
    save_seconds: int = 30
    after_node_failure: Literal["wait", "shrink"] = "wait"


def read_yaml(path: str) -> dict[str, Any]:
    """A mapping as plain data; raises Refused."""
    try:
        return read_file(path)
    except YamlError as error:
        raise Refused(str(error)) from None


def read_site(path: str | None) -> Site:
    """The named file, else $LAUNCH_SITE, else slurm/site.yaml if it exists. Raises Refused."""
    named = path or os.environ.get("LAUNCH_SITE")
    if named is None and not Path(DEFAULT_FILE).exists():
        return Site()
    name = named or DEFAULT_FILE
    site: Site = _build(Site, read_yaml(name), name, "")
    return site


def _build(kind: type[Any], values: Mapping[str, Any], name: str, prefix: str) -> Any:
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
            raise Refused(f"{name}: {prefix}{key}: unknown setting; {way_out}")
    for f in fields(kind):
        if f.name not in values and f.name in ("kind", "image"):
            raise Refused(f"{name}: {prefix}{f.name}: missing: give a value")
    options = {key: _value(hints[key], value, name, f"{prefix}{key}") for key, value in values.items()}
    return kind(**options)


def _value(hint: Any, value: Any, name: str, key: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if expected := _mismatch(hint, value):
        raise Refused(f"{name}: {key}: {value!r} should be {expected}")
    if hint is Container:
        return _build(Container, value, name, f"{key}.")
    if get_origin(hint) is tuple:
        return tuple(value)
    if isinstance(value, dict):
        return _variables(value, name, key)
    return os.path.expandvars(value) if key == "scratch" else value


def _mismatch(hint: Any, value: Any) -> str | None:
    """What the value should be, if it is something else."""
    if hint is Container:
        ok, expected = isinstance(value, dict), "a mapping with kind and image"
    elif get_origin(hint) is Literal:
        ok, expected = value in get_args(hint), f"one of {', '.join(get_args(hint))}"
    elif get_origin(hint) is tuple:
        ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
        expected = "a list of strings"
    elif hint is int:
        ok, expected = isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number"
    elif hint is str:
        ok = isinstance(value, str) and value != "" and "\n" not in value
        expected = "a string of one line; put it into quotes"
    else:
        ok = isinstance(value, dict) and all(isinstance(item, str | int | float) for item in value.values())
        expected = "a mapping from names of variables to values"
    return None if ok else expected


def _variables(values: Mapping[str, Any], name: str, key: str) -> dict[str, str]:
    """Environment variables, with each value as the text that a program should see."""
    for variable in values:
        if not str(variable).isidentifier():
            raise Refused(f"{name}: {key}: {variable!r} cannot be the name of a variable")
    return {str(variable): _text(value) for variable, value in values.items()}


def _text(value: str | float) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
