"""Whether a job is requeued: decided for the batch script at the end of each attempt, since no exit code can tell.

torchrun returns 1 and srun 143 for a run that saved and stopped as it should. What counts is outcome.json, if this
attempt has written it, and whether the run has a newer checkpoint than at the end of the attempt before.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.status import RESUMABLE, Status

Decision = Literal["done", "next", "requeue", "failed"]


@dataclass(frozen=True)
class Attempt:
    """One start of a job, as it ended."""

    id: str  # job id and restart count
    status: Status
    step: int  # of the newest committed checkpoint
    code: int = 0  # exit code of the job step
    at: float = 0.0  # seconds since 1970; for people

    def to_json(self) -> str:
        """A line of attempts.jsonl, where the id has the key `life`, as in the files of earlier runs."""
        fields = {"life": self.id, "status": self.status, "step": self.step, "code": self.code, "at": self.at}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> Attempt:
        """Raises ValueError, TypeError or KeyError for a line that is not an attempt."""
        fields = dict(json.loads(line))
        return cls(id=fields.pop("life"), **fields)


def requeue_policy(attempt: Attempt, earlier: list[Attempt], crashes: int, chained: bool) -> tuple[Decision, str]:
    """The decision and the reason in words. The job fails after `crashes` attempts in a row without progress."""
    ended = f"{attempt.status} at step {attempt.step}"
    if attempt.status == "done":
        return "done", ended
    if attempt.status not in RESUMABLE:
        return "failed", f"{ended}: not requeued: it would end in the same way"
    if attempt.status == "preempted":  # the cluster's doing: it says nothing about the run
        return "requeue", f"{ended}: requeued"
    stalled = _without_progress([*earlier, attempt])
    if stalled >= max(crashes, 1) or (attempt.status == "crashed" and not crashes):
        return "failed", f"{ended}: {stalled} attempts in a row without a new checkpoint: not requeued"
    if attempt.status == "time_limit" and chained:
        return "next", f"{ended}: the next job of the chain resumes"
    return "requeue", f"{ended}: requeued; {stalled} of {crashes} attempts in a row without a new checkpoint"


def _without_progress(attempts: list[Attempt]) -> int:
    """How many of the last attempts have not advanced the run; preempted ones, which had bad luck, are not counted."""
    count = 0
    for index in reversed(range(len(attempts))):
        if attempts[index].step > (attempts[index - 1].step if index else 0):
            break
        count += attempts[index].status != "preempted"
    return count


def read_attempts(record: Path) -> list[Attempt]:
    """The attempts of a job so far, oldest first; lines that a failing node left incomplete are skipped."""
    attempts = []
    for line in record.read_text().splitlines() if record.exists() else ():
        try:
            attempts.append(Attempt.from_json(line))
        except (ValueError, TypeError, KeyError):
            continue
    return attempts


def decide(run: str, record: Path, attempt_id: str, code: int, crashes: int, chained: bool) -> tuple[Decision, str]:
    """Read how the attempt ended, add it to the record, and apply the policy."""
    outcome = read_outcome(run)
    is_current = outcome.get("life") == attempt_id or (outcome.get("status") == "done" and not code)
    status: Status = outcome["status"] if is_current else "crashed"
    attempt = Attempt(attempt_id, status, newest_step(run), code, round(time.time()))
    earlier = read_attempts(record)
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        file.write(attempt.to_json() + "\n")
    return requeue_policy(attempt, earlier, crashes, chained)


def read_outcome(run: str) -> dict[str, Any]:
    """The run's outcome.json; empty where there is none, or none that can be read."""
    try:
        outcome = json.loads(_read(run, "outcome.json"))
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def newest_step(run: str) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    paths = _glob(run, "checkpoints/*/MANIFEST.json")
    matches = (re.fullmatch(r".*?step-(\d+)/MANIFEST\.json", path) for path in paths)
    return max((int(match[1]) for match in matches if match), default=0)


def _read(run: str, name: str) -> bytes:
    if "://" not in run:
        return Path(run, name).read_bytes()
    import fsspec

    with fsspec.open(f"{run}/{name}", "rb") as file:
        return file.read()


def _glob(run: str, pattern: str) -> list[str]:
    if "://" not in run:
        return [str(path) for path in Path(run).glob(pattern)]
    import fsspec

    system, path = fsspec.url_to_fs(run)
    return [str(name) for name in system.glob(f"{path}/{pattern}")]
