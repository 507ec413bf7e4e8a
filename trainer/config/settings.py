"""Where settings come from: a YAML file < the environment (TRAINER_...) < flags; mistakes as one line each; the help.

`config_class` builds the settings model around the options of a workload, and `build_config` fills it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from . import yaml_file
from .options import RunConfig, UserError, WorkloadOptions

_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """A config as plain data; raises UserError with the file's name."""
    try:
        return yaml_file.read_yaml(text, name)
    except yaml_file.YamlError as error:
        raise UserError(str(error)) from None


def read_file(path: str) -> dict[str, Any]:
    """The config in a file; raises UserError."""
    try:
        return yaml_file.read_file(path)
    except yaml_file.YamlError as error:
        raise UserError(str(error)) from None


def run_name(path: str) -> str:
    """What a run is called after its config file, or after its folder where that is a run directory's own config."""
    file = Path(path)
    stem = file.absolute().parent.name if file.stem == "config" else file.stem
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem)


def config_class(*workloads: type[WorkloadOptions], default: WorkloadOptions | None = None) -> type[RunConfig]:
    """The settings model for these workloads' options (one to run, all of them for the JSON schema)."""
    kind: Any = workloads[0]
    if len(workloads) > 1:
        kind = Annotated[Union[workloads], Field(discriminator="name")]  # noqa: UP007 - a runtime tuple
    return create_model("Config", __base__=RunConfig, workload=(kind, ... if default is None else default))


