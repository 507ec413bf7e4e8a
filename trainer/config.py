"""What a run is: one model, filled from a YAML file < the environment (TRAINER_...) < flags.

Unknown keys, wrong types and impossible combinations are errors of one line each, raised before anything starts. The
options of a workload live in that workload's file; `config_class` builds the model around them.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

PROTOCOLS = ("file", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss", "ssh", "sftp", "webdav")
DATA_SETS = (
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "lsun", "imagenet", "folder", "shards", "fake",
)  # fmt: skip
_UNITS = {
    "step": "steps", "epoch": "epochs", "sample": "samples",
    "second": "seconds", "minute": "minutes", "hour": "hours",
}  # fmt: skip
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_MAX_YAML_BYTES = 1 << 20
_WRITE_A_DURATION = "write a number and a unit: steps, epochs, samples, seconds, minutes or hours"
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2."""


class Duration(BaseModel):
    """An amount of training in the user's unit: '5 epochs', '2000 steps', '100000 samples', '3 hours'."""

    model_config = ConfigDict(frozen=True)
    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([a-z]+?)s?\s*", text)
        if not match or match[2] not in _UNITS:
            raise ValueError(_WRITE_A_DURATION)
        amount = float(match[1].replace("_", ""))
        if not math.isfinite(amount):
            raise ValueError("is longer than a run can be")
        return cls(amount=amount, unit=_UNITS[match[2]])

    @property
    def seconds(self) -> float | None:
        """Length in seconds, or None where it is counted in training."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def steps(self, samples_per_step: int, epoch_samples: int) -> int:
        """Length in steps, rounded up; at least one for anything above zero."""
        assert self.seconds is None
        # In fractions: 0.07 epochs of 100 steps are 7 steps, where floats give 7.000000000000001.
        per_unit = {"steps": Fraction(1), "samples": Fraction(1, samples_per_step),
                    "epochs": Fraction(epoch_samples, samples_per_step)}  # fmt: skip
        return math.ceil(Fraction(str(self.amount)) * per_unit[self.unit])


def _duration(allowed: Callable[[Duration], bool], message: str) -> BeforeValidator:
    def check(text: object) -> object:
        if text is None:  # for the settings that may be off
            return None
        if not isinstance(text, str):
            raise ValueError(_WRITE_A_DURATION)
        if not allowed(Duration.parse(text)):
            raise ValueError(message)
        return text

    return BeforeValidator(check)


Length = Annotated[str, _duration(lambda d: d.amount > 0, "must be longer than zero")]
Interval = Annotated[
    str, _duration(lambda d: d.seconds is None and d.amount > 0, "must be in steps, epochs or samples, and above zero")
]
WarmUp = Annotated[str, _duration(lambda d: d.seconds is None, "must be in steps, epochs or samples")]
Share = Annotated[float, Field(ge=0, lt=1)]


def _yes_or_no(value: object) -> object:
    """YAML reads the words yes and no as booleans."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


class _Checked(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        """`batch_size: yes` is a mistake, where pydantic would take it for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            kinds = (field.annotation, *get_args(field.annotation)) if field else ()
            if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
                raise ValueError(f"{name}: {json.dumps(value)} should be a number")
        return values


class Options(_Checked):
    """Base of every group of settings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class DataOptions(Options):
    name: Literal[DATA_SETS] = "digits"  # type: ignore[valid-type]
    """The data set. `folder` is train/ and val/ or test/ with a folder per class; `shards` is tar files."""
    root: str | None = None
    """Folder or URL that holds the data. Default: $TRAINER_DATA, else ./data."""
    download: bool = True
    """Whether missing files may be fetched."""
    size: int | None = Field(None, ge=4, le=1024)
    """Height and width in pixels for image folders, shards, LSUN, ImageNet and fake data. Default: 224; fake: 32."""
    resident: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_or_no)] = "auto"
    """Keep the set as one uint8 tensor on the device; auto does so for the small sets."""
    workers: int = Field(2, ge=0, le=128)
    """Loader processes per rank, where the set is not resident. Changes speed only, never a batch."""
    bad_images: int = Field(0, ge=0)
    """How many unreadable images a run may replace by a neighbour before it stops and lists them."""
    pad_crop: int = Field(0, ge=0, le=64)
    """Pad by so many pixels and crop at random."""
    flip: bool = False
    """Mirror half of the images."""
    resized_crop: bool | None = None
    """Crop at random and resize. Default: on for image folders, shards, LSUN and ImageNet, off elsewhere."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment (Müller and Hutter 2021) or RandAugment (Cubuk et al. 2020)."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of random erasing (Zhong et al. 2020)."""
    samples: int = Field(2048, ge=1)
    """Fake data only: size of the training split; the test split is a quarter of it."""
    classes: int = Field(10, ge=1)
    """Fake data only."""
    channels: Literal[1, 3] = 3
    """Fake data, image folders and shards: 1 (grey) or 3 (colour)."""


