"""Settings as YAML: plain data, every key once. Quick to import, because `launch` reads them too, on login nodes."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 1 << 20


class YamlError(ValueError):
    """Text or a file that holds no settings; the message is for the user and begins with the name of the file."""


class _Mistake(ValueError):
    """What is wrong, without the name of the file."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which it would take the last, and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for name, _ in node.value:
            if name.tag != "tag:yaml.org,2002:str":
                raise _Mistake(f"the key in line {name.start_mark.line + 1} is not a name: write `setting: value`")
            if name.value in keys:
                raise _Mistake(f"duplicate key {name.value!r} in line {name.start_mark.line + 1}: keep one of them")
            keys.add(name.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def write_yaml(values: dict[str, Any], ascii_only: bool = False) -> str:
    """Plain data as text that `read_yaml` reads as the same data."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii_only)


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """A mapping as plain data; raises YamlError with the file's name."""
    try:
        return _mapping(text)
    except _Mistake as mistake:
        raise YamlError(f"{name}: {mistake}") from None


def _mapping(text: str) -> dict[str, Any]:
    if len(text) > _MAX_BYTES:
        raise _Mistake(f"too long for a config; the limit is {_MAX_BYTES} bytes")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise _Mistake("YAML aliases (*name) are not supported: write the value out")
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _Mistake(f"not valid YAML{line}: {problem}") from None
    except _Mistake:
        raise
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-01, brackets a thousand deep
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise _Mistake(f"not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _Mistake(f"a config is a mapping of settings, not a {type(values).__name__}")
    return values


def read_file(path: str) -> dict[str, Any]:
    """The settings in a file; raises YamlError."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            return read_yaml(file.read(_MAX_BYTES + 1), path)
    except FileNotFoundError:
        siblings = {p.stem: str(p) for p in sorted(Path(path).parent.glob("*.yaml"))}
        similar = difflib.get_close_matches(Path(path).stem, siblings, 1)
        hint = f"did you mean {siblings[similar[0]]!r}?" if similar else "check the path"
        raise YamlError(f"no config file {path!r}: {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise YamlError(f"{path}: cannot be read as a config: {error}") from None
