"""What a run is: one model, filled from a YAML file < the environment (TRAINER_...) < flags.

Unknown keys, wrong types and impossible combinations are errors of one line each, raised before anything starts. The
options of a workload live in that workload's file; `config_class` builds the model around them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
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
            raise ValueError("write a number and a unit: steps, epochs, samples, seconds, minutes or hours")
        return cls(amount=float(match[1]), unit=_UNITS[match[2]])

    @property
    def seconds(self) -> float | None:
        """Length in seconds, or None where it is counted in training."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def steps(self, samples_per_step: int, epoch_samples: int) -> int:
        """Length in steps, rounded up; at least one for anything above zero."""
        assert self.seconds is None
        per_unit = {"steps": 1.0, "samples": 1 / samples_per_step, "epochs": epoch_samples / samples_per_step}
        return -int(-self.amount * per_unit[self.unit] // 1)


def _check(allowed: Callable[[Duration], bool], message: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not allowed(Duration.parse(text)):
            raise ValueError(message)
        return text

    return check


Length = Annotated[str, AfterValidator(_check(lambda d: d.amount > 0, "must be longer than zero"))]
Interval = Annotated[
    str,
    AfterValidator(
        _check(lambda d: d.seconds is None and d.amount > 0, "must be in steps, epochs or samples, and above zero")
    ),
]
WarmUp = Annotated[str, AfterValidator(_check(lambda d: d.seconds is None, "must be in steps, epochs or samples"))]


class Options(BaseModel):
    """Base of every group of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class DataOptions(Options):
    name: Literal[DATA_SETS] = "digits"  # type: ignore[valid-type]
    """The data set. `folder` is train/ and val/ or test/ with a folder per class; `shards` is tar files."""
    root: str | None = None
    """Folder or URL that holds the data. Default: $TRAINER_DATA, else ./data."""
    download: bool = True
    """Whether missing files may be fetched."""
    size: int | None = Field(None, ge=4, le=1024)
    """Height and width in pixels for image folders, shards, LSUN, ImageNet and fake data. Default: 224; fake: 32."""
    resident: Literal["auto", "yes", "no"] = "auto"
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
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only; needs momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam and AdamW only."""
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Never applied to norms and biases."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient over all parameters of a phase."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerOptions:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above zero: set optimizer.momentum, for example to 0.9")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum is a setting of sgd, not of {self.name}: use optimizer.betas")
        return self


class ScheduleOptions(Options):
    name: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
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
    split: Literal["auto", "val", "test", "train"] = "auto"
    """auto: val where there is one, else test."""
    batch_size: int = Field(500, ge=1)
    """Global. Changes speed and memory only."""


class CheckpointOptions(Options):
    every: Length = "1 epoch"
    """May be a time: '10 minutes'."""
    keep: int = Field(3, ge=1)
    """How many of the newest to keep; the best one stays as well."""
    keep_every: Interval | None = None
    """Keep these for ever."""


class LogOptions(Options):
    every: Interval = "50 steps"


class WandbOptions(Options):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when logged in, else offline."""
    project: str = "trainer"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class RunOptions(Options):
    url: str | None = None
    """Where the run lives: a folder or an fsspec URL. Default: runs/<config name>."""
    force_resume: bool = False
    """Resume even though the config differs in a way that changes the result."""


class WorkloadOptions(Options):
    """Base of the options that a workload's file defines as `Options`; `name` is the file's name."""

    name: str


class RunConfig(BaseSettings):
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
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """bf16 is autocast with fp32 weights; auto is bf16 on a GPU, fp32 elsewhere."""
    batch_norm: Literal["sync", "local"] = "sync"
    """sync: statistics of the global batch, so that the world size changes nothing; local: of a rank's rows."""
    channels_last: bool | None = None
    """Memory format. Default: what the network says is faster."""
    compile: bool = False
    """torch.compile the networks. Pays off on a GPU; on a CPU it mostly does not."""
    device: Literal["auto", "cpu"] = "auto"
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
    if separator and ".." in path.split("/"):
        raise ValueError(f"run.url: {url!r} must not contain '..': write the path out")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
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
        raise UserError(f"{name}: {len(text)} bytes is too long for a config; the limit is {_MAX_YAML_BYTES}")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UserError(f"{name}: YAML aliases (*name) are not supported: write the value out")
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}: not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{name}: a config is a mapping of settings, not a {type(values).__name__}")
    return values


