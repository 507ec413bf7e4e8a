"""What a cluster is like: slurm/site.yaml, or the file that --site or $LAUNCH_SITE names."""

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
    """An image that the trainer runs in; `kind` says through which program."""

    kind: Literal["apptainer", "enroot"]
    image: str
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """The fields are the keys of site.yaml, which explains them; flags of `launch slurm` go before them."""

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
    """The named file, else $LAUNCH_SITE, else slurm/site.yaml where there is one. Raises Refused."""
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
    given = {key: _value(hints[key], value, name, f"{prefix}{key}") for key, value in values.items()}
    return kind(**given)


def _value(hint: Any, value: Any, name: str, key: str) -> Any:
    def wrong(wanted: str) -> Refused:
        return Refused(f"{name}: {key}: {value!r} should be {wanted}")

    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is Container:
        if not isinstance(value, dict):
            raise wrong("a mapping with kind and image")
        return _build(Container, value, name, f"{key}.")
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise wrong(f"one of {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise wrong("a list of texts")
        return tuple(value)
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise wrong("a whole number")
        return value
    if hint is str:
        if not isinstance(value, str) or not value or "\n" in value:
            raise wrong("a text of one line; put it into quotes")
        return os.path.expandvars(value) if key == "scratch" else value
    if not isinstance(value, dict) or not all(isinstance(v, str | int | float) for v in value.values()):
        raise wrong("a mapping from names of variables to values")
    for variable in value:
        if not str(variable).isidentifier():
            raise Refused(f"{name}: {key}: {variable!r} cannot be the name of a variable")
    return {str(k): json_text(v) for k, v in value.items()}


def json_text(value: str | float) -> str:
    """A scalar of a YAML file as the text that a program should see."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