class OptimizerOptions(Options):
    name: Literal["sgd", "adam", "adamw"] = "adam"
    """SGD, Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019)."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only; needs momentum."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam and AdamW only."""
    eps: float = Field(1e-8, gt=0)
    """Adam and AdamW only: added to the denominator."""
    weight_decay: float = Field(0.0, ge=0)
    """Never applied to norms and biases."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient over all parameters of a phase. Default: not clipped."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerOptions:
        if self.nesterov and not self.momentum:
            raise ValueError(
                "optimizer.nesterov: true needs momentum above zero: set optimizer.momentum, for example to 0.9"
            )
        if self.momentum and self.name != "sgd":
            raise ValueError(
                f"optimizer.momentum: {self.momentum} is a setting of sgd, not of {self.name}: use optimizer.betas"
            )
        return self


class ScheduleOptions(Options):
    name: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """How the learning rate falls. cosine and one_cycle need a duration that is not a time."""
    warmup: WarmUp = "0 steps"
    """Linear rise from zero; for one_cycle the rising part."""
    every: Interval = "30 epochs"
    """step only: multiply by gamma this often."""
    gamma: float = Field(0.1, gt=0, le=1)
    """step only."""
    final: float = Field(0.0, ge=0, le=1)
    """cosine and one_cycle: the last learning rate as a share of the peak."""


class EvaluateOptions(Options):
    every: Interval = "1 epoch"
    """How often to evaluate; the end of training always does."""
    split: Literal["auto", "val", "test", "train"] = "auto"
    """auto: val where there is one, else test."""
    batch_size: int = Field(500, ge=1)
    """Global. Changes speed and memory only."""
    samples: int | None = Field(None, ge=1)
    """Evaluate only so many of the first samples of the split, for a quick look. Default: all."""


class CheckpointOptions(Options):
    every: Length = "1 epoch"
    """May be a time: '10 minutes'."""
    keep: int = Field(3, ge=1)
    """How many of the newest to keep; the best one stays as well."""
    keep_every: Interval | None = None
    """Keep a checkpoint this often for ever. Default: never."""


class LogOptions(Options):
    every: Interval = "50 steps"
    """How often to log loss, learning rate and speed."""


class WandbOptions(Options):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: what WANDB_MODE says, else online when logged in, else offline."""
    project: str = "trainer"
    """Project that the run is listed under."""
    entity: str | None = None
    """User or team. Default: the one of the login."""
    group: str | None = None
    """Group of runs to show together. Default: none."""
    tags: tuple[str, ...] = ()
    """Labels to find the run by."""


class RunOptions(Options):
    url: str | None = None
    """Where the run lives: a folder or an fsspec URL. Default: runs/<config name>."""
    force_resume: bool = False
    """Resume even though the config differs in a way that changes the result."""


class WorkloadOptions(Options):
    """Base of the options that a workload's file defines as `Options`; `name` is the file's name."""

    name: str
    """What is trained: the name of a file in trainer/workloads."""


class RunConfig(_Checked, BaseSettings):
    """Settings of a run. `config_class` adds the workload's options."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, env_prefix="TRAINER_", env_nested_delimiter="__",
        validate_default=True,
    )  # fmt: skip

    workload: WorkloadOptions
    data: DataOptions = DataOptions()
    batch_size: int = Field(32, ge=1)
    """Global: the same at every world size."""
    accumulation: int = Field(1, ge=1)
    """Cut each global batch into so many micro-batches, to save memory."""
    duration: Length = "30 epochs"
    """Epochs, steps, samples or hours."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of weights, data order, augmentation and every draw in a step."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """bf16 is autocast with fp32 weights; auto is bf16 on a GPU, fp32 elsewhere."""
    batch_norm: Literal["sync", "local"] = "sync"
    """sync: statistics of the global batch, so that the world size changes nothing; local: of a rank's rows."""
    channels_last: bool | None = None
    """Memory format. Default: what the network says is faster."""
    compile: bool = False
    """torch.compile the networks. Pays off on a GPU; on a CPU it mostly does not."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the accelerator where there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per rank. Default: cores / ranks."""
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    evaluate: EvaluateOptions = EvaluateOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()
    wandb: WandbOptions = WandbOptions()
    run: RunOptions = RunOptions()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation: {self.accumulation} micro-batches cannot be cut from a batch of {self.batch_size}: "
                f"lower accumulation or raise batch_size"
            )
        timed = Duration.parse(self.duration).seconds is not None
        if timed and self.schedule.name in ("cosine", "one_cycle"):
            raise ValueError(
                f"schedule.name: {self.schedule.name!r} needs to know the number of steps, which duration "
                f"{self.duration!r} does not give: set duration in epochs, steps or samples, or use constant or step"
            )
        if self.run.url is not None:
            check_url(self.run.url)
        return self


