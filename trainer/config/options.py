"""What a run is: one pydantic model. Unknown keys, wrong types and impossible combinations are errors.

The options of a workload live in that workload's file; settings.py builds the model around them and fills it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSuppress,
    SettingsConfigDict,
)

from ..storage.protocols import PROTOCOLS
from .data_sets import DATA_SETS
from .duration import Duration, Interval, Length, WarmUp
from .yaml_file import write_yaml

HALVES = ("halves",)  # as domains: the even and the odd samples of a set
Share = Annotated[float, Field(ge=0, lt=1)]


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit code 2."""


def _yes_or_no(value: object) -> object:
    """YAML reads the words yes and no as booleans."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _number(value: object) -> object:
    """Flags and the environment give text, which a Literal of numbers does not take."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _names(value: object) -> object:
    """'horse,deer' on the command line, a list in YAML, where the names of digits are numbers."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
    return tuple(str(name) if type(name) is int else name for name in value) if isinstance(value, list) else value


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
    name: str = Field(
        "digits",
        description=f"The data set: {', '.join(DATA_SETS)}, or path/to/file.py:FUNCTION. `folder` is train/ and "
        "val/ or test/ with a folder per class; `shards` is tar files; `pairs` is train/ and val/ or test/ with A and "
        "B side by side in each image, or in folders A and B under equal names; `text` is a file or a folder of *.txt.",
        json_schema_extra={"examples": list(DATA_SETS)},
    )
    root: str | None = None
    """Folder or URL that holds the data. Default: $TRAINER_DATA, else ./data."""
    download: bool = True
    """Whether missing files may be fetched."""
    size: int | None = Field(None, ge=4, le=1024)
    """Height and width of the images in pixels. Default: as they are; image folders, shards, LSUN and ImageNet: 224,
    pairs: 256."""
    resident: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_or_no)] = "auto"
    """Keep the set as one uint8 tensor on the device; auto does so for the small sets."""
    workers: int = Field(2, ge=0, le=128)
    """Loader processes per rank, where the set is not resident. Changes speed only, never a batch."""
    bad_images: int = Field(0, ge=0)
    """How many unreadable images a run may replace by a neighbour before it stops and lists them."""
    domains: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """Cut the set in two, for translation without pairs: the names of two classes, or `halves`, its even and its odd
    samples. Default: not cut."""
    pad_crop: int = Field(0, ge=0, le=64)
    """Pad by so many pixels and crop at random."""
    flip: bool = False
    """Mirror half of the images."""
    resized_crop: bool | None = None
    """Crop at random and resize. Default: on for classifiers of image folders, shards, LSUN and ImageNet, else off."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment (Müller and Hutter 2021) or RandAugment (Cubuk et al. 2020)."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of random erasing (Zhong et al. 2020)."""
    samples: int = Field(2048, ge=1)
    """Fake data only: size of the training split; the test split is a quarter of it."""
    classes: int = Field(10, ge=1)
    """Fake data only."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_number)] = 3
    """Fake data, image folders, shards and pairs: 1 (grey) or 3 (colour)."""
    background: Literal["white", "grey", "black"] = "white"
    """Image files: what is seen through their transparent pixels."""
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    """Pairs only: which of the two images is made of the other; A is the left one."""
    level: Literal["character", "word"] = "character"
    """Text only: what its tokens are."""
    vocabulary: int = Field(5000, ge=1)
    """Words only: so many of the most frequent ones are tokens; all others are spelled in characters."""
    length: int = Field(64, ge=1)
    """Text only: tokens of a window, over which the gradient flows back; the state is carried on to the next one."""
    ngram: int = Field(6, ge=0, le=16)
    """Text only: order of the n-gram that each evaluation stands beside; 0 is none."""

    @field_validator("domains")
    @classmethod
    def _two(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names and names != HALVES and (len(names) != 2 or len(set(names)) != 2):
            raise ValueError("must be two different classes, such as [horse, deer], or `halves`")
        return names

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name in DATA_SETS or "." in name:
            return name
        near = difflib.get_close_matches(name, DATA_SETS, 1, cutoff=0.6)
        way_out = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"known: {', '.join(DATA_SETS)}, or path/to/file.py:FUNCTION{way_out}")


class OptimizerOptions(Options):
    name: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    """SGD, Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) or RMSprop (Hinton 2012)."""
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
    name: Literal["constant", "step", "cosine", "one_cycle", "linear"] = "constant"
    """How the learning rate falls. cosine, one_cycle and linear need a length, or a duration that is not a time."""
    warmup: WarmUp = "0 steps"
    """Linear rise from zero; for one_cycle the rising part."""
    every: Interval = "30 epochs"
    """step only: multiply by gamma this often."""
    gamma: float = Field(0.1, gt=0, le=1)
    """step only."""
    flat: float = Field(0.5, ge=0, lt=1)
    """linear only: the share of the run before the learning rate begins to fall."""
    final: float = Field(0.0, ge=0, le=1)
    """cosine, one_cycle and linear: the last learning rate as a share of the peak."""
    length: Interval | None = None
    """cosine, one_cycle and linear: when the last learning rate is reached, to stay. Default: at the end of the run."""


