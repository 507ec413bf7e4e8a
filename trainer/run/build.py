"""The parts of a run, each built from its config; what does not fit together is a UserError."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch

from .. import schedule, workloads
from ..config.options import Duration, RunConfig, UserError, WorkloadOptions, data_root
from ..config.settings import config_class, read_yaml
from ..data.dataset import DataSet, subsample
from ..data.description import Description
from ..data.loader import BatchLoader
from ..data.plan import BatchPlan
from ..data.sources import open_data
from ..distributed.runtime import Runtime
from ..engine import Every, Limits
from ..workload import Workload


def model_for(name: str) -> type[RunConfig]:
    """The settings of a run of this workload."""
    options: type[WorkloadOptions] = workloads.load(name).Options
    return config_class(options, default=options(name=name))


def load_config(text: str, name: str) -> RunConfig:
    """The config that a run directory keeps, alone: neither environment nor flags have a say."""
    values = read_yaml(text, name)
    model = model_for(str(values.get("workload", {}).get("name", "classifier")))
    try:
        groups = {n: f.annotation for n, f in model.model_fields.items()}
        parsed = {
            n: groups[n].model_validate(v) if isinstance(v, dict) else v  # type: ignore[union-attr]
            for n, v in values.items()
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{name}: not a config of this version: {str(error).splitlines()[0]}") from None
    return model.model_construct(**parsed)


def run_url(config: RunConfig, name: str) -> str:
    return config.run.url or str(Path("runs") / name)


def build_plan(config: RunConfig, samples: int, workload: Workload, world: int) -> BatchPlan:
    """How the batches are cut. Raises UserError where a rank would be left without a sample, or a group be torn."""
    group = workload.group
    plan = BatchPlan(config.seed, samples, config.batch_size, config.accumulation, group)
    smallest = config.batch_size // config.accumulation // group
    if smallest < world:
        pairs = f" in groups of {group}" if group > 1 else ""
        raise UserError(
            f"batch_size: {config.batch_size} in {config.accumulation} micro-batches{pairs} leaves some of the {world} "
            f"ranks without a sample: raise batch_size to {world * config.accumulation * group} or more, or lower "
            f"accumulation or the number of ranks"
        )
    if workload.whole_groups and config.batch_size % group:
        raise UserError(
            f"batch_size: {config.batch_size} is no multiple of {group}, the samples that are judged together"
        )
    return plan


def open_run_data(config: RunConfig, root: str | None = None, split: str | None = None) -> DataSet:
    """The data set of a run; raises UserError."""
    data = open_data(config.data, root or data_root(config), split or config.evaluate.split)
    return data if config.evaluate.samples is None else subsample(data, config.evaluate.samples)


def build_workload(config: RunConfig, data: Description) -> Workload:
    """The workload with its initial weights, which depend on the seed alone."""
    torch.manual_seed(config.seed)
    try:
        return workloads.load(config.workload.name).build(config.workload, data, config.optimizer)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_limits(config: RunConfig, samples_per_step: int, epoch_samples: int) -> Limits:
    def cadence(text: str | None) -> Every:
        if text is None or (every := Duration.parse(text)).seconds is not None:
            return Every(None)
        per_unit = {"steps": Fraction(1), "samples": Fraction(1, samples_per_step),
                    "epochs": Fraction(epoch_samples, samples_per_step)}  # fmt: skip
        return Every(max(Fraction(1), Fraction(str(every.amount)) * per_unit[every.unit]))

    duration, save = Duration.parse(config.duration), Duration.parse(config.checkpoint.every)
    timed = duration.seconds is not None
    return Limits(
        total_steps=None if timed else duration.steps(samples_per_step, epoch_samples),
        total_seconds=duration.seconds,
        log=cadence(config.log.every),
        evaluate=cadence(config.evaluate.every),
        save=cadence(config.checkpoint.every),
        save_seconds=save.seconds,
        keep=cadence(config.checkpoint.keep_every),
        bad_samples=config.data.bad_images,
        samples=cadence(config.samples.every),
        shown=config.samples.count,
        stop_when_unhealthy=config.health.action != "warn",
    )


def build_schedule(
    config: RunConfig, total: int | None, samples_per_step: int, epoch_samples: int
) -> schedule.Schedule:
    """Raises UserError where the warm-up would never end."""
    s = config.schedule
    warmup, every = (Duration.parse(text).steps(samples_per_step, epoch_samples) for text in (s.warmup, s.every))
    if total is not None and warmup >= total:
        raise UserError(
            f"schedule.warmup: {s.warmup!r} is not shorter than the run, {config.duration!r}: shorten the warm-up"
        )
    return schedule.build(s.name, total or 0, warmup, every, s.gamma, s.final)


def build_loader(
    config: RunConfig, data: DataSet, workload: Workload, plan: BatchPlan, runtime: Runtime
) -> BatchLoader:
    channels_last = workload.channels_last if config.channels_last is None else config.channels_last
    return BatchLoader(
        data, plan, config.data, rank=runtime.rank, world=runtime.world, device=runtime.device, dtype=runtime.dtype,
        channels_last=channels_last, evaluation_batch=config.evaluate.batch_size, symmetric=workload.symmetric,
    )  # fmt: skip
