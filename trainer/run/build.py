"""The recipe of a run: all that its config says, checked and built once, for whoever trains, evaluates or measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch

from .. import schedule, workloads
from ..boundary import Boundary
from ..config.duration import Duration
from ..config.options import DataOptions, RunConfig, UserError, data_root
from ..data.dataset import DataSet, plan_of, relabelled, subsample
from ..data.description import Batch, Description, ImageDescription
from ..data.loader import BatchLoader
from ..data.plan import BatchPlan
from ..data.sources import open_data
from ..distributed.runtime import Runtime
from ..engine import Engine
from ..metrics.evaluator import Evaluator, Scores
from ..schedule import NEVER, Every, Limits, Schedule
from ..services import Saver, Tracker
from ..state import Mismatch, TrainState
from ..storage.checkpoint import Checkpoint
from ..workload import Workload
from .feature_classifier import FeatureClassifier, Untrained
from .reference import Reference, open_reference


def run_url(config: RunConfig, name: str) -> str:
    return config.run.url or str(Path("runs") / name)


def open_run_data(config: RunConfig, root: str | None = None, split: str | None = None) -> DataSet:
    """The data set of a run; raises UserError."""
    data = open_data(config.data, root or data_root(config), split or config.evaluate.split)
    return data if config.evaluate.samples is None else subsample(data, config.evaluate.samples)


@dataclass
class Recipe:
    """What goes into a run; durations are in steps from here on."""

    config: RunConfig
    data: DataSet
    workload: Workload  # with its initial weights
    plan: BatchPlan
    samples_per_step: int
    limits: Limits
    reference: Reference | None = field(default=None, init=False)  # where the evaluator compares with real images

    def check(self) -> None:
        """Raises UserError for what would show later only, when the process group is up."""
        _ = self.schedule, self.untrained

    @property
    def untrained(self) -> FeatureClassifier | None:
        """What has to be trained before there is an evaluator; raises UserError."""
        try:
            _ = self.evaluator
        except Untrained as missing:
            return missing.classifier
        return None

    @cached_property
    def schedule(self) -> Schedule:
        """Raises UserError where the warm-up would never end."""
        s, whole, total = self.config.schedule, f"the run, {self.config.duration!r}", self.limits.total_steps

        def steps(text: str) -> int:
            return Duration.parse(text).steps(self.samples_per_step, self.plan.size)

        if s.length is not None:
            whole, total = f"schedule.length, {s.length!r}", steps(s.length)
        warmup = steps(s.warmup)
        if total is not None and warmup >= total:
            raise UserError(f"schedule.warmup: {s.warmup!r} is not shorter than {whole}: shorten the warm-up")
        return schedule.build(s.name, total or 0, warmup, steps(s.every), s.gamma, s.final, s.flat)

    @cached_property
    def evaluator(self) -> Evaluator:
        return self.workload.evaluator(self._scores)

    def _scores(self) -> Scores:
        other = self.data.partner or self.data  # what is made of one set is compared with the other
        self.reference = self.reference or open_reference(self.config, other.description)
        return self.reference.scores

    def renew_workload(self) -> None:
        """Initial weights again, after a rollback."""
        self.workload = workloads.build(self.config, self.data.description)
        self.evaluator = self.workload.evaluator(self._scores)

    def prepare_workload(self, runtime: Runtime, compiled: bool = False) -> None:
        """Move the workload to the device."""
        runtime.prepare(self.workload, self.config.channels_last, compiled)

    @property
    def data_options(self) -> DataOptions:
        """With the default of the kind of workload: what makes images is to learn whole ones."""
        options = self.config.data
        if options.resized_crop is None and self.workload.generates:
            return options.model_copy(update={"resized_crop": False})
        return options

    def open_loader(self, runtime: Runtime) -> BatchLoader:
        config, workload = self.config, self.workload
        return BatchLoader(
            self.data, self.plan, self.data_options, rank=runtime.rank, world=runtime.world, device=runtime.device,
            dtype=runtime.dtype, evaluation_batch=config.evaluate.batch_size, input_range=workload.input_range,
            channels_last=runtime.channels_last(workload, config.channels_last),
        )  # fmt: skip

    def example_batch(self, rows: int) -> Batch:
        """The first rows of training, on the CPU in fp32."""
        return next(self.plain_loader(rows).train(0))[0][1]

    def plain_loader(self, rows: int) -> BatchLoader:
        """Without a process group, on the CPU in fp32, reading what it is asked for alone."""
        plan = replace(self.plan, batch_size=rows, accumulation=1)
        return BatchLoader(
            self.data, plan, self.data_options.model_copy(update={"workers": 0, "resident": "no"}), rank=0, world=1,
            device=torch.device("cpu"), dtype=torch.float32, channels_last=False, evaluation_batch=rows,
            input_range=self.workload.input_range,
        )  # fmt: skip

    def engine(
        self, runtime: Runtime, loader: BatchLoader, tracker: Tracker, saver: Saver, *,
        checkpoint: Checkpoint | None = None, rollbacks: int = 0,
    ) -> Engine:  # fmt: skip
        """The engine, at its first step or at a checkpoint; raises UserError where that is of another network."""
        config, evaluator = self.config, self.evaluator
        state = TrainState(self.workload, runtime, self.plan, evaluator.headline, evaluator.maximise)
        if checkpoint is not None:
            try:
                state.restore(checkpoint)
            except Mismatch as error:
                raise UserError(f"run.url: {error}: use another run.url") from None
        factor = config.health.lr_factor**rollbacks
        schedule = (lambda step: factor * self.schedule(step)) if rollbacks else self.schedule
        boundary = Boundary(
            runtime, state, evaluator, loader, tracker, saver, self.limits, self.samples_per_step, config.seed
        )  # fmt: skip
        return Engine(boundary, schedule, rollbacks, config.optimizer.clip_norm, config.cuda_graphs)

    def prepare_reference(self, loader: BatchLoader, runtime: Runtime) -> None:
        """Take the statistics that generated images are compared with, where they are; all ranks together."""
        if self.reference is not None:
            self.reference.prepare(loader.partner or loader, runtime)


def recipe(
    config: RunConfig, world: int, *, data: DataSet | None = None, workload: Workload | None = None
) -> Recipe:  # fmt: skip
    """The recipe of a config on so many ranks; raises UserError for all that does not fit together.

    `data` and `workload` are those of the config unless others are passed, such as trained ones.
    """
    data = data or open_run_data(config)
    if workload is None:
        workload = workloads.build(config, data.description)
    else:
        if isinstance(workload.data, ImageDescription):
            data = relabelled(data, workload.data.classes)
        check_outputs(workload.data, data.description)
        workload.data = data.description  # the networks stay as they are, but this split may have another size
    plan = _plan(config, data, workload, world)
    samples_per_step = plan.batch_size * workload.batches_per_step
    limits = _limits(config, samples_per_step, plan.size)
    return Recipe(config, data, workload, plan, samples_per_step, limits)


def check_outputs(trained: Description, here: Description) -> None:
    """Raises UserError where a trained network's outputs would stand for something else on this data."""
    for name, what in (("classes", "other classes"), ("vocabulary", "another vocabulary")):
        old, new = getattr(trained, name, None), getattr(here, name, None)
        if old != new:
            raise UserError(
                f"data.root: the data there has {what} than the run was trained with{_change(old, new)}: "
                f"set data.root to that data, or train another run on this"
            )