# Settings that may differ when a run is resumed, because they do not change what is computed from there on.
SAFE_TO_CHANGE = (
    "duration", "evaluate", "checkpoint", "log", "wandb", "run", "threads", "data.root", "data.download",
    "data.workers", "data.resident", "data.bad_images",
)  # fmt: skip


def check_url(url: str) -> None:
    protocol, separator, path = url.partition("://")
    if separator and protocol not in PROTOCOLS:
        raise ValueError(f"run.url: protocol {protocol!r} is not supported; use one of: {', '.join(PROTOCOLS)}")
    if re.match(r"[^/@]*:[^/@]+@", path):
        raise ValueError(
            "run.url: a password does not belong into a URL: use the environment or a profile of the backend"
        )
    if not url.strip() or (separator and not path.strip("/")):
        raise ValueError(f"run.url: {url!r} names no place: give a folder, or a URL such as s3://bucket/folder")
    if separator and ".." in path.split("/"):
        raise ValueError(f"run.url: {url!r} must not contain '..': write the path out")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if name.tag != "tag:yaml.org,2002:str":
                raise UserError(f"the key in line {name.start_mark.line + 1} is not a name: write `setting: value`")
            if name.value in seen:
                raise UserError(f"duplicate key {name.value!r} in line {name.start_mark.line + 1}: keep one of them")
            seen.add(name.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """A config as plain data; raises UserError with the file's name."""
    if len(text) > _MAX_YAML_BYTES:
        raise UserError(f"{name}: too long for a config; the limit is {_MAX_YAML_BYTES} bytes")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{name}: YAML aliases (*name) are not supported: write the value out")
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{name}: not valid YAML{where}: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-01, brackets a thousand deep
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"{name}: not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{name}: a config is a mapping of settings, not a {type(values).__name__}")
    return values


