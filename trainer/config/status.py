"""How a run can end: one list for the engine, outcome.json, the exit code, and the batch script that reads it."""

from __future__ import annotations

from typing import Literal

Status = Literal[
    "done",  # the duration is reached
    "preempted",  # a signal, or the loss of a node
    "time_limit",  # the end of the job's time
    "lease_lost",  # another job has taken the run directory over
    "bad_data",  # more samples cannot be read than data.bad_images allows
    "non_finite",
    "mode_collapse",  # with health.action stop, as the two below
    "convergence_failure",
    "diverged",
    "crashed",
]
FINE: tuple[Status, ...] = ("done", "preempted", "time_limit", "lease_lost")  # exit code 0
RESUMABLE: tuple[Status, ...] = ("preempted", "time_limit", "crashed")  # whatever else ended a run would end it again

_STOPPED = "stopped by {signal}; the same command resumes from here"
REASONS: dict[Status, str] = {  # of the others the health watch has the reason
    "done": "the duration is reached",
    "preempted": _STOPPED,
    "time_limit": _STOPPED,
    "lease_lost": "another job has taken the run directory over: this one saves no more",
    "non_finite": "the loss is not a finite number: lower optimizer.lr or set optimizer.clip_norm",
    "bad_data": "too many samples could not be read",
}


def exit_code(status: Status) -> int:
    return 0 if status in FINE else 1
