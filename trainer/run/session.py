"""One training run: checks, parts, resuming, the engine, and what is left behind for people and programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from ..config.options import RunConfig, UserError
from ..data.dataset import DataSet
from ..data.plan import BatchPlan
from ..distributed.deadline import Deadline, end_of_job
from ..distributed.process import ProcessInfo
from ..distributed.runtime import Runtime, StopSignals
from ..engine import Engine, Limits, Metrics, Outcome
from ..metrics.evaluator import Judge
from ..metrics.health import STATES, Rules, Watch
from ..state import Groups, Mismatch, TrainState
from ..storage.checkpoint import CheckpointStore, CorruptCheckpoint, folder
from ..storage.lease import Lease, LeaseHeld
from ..storage.metric_log import TIMING, MetricLog
from ..storage.objects import Storage, StorageError
from ..tracking import render
from ..tracking.console import Console
from ..tracking.tracker import Silent, Tracker
from ..workload import Workload
from .build import (  # fmt: skip
    build_limits,
    build_loader,
    build_plan,
    build_schedule,
    build_workload,
    load_config,
    open_run_data,
    run_url,
)
from .directory import Directory, SilentSaver, check_resume, make_sinks, read_outcome, shown
from .features import open_judge

T = TypeVar("T")
FLOORS = 3.0  # below so many floors a FID is good, and its ratio to the best one noise


def agreed(runtime: Runtime, work: Callable[[], T]) -> T:
    """Rank 0's result on every rank; what it raises for the user, all ranks raise."""
    value: T | None = None
    problem = ""
    if runtime.main:
        try:
            value = work()
        except (StorageError, CorruptCheckpoint, LeaseHeld, UserError) as error:
            problem = str(error)
    problem = runtime.broadcast(problem)
    if problem:
        raise UserError(problem)
    return runtime.broadcast(value)