def read_file(path: str) -> dict[str, Any]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return read_yaml(file.read(_MAX_YAML_BYTES + 1), path)
    except FileNotFoundError:
        there = {p.stem: str(p) for p in sorted(Path(path).parent.glob("*.yaml"))}
        near = difflib.get_close_matches(Path(path).stem, there, 1)
        hint = f"did you mean {there[near[0]]!r}?" if near else "check the path"
        raise UserError(f"no config file {path!r}: {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None


def config_class(*workloads: type[WorkloadOptions], default: WorkloadOptions | None = None) -> type[RunConfig]:
    """The settings model for these workloads' options (one to run, all of them for the JSON schema)."""
    kind: Any = workloads[0]
    if len(workloads) > 1:
        kind = Annotated[Union[workloads], Field(discriminator="name")]  # noqa: UP007 - a runtime tuple
    return create_model("Config", __base__=RunConfig, workload=(kind, ... if default is None else default))


def _settings(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by its dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _settings(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def _groups(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """The keys of every group of settings, by its dotted name."""
    found = {prefix.rstrip("."): list(model.model_fields)}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _groups(field.annotation, f"{prefix}{name}.")
    return found


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
    """Words, words with commas or a JSON list, as a JSON list."""
    if len(items) == 1 and items[0].lstrip().startswith("["):
        try:
            json.loads(items[0])
            return items[0]
        except ValueError:
            pass
    return json.dumps([part for item in items for part in item.split(",") if part])


def _unknown(what: str, name: str, model: type[RunConfig], prefix: str = "") -> str:
    settings, groups = list(_settings(model)), _groups(model)
    if name and name in groups:
        return f"{what}: a group of settings: set one of {', '.join(f'{prefix}{name}.{key}' for key in groups[name])}"
    ends = [setting for setting in settings if setting.rpartition(".")[2] == name]
    near = ends or difflib.get_close_matches(name, settings, 1, cutoff=0.6)
    way_out = f"did you mean {' or '.join(prefix + n for n in near)}?" if near else "'train --help' lists all"
    return f"{what}: unknown setting; {way_out}"


def _read_flags(words: Sequence[str], model: type[RunConfig]) -> tuple[list[str], list[str]]:
    """The flags as `--name=value`, in which a value may begin with a dash, and a line per mistake."""
    settings = _settings(model)
    flags: dict[str, str] = {}
    problems: list[str] = []
    rest = list(words)

    def values() -> list[str]:
        found = []
        while rest and not rest[0].startswith("--"):
            found.append(rest.pop(0))
        return found

    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return ["--help"], []
        if not word.startswith("--"):
            problems.append(f"{word}: neither a flag nor the value of one: give one config file, then --setting value")
            continue
        _, given, value = word.partition("=")
        name = _name(word)
        positive = _positive(name)
        if name in settings:
            field = settings[name]
        elif positive in settings and _is_boolean(settings[positive]):
            flags[positive] = "false"
            if given:
                problems.append(f"{word}: takes no value: write --{positive} or --{positive}=false")
            continue
        else:
            problems.append(_unknown(f"--{word[2:].partition('=')[0]}", name, model, "--"))
            values()
            continue
        if _is_boolean(field):
            alone = not given and not (rest and rest[0].lower() in _BOOLEANS)
            flags[name] = "true" if alone else value if given else rest.pop(0)
        elif get_origin(field.annotation) is tuple:
            items = [value] if given else values()
            flags[name] = _list_text(items)
            if not items:
                problems.append(f"--{name}: has no value: write --{name} VALUE ...")
        elif given or (rest and not rest[0].startswith("--")):
            flags[name] = value if given else rest.pop(0)
        else:
            problems.append(f"--{name}: has no value: write --{name} VALUE, or --{name}=VALUE if it begins with --")
    return [f"--{name}={value}" for name, value in flags.items()], problems


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
        settings, found = _settings(self.settings_cls), {}
        for name, variable in _variables().items():
            if name in settings:
                value = os.environ[variable]
                is_list = get_origin(settings[name].annotation) is tuple
                found[variable.lower()] = _list_text([value]) if is_list else value
        return found


class _Help(argparse.HelpFormatter):
    """Help in which the choices of a setting stand in its text, not between its name and its text."""

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
        shown = {"int": "N", "float": "X", "str": "TEXT"}
        return f"{flag} {'CHOICE' if kind.startswith('{') else shown.get(kind, kind)}"

    def _expand_help(self, action: argparse.Action) -> str:
        # What a setting without a value means is in its text, after 'Default:'.
        text = re.sub(r" \(default: (null|None)\)", "", super()._expand_help(action))
        kind = str(action.metavar or "")
        return f"{kind[1:-1].replace(',', ' | ')}. {text}" if kind.startswith("{") else text


def build(
    model: type[RunConfig], values: dict[str, Any], flags: Sequence[str], program: str, description: str
) -> RunConfig:
    """Merge file values, environment and flags; raises UserError with a line per mistake. Prints help on --help."""
    words, problems = _read_flags(flags, model)
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
            arguments = CliSettingsSource[argparse.ArgumentParser](
                settings_cls,
                cli_prog_name=program,
                cli_parse_none_str="null",
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_exit_on_error=False,
                cli_enforce_required=False,
                formatter_class=_Help,
            )
            arguments.root_parser.usage = f"{program} [--setting value ...]"
            return (
                arguments(args=words),
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


def _shown(value: object) -> str:
    """A value as the user may have written it, cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _line(error: Any, model: type[RunConfig]) -> str:
    where = [str(part) for part in error["loc"]]
    name, value, message = ".".join(where), error.get("input"), str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _groups(model).get(".".join(where[:-1]), [])
        near = difflib.get_close_matches(where[-1], known, 1, cutoff=0.6)
        way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{name}: unknown setting; {way_out}"
    if error["type"] == "missing":
        return f"{name}: missing: give a value"
    if error["type"] == "value_error" and isinstance(value, BaseModel | dict):
        return message if message.startswith(name) else f"{name}.{message}"  # it names the setting
    message = message.removeprefix("Input ").partition(", unable to")[0]
    message = message.replace("a valid tuple", "a list")
    if "valid dictionary" in message:
        message = "should be a mapping of settings"
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", message), 1, cutoff=0.6)
        message += f"; did you mean {near[0]!r}?" if near else ""
    separator = " " if message.startswith(("should", "must", "is ")) else " is not valid: "
    return f"{name}: {_shown(value)}{separator}{message}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings whose value differs between two dumped configs, by dotted name."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(n for n in new if n not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


def is_safe(name: str) -> bool:
    """Whether a setting may change between the lives of a run."""
    return any(name == safe or name.startswith(safe + ".") for safe in SAFE_TO_CHANGE)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that reads back to itself."""
    values = config.model_dump(mode="json")
    # PyYAML writes these three as they are and reads them back as line ends.
    odd = any(character in json.dumps(values, ensure_ascii=False) for character in "\x85\u2028\u2029")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=not odd)


def data_root(config: RunConfig) -> str:
    return config.data.root or os.environ.get("TRAINER_DATA") or "data"
