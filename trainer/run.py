"""One training run: checks, parts, resuming, the engine, and what is left behind for people and programs."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from . import pictures, schedule, workloads
from .checkpoint import CheckpointStore, Damaged, folder
from .config import Duration, RunConfig, UserError, WorkloadOptions, data_root, differences, dump, is_safe
from .data.loader import BatchLoader
from .data.plan import BatchPlan
from .data.sources import DataSet, open_data, spread
from .engine import Cadence, Engine, Limits, Metrics, Outcome
from .lease import Lease, LeaseHeld
from .runtime import Place, Runtime, StopSignals
from .settings import config_class, read_yaml
from .state import Groups, Mismatch, TrainState
from .storage import Storage, StorageError
from .tracker import Console, MetricLog, Silent, Sink, Tracker
from .wandb_sink import WandbSettings, WandbSink, logged_in, run_id
from .workload import Workload

T = TypeVar("T")
EXIT_SECONDS = 600.0  # how long the end of a run waits for its last checkpoint


def workload_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(workloads.__path__))


def workload_module(name: str) -> ModuleType:
    if name not in workload_names():
        raise UserError(f"workload.name: {name!r} is not known; known: {', '.join(workload_names())}")
    return importlib.import_module(f".workloads.{name}", __package__)


def model_for(name: str) -> type[RunConfig]:
    """The settings of a run of this workload."""
    options: type[WorkloadOptions] = workload_module(name).Options
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


def build_plan(config: RunConfig, samples: int, group: int, world: int) -> BatchPlan:
    plan = BatchPlan(config.seed, samples, config.batch_size, config.accumulation, group)
    smallest = config.batch_size // config.accumulation // group
    if smallest < world:
        pairs = f" in groups of {group}" if group > 1 else ""
        raise UserError(
            f"batch_size: {config.batch_size} in {config.accumulation} micro-batches{pairs} leaves some of the {world} "
            f"ranks without a sample: raise batch_size to {world * config.accumulation * group} or more, or lower "
            f"accumulation or the number of ranks"
        )
    return plan


def open_run_data(config: RunConfig, root: str | None = None, split: str | None = None) -> DataSet:
    """The data set of a run; raises UserError."""
    data = open_data(config.data, root or data_root(config), split or config.evaluate.split)
    return data if config.evaluate.samples is None else spread(data, config.evaluate.samples)


def build_workload(config: RunConfig, data: DataSet) -> Workload:
    """The workload with its initial weights, which depend on the seed alone."""
    torch.manual_seed(config.seed)
    try:
        return workload_module(config.workload.name).build(config.workload, data.description, config.optimizer)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_limits(config: RunConfig, samples_per_step: int, epoch_samples: int) -> Limits:
    def cadence(text: str | None) -> Cadence:
        if text is None or (every := Duration.parse(text)).seconds is not None:
            return Cadence(None)
        per_unit = {"steps": Fraction(1), "samples": Fraction(1, samples_per_step),
                    "epochs": Fraction(epoch_samples, samples_per_step)}  # fmt: skip
        return Cadence(max(Fraction(1), Fraction(str(every.amount)) * per_unit[every.unit]))

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
        faults=config.data.bad_images,
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
        channels_last=channels_last, evaluation_batch=config.evaluate.batch_size,
    )  # fmt: skip


def agreed(runtime: Runtime, work: Callable[[], T]) -> T:
    """Rank 0's result on every rank; what it raises for the user, all ranks raise."""
    value: T | None = None
    problem = ""
    if runtime.main:
        try:
            value = work()
        except (StorageError, Damaged, LeaseHeld, UserError) as error:
            problem = str(error)
    problem = runtime.broadcast(problem)
    if problem:
        raise UserError(problem)
    return runtime.broadcast(value)


class SilentSaver:
    """The saver of the ranks that are not the first."""

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None: ...


