"""Where the time of a run went, over all its lives: training, or waiting, starting, saving and doing steps again.

Each life of a run keeps a small file of its own in `lives/`, which it writes anew every few seconds, so that one that
is killed has left its numbers too. The table is a pure function of these files. Nothing in them steers training.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .objects import Storage, StorageError

BEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Attempt:
    """One life of a run. Moments are in seconds since 1970, durations in seconds."""

    job: str = ""  # job id and restart count under Slurm
    submitted: float | None = None  # the job began to wait
    started: float | None = None  # the job began to run
    process: float = 0.0  # the process was started
    training: float = 0.0  # the first step could begin
    heard: float = 0.0  # this was written
    first_step: int = 0
    step: int = 0
    before: float = 0.0  # training time of the run up to the checkpoint that this life went on from
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
    lives: int = 0

    @property
    def share(self) -> float:
        """The part that an undisturbed run takes as well, but for its saves."""
        return (self.training + self.evaluation) / self.total if self.total else 1.0

    def summary(self) -> dict[str, float]:
        """For outcome.json and W&B."""
        parts = {name: round(value, 1) for name, value in asdict(self).items()}
        return {"goodput": round(self.share, 4), **parts}

    def table(self) -> list[str]:
        rows = [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)[:6]]
        lives = "1 life" if self.lives == 1 else f"{self.lives} lives"
        lines = [f"goodput {self.share:.1%} of {_text(self.total)} in {lives}"]
        return lines + [f"  {name:<17}{_text(s):>10}{s / (self.total or 1):>8.1%}" for name, s in rows]


def _text(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{int(rest):02d}" if hours else f"{minutes}:{rest:04.1f}"


def account(lives: Sequence[Attempt]) -> Goodput:
    """Add up the lives of a run, oldest first.

    A life's time in the loop is kept up to the checkpoint that the next one went on from; the rest was in vain. Clocks
    of different nodes may differ a little, so that no part is let below zero.
    """
    loop = evaluation = stall = replay = restart = queue = 0.0
    for index, attempt in enumerate(lives):
        earlier = lives[index - 1] if index else None
        same_job = earlier is not None and attempt.job == earlier.job and attempt.job != ""
        began = attempt.process if same_job or attempt.started is None else min(attempt.started, attempt.process)
        since = earlier.heard if earlier else attempt.submitted if attempt.submitted is not None else began
        waited = max(began - since, 0.0)
        inside = max(attempt.seconds - attempt.before, 0.0)
        restart += max(attempt.training - began, 0.0) + max(attempt.heard - attempt.training - inside, 0.0)
        restart += waited if same_job else 0.0
        queue += 0.0 if same_job else waited
        loop += inside
        evaluation += attempt.evaluate
        stall += attempt.checkpoint
        if index + 1 < len(lives):
            replay += min(max(attempt.seconds - lives[index + 1].before, 0.0), inside)
    training = max(loop - evaluation - stall - replay, 0.0)
    total = training + evaluation + stall + replay + restart + queue
    return Goodput(training, evaluation, stall, replay, restart, queue, total, len(lives))


class Recorder:
    """Keeps the file of this life. Never raises: these numbers are worth less than the run."""

    def __init__(self, storage: Storage, attempt: Attempt, progress: Callable[[], dict[str, float]]) -> None:
        """`progress` gives the fields that change: step, seconds, checkpoint, evaluate."""
        self._storage, self._life, self._progress = storage.at("lives"), attempt, progress
        self._past = self._read()
        self._name = f"{len(self._past):05d}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="life", daemon=True)
        self._thread.start()

    def end(self, status: str) -> Goodput:
        """Write how this life ended; returns the account of all."""
        self.stop()
        self._write(status)
        return account([*self._past, self._life])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)

    def _keep(self) -> None:
        self._write("")
        while not self._stop.wait(BEAT_SECONDS):
            self._write("")

    def _write(self, status: str) -> None:
        self._life = replace(self._life, heard=time.time(), status=status, **self._progress())  # type: ignore[arg-type]
        try:
            self._storage.write(self._name, json.dumps(asdict(self._life)).encode(), deadline=BEAT_SECONDS)
        except StorageError:
            return

    def _read(self) -> list[Attempt]:
        found = []
        try:
            for name in self._storage.list():
                found.append(Attempt(**json.loads(self._storage.read(name))))
        except (StorageError, ValueError, TypeError):  # an account with gaps is better than no run
            return found
        return found


def current_attempt() -> str:
    """Which life of a Slurm job this is; '' elsewhere."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def new_attempt(step: int, seconds: float, world_size: int, process_began: bool = True) -> Attempt:
    """The life whose first step is about to begin, with this process or, after a rollback, within it."""
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
    """When this process was started, in seconds since 1970; now, where nothing tells."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError):
        return time.time()
