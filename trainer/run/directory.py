"""A run's directory as rank 0 works with it: checkpoints, log, pictures, outcome, and going back after a collapse."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.options import RunConfig, UserError, differences, dump, is_safe
from ..data.description import Description
from ..distributed.deadline import Deadline
from ..distributed.runtime import StopSignals
from ..engine import Engine, Every, Outcome
from ..state import Groups
from ..storage.checkpoint import CheckpointStore, folder
from ..storage.goodput import Recorder, current_attempt, new_attempt
from ..storage.lease import Lease
from ..storage.metric_log import MetricLog
from ..storage.objects import Storage, StorageError
from ..tracking import render
from ..tracking.tracker import Sink, Tracker
from ..tracking.wandb_client import WandbSettings, WandbSink, logged_in, run_id

ROLLBACKS = "rollbacks.json"
EXIT_SECONDS = 600.0  # how long the end of a run waits for its last checkpoint
FRAMES = 120  # at most, of the animation of the samples


class SilentSaver:
    """The saver of the ranks that are not the first."""

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None: ...
    def show(self, step: int, samples: Tensor | str) -> None: ...


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
    keep: Every
    headline: str
    maximise: bool
    signals: StopSignals
    deadline: Deadline
    recorder: Recorder | None = None
    last: tuple[int, Groups, dict[str, Any]] | None = None

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None:
        state = {**state, "headline": self.headline, "maximise": self.maximise}  # for those who prune later

        began = time.perf_counter()

        def work() -> None:
            self.tracker.flush()
            self.store.save(step, groups, state)
            self.deadline.saved(time.perf_counter() - began)
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

    def show(self, step: int, samples: Tensor | str) -> None:
        if isinstance(samples, Tensor):
            picture = render.from_samples(samples, f"{self.name}, step {step}")
            self.picture(step, f"step-{step:08d}", render.render(picture), "samples")

    def picture(self, step: int, file: str, data: bytes, name: str = "") -> None:
        """Keep a picture, and show it under its name; PNG unless the file says otherwise."""
        path = file if "." in file else f"{file}.png"
        try:
            self.storage.write(f"samples/{path}", data)
        except StorageError as error:
            self.tracker.note(f"warning: {error}")
        if path.endswith(".png"):
            self.tracker.image(step, name or file, data)

    def animate(self, step: int) -> None:
        """The grids of samples up to a step, one after the other."""
        try:
            names = sorted(name for name in self.storage.list("samples") if re.fullmatch(r"step-\d{8,}\.png", name))
            names = [name for name in names if int(name[5:-4]) <= step]
            names = [names[i * len(names) // FRAMES] for i in range(FRAMES)] if len(names) > FRAMES else names
            if len(names) > 1:
                frames = [self.storage.read(f"samples/{name}") for name in names]
                self.picture(step, "training.gif", render.animation(frames))
        except (StorageError, OSError) as error:  # OSError: PIL cannot read a frame
            self.tracker.note(f"warning: samples/training.gif was not made: {error}")

    def rollbacks(self) -> list[dict[str, Any]]:
        """How often the run went back after it had ceased to be healthy, and why."""
        try:
            found: list[dict[str, Any]] = json.loads(self.storage.read(ROLLBACKS))
            return found
        except StorageError as error:
            if error.missing:
                return []
            raise

    def roll_back(self, outcome: Outcome) -> None:
        """Make the best checkpoint from before the verdict the newest one.

        What came later is deleted before the decision is written: killed in between, the run would train that part
        again and come to the same decision.
        """
        self.store.wait()
        self.report_failure()
        self.last = None
        steps = self.store.steps()
        # From a checkpoint that the verdict covers already, it would be reached again before any training.
        sound = [step for step in steps if step < (outcome.health.step or outcome.step)]
        best = self.tracker.best(self.headline, self.maximise, sound)
        to = best if best is not None else max(sound, default=0)
        for step in reversed([step for step in steps if step > to]):
            self.store.remove(step)
        entry = {
            "from": outcome.step, "to": to, "state": outcome.status, "reason": outcome.reason,
            "void_records": self.tracker.rewind(to),
        }  # fmt: skip
        self.storage.write(ROLLBACKS, json.dumps([*self.rollbacks(), entry], indent=1).encode())
        self.tracker.note(f"rolling back from step {outcome.step} to step {to}: {outcome.status}: {outcome.reason}")

    def begin(self, step: int, data: Description) -> None:
        """From here on the directory is ours: what earlier lives logged after `step` and how they ended is void."""
        self.storage.write("config.yaml", dump(self.config).encode())
        self.storage.write("data.json", json.dumps(data.to_json(), indent=1).encode())
        self.storage.delete("outcome.json")
        self.log.rewind(step)

    def record(self, engine: Engine) -> None:
        """Keep an account of the life that begins here; after a rollback, of another one."""
        state, again = engine.state, self.recorder is not None
        if self.recorder:
            self.recorder.end("rolled_back")

        def progress() -> dict[str, float]:
            clock = engine.clock
            at_rest = engine.saved == state.step  # after the last save comes what is no training
            seconds = state.seconds if at_rest else clock.run_seconds()
            return {"step": state.step, "seconds": seconds, "checkpoint": clock.saving, "evaluate": clock.evaluating}

        attempt = new_attempt(state.step, state.seconds, engine.runtime.world, process_began=not again)
        self.recorder = Recorder(self.storage, attempt, progress)

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
            attempt = (
                {"life": current_attempt()} if current_attempt() else {}
            )  # so that a batch script knows whose outcome it is
            self.storage.write("outcome.json", json.dumps({**outcome, **attempt}, indent=1).encode())
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


def make_sinks(
    config: RunConfig, name: str, storage: Storage, discarded_records: int, note: Callable[[str], None]
) -> tuple[Sink, ...]:
    w = config.wandb
    mode = os.environ.get("WANDB_MODE", "auto") if w.mode == "auto" else w.mode
    mode = ("online" if logged_in() else "offline") if mode not in ("online", "offline", "disabled") else mode
    if mode == "disabled":
        return ()
    where = Path(storage.url.removeprefix("file://")) if storage.local else Path("runs") / name
    settings = WandbSettings(
        mode,
        run_id(storage),
        name,
        w.project,
        w.entity,
        w.group,
        w.tags,
        str(where),
        config.model_dump(mode="json"),
        discarded_records,
    )
    return (WandbSink(settings, note),)


def shown(storage: Storage) -> str:
    """The URL as a person would type it."""
    here = f"{Path.cwd()}/"
    return str(storage).removeprefix(here) if storage.local else str(storage)
