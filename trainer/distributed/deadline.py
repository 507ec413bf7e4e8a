"""When a job must stop by itself: before Slurm's end time, early enough to finish its steps and save.

There may be no warning signal: the time limit may have been set without one, or another launcher was used. How early is
measured: the 95th percentile of the steps and of the saves of this attempt.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence

TIME_LIMIT = "the end of the job's time"  # the reason to stop that `Deadline.reached` returns
EXIT_SECONDS = 20.0  # for the outcome, the pictures, W&B and Slurm's own part
UNKNOWN_SAVE_SECONDS = 30.0  # for a save, before one was measured
SHARE = 0.1  # of a short job's time, at most, for each of the two above
POLL_SECONDS = 0.2  # the ranks may agree as late as this
CHECK_SECONDS = 0.5


def end_of_job(environment: Mapping[str, str] | None = None) -> float | None:
    """When Slurm ends this job, in seconds since 1970; None outside Slurm or without a limit."""
    env = os.environ if environment is None else environment
    for name in ("SLURM_JOB_END_TIME", "LAUNCH_END"):  # newer versions of Slurm; the script of `launch`
        if name in env:
            return _seconds(env[name])
    if "SLURM_JOB_ID" not in env:
        return None
    command = ["squeue", "-h", "-j", env["SLURM_JOB_ID"], "-o", "%e"]
    try:
        result = subprocess.run(
            command, env={**env, "SLURM_TIME_FORMAT": "%s"}, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # in a container there may be no squeue
        return None
    return _seconds(result.stdout)


def _seconds(text: str) -> float | None:
    """The number in a text; None where it is none, as where there is no limit."""
    return float(text) if text.strip().isdecimal() else None


def p95(values: Sequence[float]) -> float:
    """The 95th percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0.0


class Deadline:
    """Whether it is time to save and exit. Without an end it never is, and the checks cost nothing."""

    def __init__(self, end: float | None = None) -> None:
        self._end = end
        self._allowed = SHARE * max(end - time.time(), 0.0) if end is not None else 0.0
        self._steps: deque[float] = deque(maxlen=1000)
        self._saves: deque[float] = deque(maxlen=100)
        self._step_began: float | None = None
        self._check_at = 0.0
        self._reached = False

    def is_time_limit(self, reason: str) -> bool:
        """Whether a reason to stop means the end of the job's time; SIGUSR1 is how Slurm warns of it."""
        return self._end is not None and reason in (TIME_LIMIT, "SIGUSR1")

    def step(self) -> None:
        """Called where a step begins; the time since the last call, with evaluation and saves, was one step."""
        if self._end is None:
            return
        now = time.perf_counter()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now

    def saved(self, seconds: float) -> None:
        """Called when a checkpoint was committed, `seconds` after its step."""
        self._saves.append(seconds)

    def margin(self) -> float:
        """How long before the end to stop, in seconds."""
        step = max(p95(list(self._steps)), POLL_SECONDS)  # twice, since the ranks agree one step late
        save = 1.5 * p95(list(self._saves)) if self._saves else min(UNKNOWN_SAVE_SECONDS, self._allowed)
        return 2 * step + save + min(EXIT_SECONDS, self._allowed)

    def reached(self) -> str:
        """TIME_LIMIT from the margin on, '' before."""
        if self._end is None:
            return ""
        now = time.time()
        if not self._reached and now >= self._check_at:
            self._check_at = now + CHECK_SECONDS
            self._reached = now + self.margin() >= self._end
        return TIME_LIMIT if self._reached else ""