def train(config: RunConfig, name: str) -> int:
    """Train, or go on training, or say that it is done; returns the exit code. Called by every rank."""
    process = ProcessInfo.from_environment()
    with StopSignals() as signals:
        problem, data, workload, judge = "", None, None, None
        try:
            data = open_run_data(config)
            workload = build_workload(config, data.description)
            judge = open_judge(config, data.description) if workload.generates else None
            plan = build_plan(config, len(data.train), workload, process.world)
            samples_per_step = plan.batch_size * workload.batches_per_step
            total = build_limits(config, samples_per_step, plan.size).total_steps
            build_schedule(config, total, samples_per_step, plan.size)
        except UserError as error:
            problem = str(error)
        with Runtime(
            process,
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
            return _train(config, name, runtime, data, workload, judge)


def _train(
    config: RunConfig, name: str, runtime: Runtime, data: DataSet, workload: Workload, judge: Judge | None
) -> int:
    workload.quality = judge
    runtime.prepare(workload, config.channels_last, config.compile)
    plan = build_plan(config, len(data.train), workload, runtime.world)
    samples_per_step = plan.batch_size * workload.batches_per_step
    limits = build_limits(config, samples_per_step, plan.size)
    directory: Directory | None = None
    runtime.deadline = Deadline(runtime.broadcast(end_of_job() if runtime.main else None))

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
            workload.maximise, runtime.signals, runtime.deadline,
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
        run = Run(config, name, runtime, data, plan, limits, directory, judge)
        engine, outcome = run.live(workload)
        while run.should_roll_back(outcome):
            run.go_back(outcome)
            workload = build_workload(config, data.description)
            workload.quality = judge
            runtime.prepare(workload, config.channels_last, config.compile)
            engine, outcome = run.live(workload)
        code = run.finish(engine, outcome) if directory else _exit_code(outcome)
        return runtime.exit_code(code, outcome.status)
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
            if directory.recorder:
                directory.recorder.stop()
            directory.lease.release()


def _reached(outcome: dict[str, Any], limits: Limits) -> bool:
    if limits.total_steps is not None:
        return outcome["step"] >= limits.total_steps
    return outcome.get("seconds", 0.0) >= (limits.total_seconds or 0.0)


@dataclass
class Run:
    """The parts of a run that outlive a rollback."""

    config: RunConfig
    name: str
    runtime: Runtime
    data: DataSet
    plan: BatchPlan
    limits: Limits
    directory: Directory | None  # on the first rank
    judge: Judge | None
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def live(self, workload: Workload) -> tuple[Engine, Outcome]:
        """From the newest sound checkpoint to the end of training, or to where it must stop."""
        config, runtime, directory, plan, limits = self.config, self.runtime, self.directory, self.plan, self.limits
        loader = build_loader(config, self.data, workload, plan, runtime)
        groups: Groups | None = None

        def find() -> tuple[dict[str, Any] | None, int, Metrics, list[dict[str, Any]], list[dict[str, Any]]]:
            """On rank 0: the newest sound checkpoint and what was logged before; the tensors go separately."""
            nonlocal groups
            assert directory is not None
            tracker = directory.tracker
            found = directory.store.newest(tracker.note)
            step = found.step if found else 0
            tracker.records = directory.log.before(step)
            rollbacks = directory.rollbacks()
            if not tracker.sinks:
                tracker.sent = rollbacks[-1]["void_records"] if rollbacks else 0
                tracker.sinks = make_sinks(config, self.name, directory.storage, tracker.sent, tracker.note)
            groups = found.groups if found else None
            done = [r for r in tracker.evaluations() if r["step"] == step]
            metrics = {k: v for k, v in done[-1].items() if k not in ("step", "kind", "epoch")} if done else {}
            state = found.state if found else None
            return state, (step if done else -1), metrics, tracker.records, rollbacks

        stored, last_eval_step, metrics, records, self.rollbacks = agreed(runtime, find)
        if self.judge is not None:
            self.judge.prepare(loader, runtime)
        samples_per_step = plan.batch_size * workload.batches_per_step
        schedule = build_schedule(config, limits.total_steps, samples_per_step, plan.size)
        factor = config.health.lr_factor ** len(self.rollbacks)
        engine = Engine(
            runtime=runtime,
            state=TrainState(workload),
            loader=loader,
            tracker=directory.tracker if directory else Silent(),
            saver=directory or SilentSaver(),
            limits=limits,
            schedule=(lambda step: factor * schedule(step)) if self.rollbacks else schedule,
            seed=config.seed,
            rollbacks=len(self.rollbacks),
            clip_norm=config.optimizer.clip_norm,
            last_eval_step=last_eval_step,
            metrics=metrics,
            watch=self.watch(records),
        )
        if stored is not None:
            try:
                engine.restore(runtime.broadcast_groups(groups), stored)
            except Mismatch as error:
                raise UserError(f"run.url: {error}: use another run.url") from None
        groups = None
        step = engine.state.step
        agreed(runtime, lambda: directory.begin(step, self.data.description) if directory else None)
        if directory:
            print_banner(directory, runtime, self.data, workload, step)
            directory.tracker.console.health = engine.watch.verdict.state
            directory.record(engine)
        outcome = engine.train()
        if outcome.status == "bad_data":
            problems = [p for found in runtime.gather(list(loader.problems)) for p in found]
            loader.problems = dict.fromkeys(problems)
            raise UserError(loader.bad_images())
        return engine, outcome

    def watch(self, records: list[dict[str, Any]]) -> Watch:
        """As it stands after what was logged; the same on every rank."""
        # The measured floor is that of one sample: in few dimensions it may be far below what is to be expected.
        floor = max(self.judge.controls["fid_floor"], self.judge.noise) if self.judge else 0.0
        watch = Watch(Rules(fid_floor=FLOORS * floor))
        for record in records:
            hidden = ("step", "kind", "epoch", "lr", "steps_per_epoch", *TIMING)
            watch.observe(record["step"], record["kind"], {k: v for k, v in record.items() if k not in hidden})
        return watch

    def go_back(self, outcome: Outcome) -> None:
        agreed(self.runtime, lambda: self.directory.roll_back(outcome) if self.directory else None)

    def should_roll_back(self, outcome: Outcome) -> bool:
        health = self.config.health
        return health.action == "rollback" and outcome.status in STATES[1:] and len(self.rollbacks) < health.rollbacks

    def finish(self, engine: Engine, outcome: Outcome) -> int:
        """What rank 0 leaves behind: pictures, outcome.json, the closing lines. Returns the exit code."""
        directory, workload = self.directory, engine.workload
        assert directory is not None
        tracker, storage = directory.tracker, directory.storage
        unsaved = directory.finish_saving()  # before anything that might fail
        if tracker.records:
            curves = render.learning_curves(tracker.records, directory.name, workload.bands)
            directory.picture(outcome.step, "learning_curves", curves)
        if outcome.totals:
            workload.eval()
            found = workload.pictures(outcome.totals, engine.loader.pixels, engine.fixed_draws())
            for name, picture in found.items():
                directory.picture(outcome.step, name, render.render(picture))
        if workload.generates:
            directory.animate(outcome.step)
        result = {
            **outcome.metrics,
            "samples_per_second": round(outcome.samples_per_second, 1),
            "status": outcome.status,
            "step": outcome.step,
            "run": str(storage),
        }
        about: dict[str, Any] = {"reason": unsaved or outcome.reason, "metrics": outcome.metrics,
                                 "seconds": engine.state.seconds}  # fmt: skip
        if workload.generates:
            about |= {"health": asdict(outcome.health), "rollbacks": self.rollbacks}
        assert directory.recorder
        goodput = directory.recorder.end(outcome.status)
        about["goodput"] = goodput.summary()
        directory.write_outcome({**result, **about})
        checkpoint = f"checkpoints/{folder(engine.saved)}" if engine.saved and not unsaved else None
        summary = {**result, "checkpoint": checkpoint and f"{storage}/{checkpoint}", "goodput": goodput.summary()}
        tracker.close(summary, failed=bool(unsaved) or _exit_code(outcome) != 0)
        here = shown(storage)
        tracker.note(f"{outcome.status} at step {outcome.step}: {unsaved or outcome.reason}")
        if workload.generates:
            health = outcome.health
            tracker.note(f"  health      {health.state}" + (f": {health.reason}" if health.state != "healthy" else ""))
        tracker.note(f"  checkpoint  {f'{here}/{checkpoint}' if checkpoint else 'none'}")
        tracker.note(f"  metrics     {here}/metrics")
        if tracker.records:
            tracker.note(f"  pictures    {here}/samples/*.png")
        for line in goodput.table() if goodput.attempts > 1 else ():
            tracker.note(line)
        _print_result(result)
        return 1 if unsaved else _exit_code(outcome)


def print_banner(directory: Directory, runtime: Runtime, data: DataSet, workload: Workload, step: int) -> None:
    config, note, d = directory.config, directory.tracker.note, data.description
    count = sum(p.numel() for p in workload.parameters() if p.requires_grad)
    network = getattr(config.workload, "network", "")
    of = f"{d.name}, {d.train_size:,} samples and {d.eval_size:,} held out"
    note(f"{config.workload.name}{' ' if network else ''}{network}, {count:,} parameters; {of}")
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else str(runtime.device)
    threads = torch.get_num_threads()
    ranks = f"{runtime.world} rank{'s'[: runtime.world > 1]} x {threads} thread{'s'[: threads > 1]}"
    note(f"{ranks} on {device}, {runtime.precision}; batch {config.batch_size}, {config.duration}, seed {config.seed}")
    directory.tracker.console.start(step)
    if step:
        note(f"resuming {directory.storage} at step {step}")


def _exit_code(outcome: Outcome) -> int:
    return 0 if outcome.status in ("done", "preempted", "time_limit") else 1


def _print_result(result: dict[str, Any]) -> None:
    """The last line of a run, for programs."""
    hidden = ("reason", "metrics", "seconds", "health", "rollbacks", "goodput", "life")
    print(json.dumps({k: v for k, v in result.items() if k not in hidden}), flush=True)  # noqa: T201
