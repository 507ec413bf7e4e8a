"""Where the time of a run went, over all its attempts: training, or waiting, starting, saving and repeating steps.

Each attempt keeps a small file of its own in `lives/` and rewrites it every few seconds, so that one that is killed has
left its numbers too. The table is a pure function of these files. Nothing in them affects training.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .objects import Storage, StorageError

WRITE_SECONDS = 10.0  # between two writes of the file, and the deadline of each


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run. Moments are in seconds since 1970, durations in seconds."""

    job: str = ""  # job id and restart count under Slurm
    submitted: float | None = None  # the job began to wait
    started: float | None = None  # the job began to run
    process: float = 0.0  # the process was started
    training: float = 0.0  # the first step could begin
    heard: float = 0.0  # the file was last written
    first_step: int = 0
    step: int = 0
    before: float = 0.0  # training time of the run up to the checkpoint that this attempt resumed from
    seconds: float = 0.0  # the same, up to `heard`
    checkpoint: float = 0.0  # of it: blocked by saving
    evaluate: float = 0.0  # of it: evaluating
    world_size: int = 1
    status: str = ""  # how it ended; empty for one that was killed


@dataclass(frozen=True)
class Goodput:
    """The parts of a run's time, in seconds; they add up to `total`."""

    training: float = 0.0
    evaluation: float = 0.0
    checkpoint_stall: float = 0.0
    replay: float = 0.0  # trained, not saved, trained again
    restart: float = 0.0  # from the start of a job to its first step, and from its last step to its end
    queue: float = 0.0
    total: float = 0.0
    attempts: int = 0

    @property
    def share(self) -> float:
        """The part that an undisturbed run takes as well, but for its saves."""
        return (self.training + self.evaluation) / self.total if self.total else 1.0

    def summary(self) -> dict[str, float]:
        """For outcome.json and W&B, where the number of attempts is called `lives`."""
        values = {name: round(value, 1) for name, value in asdict(self).items()}
        attempts = values.pop("attempts")
        return {"goodput": round(self.share, 4), **values, "lives": attempts}

    def table(self) -> list[str]:
        rows = [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)[:6]]
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        lines = [f"goodput {self.share:.1%} of {_duration(self.total)} in {attempts}"]
        return lines + [f"  {name:<17}{_duration(s):>10}{s / (self.total or 1):>8.1%}" for name, s in rows]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{int(seconds):02d}" if hours else f"{minutes}:{seconds:04.1f}"


def account(attempts: Sequence[Attempt]) -> Goodput:
    """Add up the attempts of a run, oldest first.

    An attempt's time in the loop counts up to the checkpoint that the next one resumed from; the rest was lost. Clocks
    of different nodes may differ a little, so that no part is let below zero.
    """
    loop = evaluation = stall = replay = restart = queue = 0.0
    for index, attempt in enumerate(attempts):
        earlier = attempts[index - 1] if index else None
        same_job = earlier is not None and attempt.job == earlier.job and attempt.job != ""
        began = attempt.process if same_job or attempt.started is None else min(attempt.started, attempt.process)
        since = earlier.heard if earlier else attempt.submitted if attempt.submitted is not None else began
        waited = max(began - since, 0.0)
        in_loop = max(attempt.seconds - attempt.before, 0.0)
        restart += max(attempt.training - began, 0.0) + max(attempt.heard - attempt.training - in_loop, 0.0)
        restart += waited if same_job else 0.0
        queue += 0.0 if same_job else waited
        loop += in_loop
        evaluation += attempt.evaluate
        stall += attempt.checkpoint
        if index + 1 < len(attempts):
            replay += min(max(attempt.seconds - attempts[index + 1].before, 0.0), in_loop)
    training = max(loop - evaluation - stall - replay, 0.0)
    total = training + evaluation + stall + replay + restart + queue
    return Goodput(training, evaluation, stall, replay, restart, queue, total, len(attempts))


class Recorder:
    """Keeps the file of this attempt. Never raises: these numbers are worth less than the run."""

    def __init__(self, storage: Storage, attempt: Attempt, progress: Callable[[], dict[str, float]]) -> None:
        """`progress` gives the fields that change: step, seconds, checkpoint, evaluate."""
        self._storage, self._attempt, self._progress = storage.at("lives"), attempt, progress
        self._earlier = self._read()
        self._name = f"{len(self._earlier):05d}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_periodically, name="goodput", daemon=True)
        self._thread.start()

    def end(self, status: str) -> Goodput:
        """Write how this attempt ended; returns the account of all."""
        self.stop()
        self._write(status)
        return account([*self._earlier, self._attempt])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(WRITE_SECONDS)

    def _write_periodically(self) -> None:
        self._write("")
        while not self._stop.wait(WRITE_SECONDS):
            self._write("")

    def _write(self, status: str) -> None:
        progress: dict[str, Any] = dict(self._progress())
        self._attempt = replace(self._attempt, heard=time.time(), status=status, **progress)
        try:
            self._storage.write(self._name, json.dumps(asdict(self._attempt)).encode(), deadline=WRITE_SECONDS)
        except StorageError:
            return

    def _read(self) -> list[Attempt]:
        attempts = []
        try:
            for name in self._storage.list():
                attempts.append(Attempt(**json.loads(self._storage.read(name))))
        except (StorageError, ValueError, TypeError):  # an account with gaps is better than no run
            return attempts
        return attempts


def current_attempt() -> str:
    """Which attempt of a Slurm job this is, as JOB.RESTARTS; '' elsewhere."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def new_attempt(step: int, seconds: float, world_size: int, process_began: bool = True) -> Attempt:
    """The attempt whose first step is about to begin, with this process or, after a rollback, within it."""
    now = time.time()
    return Attempt(
        job=current_attempt(), submitted=_moment("LAUNCH_SUBMITTED"), started=_moment("LAUNCH_STARTED"),
        process=process_start() if process_began else now, training=now, heard=now,
        first_step=step, step=step, before=seconds, seconds=seconds, world_size=world_size,
    )  # fmt: skip


def _moment(variable: str) -> float | None:
    text = os.environ.get(variable, "")
    return float(text) if text.isdecimal() else None


def process_start() -> float:
    """When this process was started, in seconds since 1970; the current time where that is not known."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError):
        return time.time()