@dataclass
class Directory:
    """A run's directory as rank 0 works with it; also the engine's saver."""

    config: RunConfig
    name: str
    storage: Storage
    store: CheckpointStore
    lease: Lease
    log: MetricLog
    tracker: Tracker
    keep: Cadence
    headline: str
    maximise: bool
    signals: StopSignals
    last: tuple[int, Groups, dict[str, Any]] | None = None

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None:
        state = {**state, "headline": self.headline, "maximise": self.maximise}  # for those who prune later

        def work() -> None:
            self.tracker.flush()
            self.store.save(step, groups, state)
            self.last = None
            self.tracker.committed(step)
            try:
                self.prune()
            except StorageError as error:
                self.tracker.note(f"warning: old checkpoints were not deleted: {error}")

        self.store.wait()
        self.report_failure()
        if self.lease.lost:
            self.tracker.note(f"warning: another job has taken {self.storage} over: this one saves no more and stops")
            self.signals.received = self.signals.received or "the loss of its run directory"
            return
        self.last = (step, groups, state)
        self.store.in_background(work)

    def begin(self, step: int) -> None:
        """From here on the directory is ours: what earlier lives logged after `step` and how they ended is void."""
        self.storage.write("config.yaml", dump(self.config).encode())
        self.storage.delete("outcome.json")
        self.log.rewind(step)

    def prune(self) -> None:
        best = self.best()
        self.store.prune(self.config.checkpoint.keep, lambda step: step == best or self.keep.due(step))

    def best(self) -> int | None:
        return self.tracker.best(self.headline, self.maximise, self.store.steps())

    def report_failure(self) -> None:
        failure = self.store.failure()
        if failure is not None:
            self.tracker.note(f"warning: a checkpoint was not saved, training goes on: {failure}")

    def finish_saving(self) -> str | None:
        """Wait for the last checkpoint; where it cannot be saved, rescue it to the local disk and say where."""
        try:
            self.store.wait(EXIT_SECONDS)
        except TimeoutError as error:
            self.tracker.note(f"warning: {error}")
        failure = self.store.failure()
        if self.last is None:
            if failure is not None:
                self.tracker.note(f"warning: after the last checkpoint: {failure}")
            return None
        rescue = Storage(str(Path("runs") / f"{self.name}-rescued" / "checkpoints"))
        CheckpointStore(rescue).save(*self.last)
        return f"the last checkpoint could not be saved ({failure}); it is in {rescue}/{folder(self.last[0])}"

    def write_outcome(self, outcome: dict[str, Any]) -> None:
        if self.lease.lost:  # the directory is another job's, and so is its outcome
            return
        try:
            self.storage.write("outcome.json", json.dumps(outcome, indent=1).encode())
        except StorageError as error:
            self.tracker.note(f"warning: {error}")


def check_resume(config: RunConfig, stored: RunConfig, force: bool, note: Callable[[str], None]) -> None:
    """Print what differs from the run's config; raises UserError where that would change the result."""
    changes = differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
    changes = {name: change for name, change in changes.items() if not name.startswith("run.")}
    for name, (old, new) in changes.items():
        note(
            f"changed since the run began: {name}: {old!r} -> {new!r}{'' if is_safe(name) else ' (changes the result)'}"
        )
    unsafe = [name for name in changes if not is_safe(name)]
    if unsafe and not force:
        old, new = changes[unsafe[0]]
        more = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
        raise UserError(
            f"run.url: the run there was started with {unsafe[0]}: {old!r}, now it is {new!r}{more}: "
            f"use another run.url, or resume all the same with --run.force_resume"
        )


def read_outcome(storage: Storage) -> dict[str, Any]:
    try:
        return json.loads(storage.read("outcome.json"))
    except (StorageError, ValueError):
        return {}


def make_sinks(config: RunConfig, name: str, storage: Storage, note: Callable[[str], None]) -> tuple[Sink, ...]:
    w = config.wandb
    mode = os.environ.get("WANDB_MODE", "auto") if w.mode == "auto" else w.mode
    mode = ("online" if logged_in() else "offline") if mode not in ("online", "offline", "disabled") else mode
    if mode == "disabled":
        return ()
    where = Path(storage.url.removeprefix("file://")) if storage.local else Path("runs") / name
    settings = WandbSettings(
        mode, run_id(storage), name, w.project, w.entity, w.group, w.tags, str(where), config.model_dump(mode="json")
    )
    return (WandbSink(settings, note),)