def _settings(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by its dotted name."""
    settings: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            settings |= _settings(field.annotation, f"{prefix}{name}.")
        else:
            settings[prefix + name] = field
    return settings


def _groups(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """The keys of every group of settings, by its dotted name."""
    groups = {prefix.rstrip("."): list(model.model_fields)}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            groups |= _groups(field.annotation, f"{prefix}{name}.")
    return groups


def takes_no_value(flag: str, model: type[BaseModel] = RunConfig) -> bool:
    """Whether a flag such as --data.flip may stand alone."""
    field = _settings(model).get(_positive(_name(flag)))
    return field is not None and _is_boolean(field)


def _name(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0].replace("-", "_")


def _positive(name: str) -> str:
    """data.flip for data.no_flip and no_data.flip."""
    return re.sub(r"(^|\.)no_", r"\1", name, count=1)


def _is_boolean(field: FieldInfo) -> bool:
    return bool in (field.annotation, *get_args(field.annotation))


def _list_text(items: Sequence[str]) -> str:
    """Words, words with commas or a JSON list, as text of a JSON list."""
    if len(items) == 1 and items[0].lstrip().startswith("["):
        try:
            json.loads(items[0])
            return items[0]
        except ValueError:
            pass
    return json.dumps([part for item in items for part in item.split(",") if part])


def _unknown(source: str, name: str, model: type[RunConfig], prefix: str = "") -> str:
    """The line about a flag or variable, as the user wrote it, whose name is no setting."""
    settings, groups = list(_settings(model)), _groups(model)
    if name and name in groups:
        keys = ", ".join(f"{prefix}{name}.{key}" for key in groups[name])
        return f"{source}: a group of settings: set one of {keys}"
    same_last_part = [setting for setting in settings if setting.rpartition(".")[2] == name]
    similar = same_last_part or difflib.get_close_matches(name, settings, 1, cutoff=0.6)
    hint = f"did you mean {' or '.join(prefix + n for n in similar)}?" if similar else "'train --help' lists all"
    return f"{source}: unknown setting; {hint}"


def _read_flags(words: Sequence[str], model: type[RunConfig]) -> tuple[list[str], list[str]]:
    """The flags as `--name=value`, in which a value may begin with a dash, and a line per mistake."""
    settings = _settings(model)
    flags: dict[str, str] = {}
    problems: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if word in ("-h", "--help"):
            return ["--help"], []
        if not word.startswith("--"):
            problems.append(f"{word}: neither a flag nor the value of one: give one config file, then --setting value")
            continue
        _, equals_sign, value = word.partition("=")
        name = _name(word)
        positive = _positive(name)
        if name in settings:
            text, problem = _value_of(name, settings[name], value if equals_sign else None, remaining)
            problems += [problem] if problem else []
            if text is not None:
                flags[name] = text
        elif positive in settings and _is_boolean(settings[positive]):
            flags[positive] = "false"
            if equals_sign:
                problems.append(f"{word}: takes no value: write --{positive} or --{positive}=false")
        else:
            problems.append(_unknown(f"--{word[2:].partition('=')[0]}", name, model, "--"))
            _take_values(remaining)
    return [f"--{name}={value}" for name, value in flags.items()], problems


def _value_of(name: str, field: FieldInfo, value: str | None, remaining: list[str]) -> tuple[str | None, str]:
    """The value of a flag, None where it has none, and the line about a mistake, '' where there is none.

    `value` is what follows the equals sign. Without one, the value is taken from the front of the `remaining` words.
    """
    if _is_boolean(field):
        if value is None:
            value = remaining.pop(0) if remaining and remaining[0].lower() in _BOOLEANS else "true"
        return value, ""
    if get_origin(field.annotation) is tuple:
        items = _take_values(remaining) if value is None else [value]
        return _list_text(items), "" if items else f"--{name}: has no value: write --{name} VALUE ..."
    if value is None and remaining and not remaining[0].startswith("--"):
        value = remaining.pop(0)
    if value is None:
        return None, f"--{name}: has no value: write --{name} VALUE, or --{name}=VALUE if it begins with --"
    return value, ""


def _take_values(remaining: list[str]) -> list[str]:
    """Remove the words up to the next flag and return them."""
    values = []
    while remaining and not remaining[0].startswith("--"):
        values.append(remaining.pop(0))
    return values


def _variables() -> dict[str, str]:
    """Settings in the environment by dotted name. TRAINER_DATA is the data folder and no setting."""
    names = {variable: variable.lower() for variable in os.environ}
    return {
        name.removeprefix("trainer_").replace("__", "."): variable
        for variable, name in sorted(names.items())
        if name.startswith("trainer_") and name != "trainer_data"
    }


class _Environment(EnvSettingsSource):
    """TRAINER_OPTIMIZER__LR and so on; only the variables that are settings."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        settings, values = _settings(self.settings_cls), {}
        for name, variable in _variables().items():
            if name in settings:
                value = os.environ[variable]
                is_list = get_origin(settings[name].annotation) is tuple
                values[variable.lower()] = _list_text([value]) if is_list else value
        return values


class _Help(argparse.HelpFormatter):
    """Help in which the choices of a setting are part of its text, not between its name and its text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = str(action.metavar or "")
        if not action.option_strings or not kind:
            return super()._format_action_invocation(action)
        flag = action.option_strings[0]
        if kind == "bool":
            return f"{flag}, --{'.no-'.join(flag[2:].rsplit('.', 1)) if '.' in flag else f'no-{flag[2:]}'}"
        if kind.startswith("tuple["):
            return f"{flag} VALUE ..."
        placeholders = {"int": "N", "float": "X", "str": "TEXT"}
        return f"{flag} {'CHOICE' if kind.startswith('{') else placeholders.get(kind, kind)}"

    def _expand_help(self, action: argparse.Action) -> str:
        # What a setting without a value means is in its text, after 'Default:'.
        text = re.sub(r" \(default: (null|None|\(\))\)", "", super()._expand_help(action))
        kind = str(action.metavar or "")
        return f"{kind[1:-1].replace(',', ' | ')}. {text}" if kind.startswith("{") else text


def _command_line(model: type[BaseSettings], program: str) -> CliSettingsSource[argparse.ArgumentParser]:
    """What parses `--name=value` and prints the help."""
    source = CliSettingsSource[argparse.ArgumentParser](
        model,
        cli_prog_name=program,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_enforce_required=False,
        formatter_class=_Help,
    )
    source.root_parser.usage = f"{program} [--setting value ...]"
    return source


def build_config(
    model: type[RunConfig], values: dict[str, Any], flags: Sequence[str], program: str, description: str
) -> RunConfig:
    """Merge file values, environment and flags; raises UserError with a line per mistake. Prints help on --help."""
    words, problems = _read_flags(flags, model)
    # argparse takes a value of two dashes away, also behind an equals sign.
    dashes = [word.removesuffix("=--").removeprefix("--") for word in words if word.endswith("=--")]
    words = [word for word in words if not word.endswith("=--")]
    if words != ["--help"]:
        problems += [_unknown(v, n, model) for n, v in _variables().items() if n not in _settings(model)]

    class Sources(model):  # type: ignore[valid-type,misc]
        __doc__ = description

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                InitSettingsSource(settings_cls, init_kwargs=_nested(dict.fromkeys(dashes, "--"))),
                _command_line(settings_cls, program)(args=words),
                _Environment(settings_cls),
                InitSettingsSource(settings_cls, init_kwargs=values),
            )

    try:
        merged = Sources()
    except ValidationError as error:
        problems += [_line(e, model) for e in error.errors()]
    except SettingsError as error:
        problems.append(re.sub(r"^error parsing CLI: ", "", str(error).splitlines()[0]))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return model.model_construct(**{name: getattr(merged, name) for name in model.model_fields})


def _nested(values: Mapping[str, str]) -> dict[str, Any]:
    """Values by dotted names as the mappings that a config file would have."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, key = name.split(".")
        section = nested
        for group in groups:
            section = section.setdefault(group, {})
        section[key] = value
    return nested


def _as_written(value: object) -> str:
    """A value as the user may have written it, cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _line(error: Any, model: type[RunConfig]) -> str:
    """One of pydantic's errors as a line for the user."""
    path = [str(part) for part in error["loc"]]
    name, value, message = ".".join(path), error.get("input"), str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _groups(model).get(".".join(path[:-1]), [])
        similar = difflib.get_close_matches(path[-1], known, 1, cutoff=0.6)
        hint = f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(known)}"
        return f"{name}: unknown setting; {hint}"
    if error["type"] == "missing":
        return f"{name}: missing: give a value"
    if error["type"] == "value_error" and isinstance(value, BaseModel | dict):
        return message if message.startswith(name) else f"{name}.{message}"  # it names the setting
    message = message.removeprefix("Input ").partition(", unable to")[0]
    message = message.replace("a valid tuple", "a list")
    if "valid dictionary" in message:
        message = "should be a mapping of settings"
    if error["type"] == "literal_error":
        similar = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", message), 1, cutoff=0.6)
        message += f"; did you mean {similar[0]!r}?" if similar else ""
    separator = " " if message.startswith(("should", "must", "is ")) else " is not valid: "
    return f"{name}: {_as_written(value)}{separator}{message}"
