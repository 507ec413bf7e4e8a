"""One training run on every rank: checks, resuming, the engine, rolling back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..boundary import Boundary, Outcome
from ..config.options import RunConfig, UserError
from ..config.status import Status
from ..distributed.deadline import Deadline, end_of_job
from ..distributed.process import ProcessInfo
from ..distributed.runtime import Runtime
from ..distributed.signals import StopSignals
from ..metrics.health import STATES, Rules, Watch
from ..services import Metrics
from ..storage.checkpoint import Checkpoint, CorruptCheckpoint, Groups
from ..storage.lease import LeaseHeld
from ..storage.metric_log import TIMING
from ..storage.objects import StorageError
from .build import Recipe, recipe
from .directory import NullDirectory, RunDirectory
from .feature_classifier import train_missing
from .sameness import difference

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


def all_can(runtime: Runtime, work: Callable[[], object]) -> None:
    """Do something on every rank; what any of them raises for the user, all raise."""
    problem = ""
    try:
        work()
    except UserError as error:
        problem = str(error)
    if problem := next(filter(None, runtime.gather(problem)), ""):
        raise UserError(problem)


def train(config: RunConfig, name: str) -> int:
    """Train, or resume training, or say that it is done; returns the exit code. Called by every rank."""
    process = ProcessInfo.from_environment()
    with StopSignals() as signals:
        problem, parts = "", None
        try:
            parts = recipe(config, process.world)
            parts.check()
        except UserError as error:
            problem = str(error)
        with Runtime(
            process, device=config.device, precision=config.precision, batch_norm=config.batch_norm,
            deterministic=config.deterministic, threads=config.threads, signals=signals,
        ) as runtime:  # fmt: skip
            if problem := next(filter(None, runtime.gather(problem)), ""):
                raise UserError(problem)
            assert parts is not None
            if problem := difference(runtime, parts):
                raise UserError(problem)
            runtime.deadline = Deadline(runtime.broadcast(end_of_job() if runtime.main else None))
            return Session(parts, name, runtime).run()


@dataclass(frozen=True)
class Resumed:
    """What rank 0 found in the run's directory; the tensors go separately."""

    step: int
    state: dict[str, Any] | None
    last_eval_step: int
    metrics: Metrics
    records: list[dict[str, Any]]
    rollbacks: list[dict[str, Any]]


@dataclass
class Session:
    recipe: Recipe
    name: str
    runtime: Runtime
    directory: RunDirectory | NullDirectory = field(default_factory=NullDirectory)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> int:
        """Returns the exit code."""
        try:
            if agreed(self.runtime, self.open):
                return 0
            if signal := train_missing(self.recipe.untrained, self.runtime, self.directory.tracker.note):
                return self.stopped(signal)
            all_can(self.runtime, lambda: self.recipe.evaluator)
            boundary, outcome = self.attempt()
            while self.should_roll_back(outcome):
                self.roll_back(outcome)
                del boundary  # and with it the tensors of the attempt
                boundary, outcome = self.attempt()
            code = self.directory.finish(boundary, outcome, self.rollbacks)
            return self.runtime.exit_code(code, outcome.status)
        except UserError:
            raise
        except BaseException as error:
            self.directory.crashed(error)
            raise
        finally:
            self.directory.close()

    @property
    def run_directory(self) -> RunDirectory:
        """The directory, where only the first rank works with it."""
        assert isinstance(self.directory, RunDirectory)
        return self.directory

    def open(self) -> bool:
        """On rank 0: take the directory. True where the run is done already."""
        self.directory = directory = RunDirectory(self.recipe, self.name, self.runtime)
        return bool(directory.check_resume())

    def stopped(self, signal: str) -> int:
        """Before there was anything to train with. Returns the exit code."""
        status: Status = "time_limit" if self.runtime.deadline.is_time_limit(signal) else "preempted"
        return self.runtime.exit_code(self.directory.stopped(status, signal), status)

    def find(self) -> tuple[Resumed, Groups | None]:
        """On rank 0: the newest valid checkpoint and what was logged before."""
        checkpoint, tracker = self.run_directory.newest(), self.run_directory.tracker
        step = checkpoint.step if checkpoint else 0
        evaluations = [record for record in tracker.evaluations() if record["step"] == step]
        last = evaluations[-1] if evaluations else {}
        metrics = {name: value for name, value in last.items() if name not in ("step", "kind", "epoch")}
        state, groups = (checkpoint.state, checkpoint.groups) if checkpoint else (None, None)
        rollbacks = self.run_directory.rollbacks.read()
        resumed = Resumed(step, state, step if last else -1, metrics, tracker.records, rollbacks)
        return resumed, groups

    def attempt(self) -> tuple[Boundary, Outcome]:
        """From the newest valid checkpoint to the end of training, or to where it must stop."""
        runtime, parts = self.runtime, self.recipe
        groups: Groups | None = None

        def find() -> Resumed:
            nonlocal groups
            resumed, groups = self.find()
            return resumed

        parts.prepare_workload(runtime, parts.config.compile)
        loader = parts.open_loader(runtime)
        for oddity in agreed(runtime, loader.oddities) if not self.rollbacks else ():
            self.directory.tracker.note(f"warning: {oddity}")
        resumed = agreed(runtime, find)
        self.rollbacks = resumed.rollbacks
        parts.prepare_reference(loader, runtime)
        checkpoint = None
        if resumed.state is not None:
            checkpoint = Checkpoint(resumed.step, runtime.broadcast_groups(groups), resumed.state)
        groups = None
        engine = parts.engine(
            runtime, loader, self.directory.tracker, self.directory, checkpoint=checkpoint,
            rollbacks=len(self.rollbacks),
        )  # fmt: skip
        del checkpoint  # its tensors are in the state now
        boundary = engine.boundary
        boundary.last_eval_step, boundary.metrics = resumed.last_eval_step, resumed.metrics
        boundary.watch = self.watch(resumed.records)
        agreed(runtime, lambda: self.run_directory.begin(engine.state.step))
        self.directory.start(boundary)
        outcome = engine.train()
        if outcome.status == "bad_data":
            self.directory.refused(outcome)
            problems = [problem for own in runtime.gather(loader.bad_samples()) for problem in own]
            raise UserError(loader.bad_images(problems))
        return boundary, outcome

    def watch(self, records: list[dict[str, Any]]) -> Watch:
        """As it stands after what was logged; the same on every rank."""
        reference = self.recipe.reference
        floor = reference.scores.floor if reference else 0.0
        watch = Watch(Rules(fid_floor=FLOORS * floor), self.recipe.workload.health_rules)
        for record in records:
            hidden = ("step", "kind", "epoch", "lr", "steps_per_epoch", *TIMING)
            watch.observe(record["step"], record["kind"], {k: v for k, v in record.items() if k not in hidden})
        return watch

    def roll_back(self, outcome: Outcome) -> None:
        agreed(self.runtime, lambda: self.run_directory.rollbacks.roll_back(outcome))
        self.recipe.renew_workload()

    def should_roll_back(self, outcome: Outcome) -> bool:
        health = self.recipe.config.health
        return health.action == "rollback" and outcome.status in STATES[1:] and len(self.rollbacks) < health.rollbacks