def train(config: RunConfig, name: str) -> int:
    """Train, or go on training, or say that it is done; returns the exit code. Called by every rank."""
    place = Place.from_environment()
    with StopSignals() as signals:
        problem, data, workload = "", None, None
        try:
            data = open_run_data(config)
            workload = build_workload(config, data)
            plan = build_plan(config, len(data.train), workload.group, place.world)
            samples_per_step = plan.batch_size * workload.reads
            total = build_limits(config, samples_per_step, plan.size).total_steps
            build_schedule(config, total, samples_per_step, plan.size)
        except UserError as error:
            problem = str(error)
        with Runtime(
            place,
            device=config.device,
            precision=config.precision,
            batch_norm=config.batch_norm,
            threads=config.threads,
            signals=signals,
        ) as runtime:
            if problem := next(filter(None, runtime.gather(problem)), ""):
                raise UserError(problem)
            assert data is not None
            assert workload is not None
            return _train(config, name, runtime, data, workload)


def _train(config: RunConfig, name: str, runtime: Runtime, data: DataSet, workload: Workload) -> int:
    runtime.prepare(workload, config.channels_last, config.compile)
    plan = build_plan(config, len(data.train), workload.group, runtime.world)
    samples_per_step = plan.batch_size * workload.reads
    limits = build_limits(config, samples_per_step, plan.size)
    directory: Directory | None = None

    def open_directory() -> dict[str, Any] | None:
        """On rank 0: rights, lease, config, log. Returns the outcome where there is nothing left to do."""
        nonlocal directory
        storage = Storage(run_url(config, name))
        console = Console(limits.total_steps)
        storage.probe()
        lease = Lease(storage)
        try:
            lease.acquire()
        except LeaseHeld as holder:
            raise UserError(f"run.url: {storage} is in use by {holder}: wait for it, or use another run.url") from None
        log = MetricLog(storage)
        store = CheckpointStore(storage.at("checkpoints"))
        directory = Directory(
            config, name, storage, store, lease, log, Tracker(log, console), limits.keep, workload.headline,
            workload.maximise, runtime.signals,
        )  # fmt: skip
        if store.folders() and storage.exists("config.yaml"):
            stored = load_config(storage.read("config.yaml").decode(), f"{storage}/config.yaml")
            check_resume(config, stored, config.run.force_resume, console.note)
        outcome = read_outcome(storage)
        if outcome.get("status") == "done" and _reached(outcome, limits):
            return outcome
        return None

    try:
        if done := agreed(runtime, open_directory):
            if directory:
                directory.tracker.note(
                    f"{directory.storage} is done; give another run.url or a longer duration to train more"
                )
                _print_result(done)
            return 0
        return _resume_and_train(config, name, runtime, data, workload, plan, limits, directory)
    except UserError:
        raise
    except BaseException as error:
        if directory:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            directory.write_outcome({"status": "crashed", "step": None, "reason": reason})
        raise
    finally:
        if directory:
            directory.tracker.console.close()
            directory.lease.release()


def _reached(outcome: dict[str, Any], limits: Limits) -> bool:
    if limits.total_steps is not None:
        return outcome["step"] >= limits.total_steps
    return outcome.get("seconds", 0.0) >= (limits.total_seconds or 0.0)


def _resume_and_train(
    config: RunConfig, name: str, runtime: Runtime, data: DataSet, workload: Workload, plan: BatchPlan, limits: Limits,
    directory: Directory | None,
) -> int:  # fmt: skip
    state = TrainState(workload)
    loader = build_loader(config, data, workload, plan, runtime)
    samples_per_step = plan.batch_size * workload.reads

    groups: Groups | None = None

    def find() -> tuple[dict[str, Any] | None, int, Metrics]:
        """On rank 0: the newest sound checkpoint; the tensors go separately."""
        nonlocal groups
        assert directory is not None
        found = directory.store.newest(directory.tracker.note)
        step = found.step if found else 0
        directory.tracker.records = directory.log.before(step)
        directory.tracker.sinks = make_sinks(config, name, directory.storage, directory.tracker.note)
        groups = found.groups if found else None
        done = [r for r in directory.tracker.evaluations() if r["step"] == step]
        metrics = {k: v for k, v in done[-1].items() if k not in ("step", "kind", "epoch")} if done else {}
        return (found.state if found else None), (step if done else -1), metrics

    stored, evaluated, metrics = agreed(runtime, find)
    engine = Engine(
        runtime=runtime,
        state=state,
        loader=loader,
        tracker=directory.tracker if directory else Silent(),
        saver=directory or SilentSaver(),
        limits=limits,
        schedule=build_schedule(config, limits.total_steps, samples_per_step, plan.size),
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        evaluated=evaluated,
        metrics=metrics,
    )
    if stored is not None:
        try:
            engine.restore(runtime.broadcast_groups(groups), stored)
        except Mismatch as error:
            raise UserError(f"run.url: {error}: use another run.url") from None
    groups = None
    agreed(runtime, lambda: directory.begin(state.step) if directory else None)
    if directory:
        _greet(directory, runtime, data, workload, state.step)
    outcome = engine.train()
    if outcome.status == "bad_data":
        problems = [p for found in runtime.gather(list(loader.problems)) for p in found]
        loader.problems = dict.fromkeys(problems)
        raise UserError(loader.bad_images())
    return _finish(directory, loader, workload, outcome, engine) if directory else _exit_code(outcome)