def _change(old: Sequence[str] | None, new: Sequence[str] | None) -> str:
    """Names that came and went, as far as they can be told apart and be read."""
    gone, come = sorted(set(old or ()) - set(new or ())), sorted(set(new or ()) - set(old or ()))
    if not gone and not come:
        return " (in another order)"
    parts = [f"{verb} {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for verb, names in
             (("without", gone), ("with", come)) if names]  # fmt: skip
    return f" ({', '.join(parts)})" if all(name.isprintable() and len(name) > 1 for name in gone + come) else ""


def _plan(config: RunConfig, data: DataSet, workload: Workload, world: int) -> BatchPlan:
    """How the batches are cut. Raises UserError where a rank would be left without a sample, or a group be torn."""
    group = workload.group
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
    return plan_of(data, config.seed, config.batch_size, config.accumulation, group)


def _limits(config: RunConfig, samples_per_step: int, epoch_samples: int) -> Limits:
    def every(text: str | None) -> Every:
        if text is None or (length := Duration.parse(text)).seconds is not None:
            return NEVER
        return Every(max(Fraction(1), length.period(samples_per_step, epoch_samples)))

    duration, save = Duration.parse(config.duration), Duration.parse(config.checkpoint.every)
    return Limits(
        total_steps=None if duration.seconds is not None else duration.steps(samples_per_step, epoch_samples),
        total_seconds=duration.seconds,
        log=every(config.log.every),
        evaluate=every(config.evaluate.every),
        save=every(config.checkpoint.every),
        save_seconds=save.seconds,
        keep=every(config.checkpoint.keep_every),
        samples=every(config.samples.every),
        sample_count=config.samples.count,
        stop_when_unhealthy=config.health.action != "warn",
        bad_samples=config.data.bad_images,
    )