class EvaluateOptions(Options):
    every: Interval = "1 epoch"
    """How often to evaluate; the end of training always does."""
    split: Literal["auto", "val", "test", "train"] = "auto"
    """auto: val where there is one, else test."""
    batch_size: int = Field(500, ge=1)
    """Global. Changes speed and memory only; of a text also how many rows begin without a state."""
    samples: int | None = Field(None, ge=1)
    """Evaluate only so many samples, evenly spread over the split, for a quick look. Default: all."""


class CheckpointOptions(Options):
    every: Length = "1 epoch"
    """May be a time: '10 minutes'."""
    keep: int = Field(3, ge=1)
    """How many of the newest to keep; the best one stays as well."""
    keep_every: Interval | None = None
    """Keep a checkpoint this often forever. Default: never."""


class LogOptions(Options):
    every: Interval = "50 steps"
    """How often to log loss, learning rate and speed."""


class SamplesOptions(Options):
    every: Interval = "1 epoch"
    """How often to draw the grid of generated samples, always from the same latents; the end of training does too."""
    count: int = Field(64, ge=1, le=1024)
    """Samples in the grid."""


class MetricsOptions(Options):
    """How generated images are evaluated, against as many held-out ones."""

    features: str = "pixels"
    """What they are compared by: pixels (8x8); the config of a classifier, such as configs/mnist_lenet5.yaml, which is
    trained first where it is missing; the URL of a run that trained one; or inception:FILE, the weights of
    torch-fidelity's Inception. The name of every score says which."""
    neighbours: int = Field(5000, ge=6)
    """Samples for KID, precision, recall, density and coverage, which compare every pair."""
    cache: str | None = None
    """Folder or URL that keeps the statistics of the real images. Default: every attempt computes them again."""


class HealthOptions(Options):
    """What to do when a generator collapses or does not converge."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """warn: only say so; stop: end the run; rollback: back to the best checkpoint with other noise and a lower rate."""
    rollbacks: int = Field(2, ge=1, le=100)
    """rollback only: how many times; after that the run stops."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """rollback only: what the learning rates are multiplied by, each time."""


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
    """Labels to find the run by. Default: none."""


class RunOptions(Options):
    url: str | None = None
    """Where the run lives: a folder or an fsspec URL. Default: runs/<config name>."""
    force_resume: bool = False
    """Resume even though the config differs in a way that changes the result."""


class WorkloadOptions(Options):
    """Base of the options that a workload's file defines as `Options`; `name` is filled in."""

    code: ClassVar[tuple[str, ...]] = ()  # settings that may name a user's file, besides `name`

    name: str = ""
    """What is trained: the name of a file in trainer/workloads, or the path of your own."""


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
    """Memory format. Default: on a GPU in bf16 yes, else what the network says is faster."""
    deterministic: bool = False
    """On a GPU: the same bits in every run, at some cost in speed. On a CPU they always are."""
    cuda_graphs: bool = False
    """On one GPU: replay the steps of networks that allow it, which makes small ones several times as fast."""
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
    samples: SamplesOptions = SamplesOptions()
    metrics: MetricsOptions = MetricsOptions()
    health: HealthOptions = HealthOptions()
    wandb: WandbOptions = WandbOptions()
    run: RunOptions = RunOptions()
    code: CliSuppress[dict[str, str]] = {}
    """The sha256 of the user's own files, filled in."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation: {self.accumulation} micro-batches cannot be cut from a batch of {self.batch_size}: "
                f"lower accumulation or raise batch_size"
            )
        endless = Duration.parse(self.duration).seconds is not None and self.schedule.length is None
        if endless and self.schedule.name in ("cosine", "one_cycle", "linear"):
            raise ValueError(
                f"schedule.name: {self.schedule.name!r} needs to know the number of steps, which duration "
                f"{self.duration!r} does not give: set duration or schedule.length in epochs, steps or samples, or use "
                f"constant or step"
            )
        if self.run.url is not None:
            check_url(self.run.url)
        return self


# Settings that may differ when a run is resumed, because they do not change what is computed from there on.
SAFE_TO_CHANGE = (
    "duration", "evaluate", "checkpoint", "log", "samples", "metrics", "health", "wandb", "run", "threads",
    "data.root", "data.download",
    "data.workers", "data.resident", "data.bad_images", "data.ngram",
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


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings whose value differs between two dumped configs, by dotted name."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(n for n in new if n not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changes |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changes[prefix + name] = (a, b)
    return changes


def is_safe(name: str) -> bool:
    """Whether a setting may change between attempts at a run."""
    return any(name == safe or name.startswith(safe + ".") for safe in SAFE_TO_CHANGE)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that reads back to itself."""
    values = config.model_dump(mode="json")
    # PyYAML writes these three as they are and reads them back as line ends.
    odd = any(character in json.dumps(values, ensure_ascii=False) for character in "\x85\u2028\u2029")
    return write_yaml(values, ascii_only=odd)


def data_root(config: RunConfig) -> str:
    return config.data.root or os.environ.get("TRAINER_DATA") or "data"