def read_file(path: str) -> dict[str, Any]:
    try:
        return read_yaml(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        near = sorted(str(p) for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
        hint = difflib.get_close_matches(path, near, 1)
        raise UserError(
            f"no config file {path!r}" + (f": did you mean {hint[0]!r}?" if hint else ": check the path")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None


def config_class(*workloads: type[WorkloadOptions], default: WorkloadOptions | None = None) -> type[RunConfig]:
    """The settings model for these workloads' options (one to run, all of them for the JSON schema)."""
    kind: Any = workloads[0]
    if len(workloads) > 1:
        kind = Annotated[Union[workloads], Field(discriminator="name")]  # noqa: UP007 - a runtime tuple
    return create_model("Config", __base__=RunConfig, workload=(kind, ... if default is None else default))


class _Environment(EnvSettingsSource):
    """TRAINER_OPTIMIZER__LR and so on. TRAINER_DATA alone is the data folder, not the group `data`."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name: value for name, value in super()._load_env_vars().items() if name.lower() != "trainer_data"}


def build(
    model: type[RunConfig], values: dict[str, Any], flags: Sequence[str], program: str, description: str
) -> RunConfig:
    """Merge file values, environment and flags; raises UserError with a line per mistake. Prints help on --help."""

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
            arguments = CliSettingsSource(
                settings_cls,
                cli_prog_name=program,
                cli_parse_args=list(flags),
                cli_hide_none_type=True,
                cli_avoid_json=True,
                cli_implicit_flags=True,
                cli_exit_on_error=False,
                cli_enforce_required=False,
            )
            return arguments, _Environment(settings_cls), InitSettingsSource(settings_cls, init_kwargs=values)

    try:
        merged = Sources()
    except ValidationError as error:
        raise UserError("\n".join(_line(e, model) for e in error.errors())) from None
    except SettingsError as error:
        raise UserError(_flag_line(str(error), model)) from None
    return model.model_construct(**{name: getattr(merged, name) for name in model.model_fields})


def _groups(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """The keys of every group of settings, by its dotted name."""
    found = {prefix.rstrip("."): list(model.model_fields)}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _groups(field.annotation, f"{prefix}{name}.")
    return found


def _closest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _line(error: Any, model: type[RunConfig]) -> str:
    where = [str(part) for part in error["loc"]]
    name, value, message = ".".join(where), error.get("input"), str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        group = ".".join(where[:-1])
        return f"{name}: unknown setting; {_closest(where[-1], _groups(model).get(group, []))}"
    if not name or (error["type"] == "value_error" and isinstance(value, BaseModel | dict)):
        return message if not name or message.startswith(name) else f"{name}: {message}"
    message = message.removeprefix("Input ")
    return f"{name}: {value!r} {message if message.startswith('should') else 'is not valid: ' + message}"


def _flag_line(text: str, model: type[RunConfig]) -> str:
    unknown = re.search(r"unrecognized arguments: (\S+)", text)
    if unknown:
        flag = unknown[1].lstrip("-").split("=")[0]
        known = [f"{g}.{k}" if g else k for g, keys in _groups(model).items() for k in keys]
        if not unknown[1].startswith("-"):
            return f"{unknown[1]!r} is not a flag: give one config file, then --setting value"
        return f"--{flag}: unknown flag; {_closest(flag, known) if _near(flag, known) else 'see --help'}"
    return re.sub(r"^error parsing CLI: ", "", text.splitlines()[0])


def _near(name: str, known: Sequence[str]) -> bool:
    return bool(difflib.get_close_matches(name, known, 1, cutoff=0.6))


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def data_root(config: RunConfig) -> str:
    return config.data.root or os.environ.get("TRAINER_DATA") or "data"