def _greet(directory: Directory, runtime: Runtime, data: DataSet, workload: Workload, step: int) -> None:
    config, note, d = directory.config, directory.tracker.note, data.description
    count = sum(p.numel() for p in workload.parameters() if p.requires_grad)
    what = getattr(config.workload, "network", config.workload.name)
    of = f"{d.name}, {d.training:,} samples and {d.evaluated:,} held out"
    note(f"{config.workload.name} {what}, {count:,} parameters; {of}")
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else str(runtime.device)
    threads = torch.get_num_threads()
    ranks = f"{runtime.world} rank{'s'[: runtime.world > 1]} x {threads} thread{'s'[: threads > 1]}"
    note(f"{ranks} on {device}, {runtime.precision}; batch {config.batch_size}, {config.duration}, seed {config.seed}")
    directory.tracker.console.start(step)
    if step:
        note(f"resuming {directory.storage} at step {step}")


def _exit_code(outcome: Outcome) -> int:
    return 1 if outcome.status == "non_finite" else 0


def _finish(directory: Directory, loader: BatchLoader, workload: Workload, outcome: Outcome, engine: Engine) -> int:
    """What rank 0 leaves behind: pictures, outcome.json, the closing lines."""
    tracker, storage = directory.tracker, directory.storage
    unsaved = directory.finish_saving()  # before anything that might fail
    shown: dict[str, bytes] = {}
    records = tracker.records
    if records:
        shown["learning_curves"] = pictures.learning_curves(records, directory.name)
    if outcome.totals:
        for key, picture in workload.pictures(outcome.totals, loader.pixels).items():
            shown[key] = pictures.render(picture)
    samples = workload.samples(64) if outcome.status == "done" else None
    if isinstance(samples, torch.Tensor):
        shown["samples"] = pictures.render(pictures.from_samples(samples, directory.name))
    for key, png in shown.items():
        try:
            storage.write(f"samples/{key}.png", png)
        except StorageError as error:
            tracker.note(f"warning: {error}")
        tracker.image(outcome.step, key, png)
    result = {
        **outcome.metrics,
        "samples_per_second": round(outcome.samples_per_second, 1),
        "status": outcome.status,
        "step": outcome.step,
        "run": str(storage),
    }
    directory.write_outcome({**result, "reason": unsaved or outcome.reason, "metrics": outcome.metrics,
                             "seconds": engine.state.seconds})  # fmt: skip
    checkpoint = f"checkpoints/{folder(engine.saved)}" if engine.saved and not unsaved else None
    summary = {**result, "checkpoint": checkpoint and f"{storage}/{checkpoint}"}
    tracker.close(summary, failed=bool(unsaved) or outcome.status == "non_finite")
    here = _shown(storage)
    tracker.note(f"{outcome.status} at step {outcome.step}: {unsaved or outcome.reason}")
    tracker.note(f"  checkpoint  {f'{here}/{checkpoint}' if checkpoint else 'none'}")
    tracker.note(f"  metrics     {here}/metrics")
    if shown:
        tracker.note(f"  pictures    {here}/samples/*.png")
    _print_result(result)
    return 1 if unsaved else _exit_code(outcome)


def _shown(storage: Storage) -> str:
    """The URL as a person would type it."""
    here = f"{Path.cwd()}/"
    return str(storage).removeprefix(here) if storage.local else str(storage)


def _print_result(result: dict[str, Any]) -> None:
    """The last line of a run, for programs."""
    hidden = ("reason", "metrics", "seconds")
    print(json.dumps({k: v for k, v in result.items() if k not in hidden}), flush=True)  # noqa: T201
