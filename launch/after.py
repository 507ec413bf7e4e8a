"""Whether a job goes on: read by the batch script at the end of each life, since no exit code can tell.

torchrun returns 1 and srun 143 for a run that saved and left as it should. What counts is outcome.json, if this very
life has written it, and whether the run has a newer checkpoint than when the life before ended.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.status import RESUMABLE, Status

Verdict = Literal["done", "next", "requeue", "failed"]


@dataclass(frozen=True)
class Attempt:
    """One life of a job, as it ended."""

    life: str  # job id and restart count
    status: Status
    step: int  # of the newest committed checkpoint
    code: int = 0
    at: float = 0.0  # seconds since 1970; for people


def decide(attempt: Attempt, before: list[Attempt], crashes: int, chained: bool) -> tuple[Verdict, str]:
    """The verdict and the reason in words. `crashes` ends in a row without progress are one too many."""
    if attempt.status == "done":
        return "done", f"done at step {attempt.step}"
    if attempt.status not in RESUMABLE:
        return "failed", f"{attempt.status} at step {attempt.step}: not requeued, for it would end in the same way"
    if attempt.status == "preempted":  # the cluster's doing: it says nothing about the run
        return "requeue", f"preempted at step {attempt.step}: requeued"
    in_vain = _in_vain([*before, attempt])
    what = f"{attempt.status} at step {attempt.step}"
    if in_vain >= max(crashes, 1) or (attempt.status == "crashed" and not crashes):
        return "failed", f"{what}: {in_vain} lives in a row without a new checkpoint: not requeued"
    if attempt.status == "time_limit" and chained:
        return "next", f"{what}: the next job of the chain goes on"
    return "requeue", f"{what}: requeued; {in_vain} of {crashes} lives in a row without a new checkpoint"


def _in_vain(lives: list[Attempt]) -> int:
    """How many of the last lives have not advanced the run; a preempted one does not count, for it may be unlucky."""
    found = 0
    for index in reversed(range(len(lives))):
        if lives[index].step > (lives[index - 1].step if index else 0):
            break
        found += lives[index].status != "preempted"
    return found


def read_attempts(record: Path) -> list[Attempt]:
    """What earlier lives left; lines that a dying node tore are skipped."""
    found = []
    for line in record.read_text().splitlines() if record.exists() else ():
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def judge(run: str, record: Path, life: str, code: int, crashes: int, chained: bool) -> tuple[Verdict, str]:
    """Read how the life ended, add it to the record, decide."""
    outcome = read_outcome(run)
    mine = outcome.get("life") == life or (outcome.get("status") == "done" and not code)
    status: Status = outcome["status"] if mine else "crashed"
    attempt = Attempt(life, status, newest_step(run), code, round(time.time()))
    before = read_attempts(record)
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    return decide(attempt, before, crashes, chained)


def read_outcome(run: str) -> dict[str, Any]:
    """The run's outcome.json; empty where there is none, or none that can be read."""
    try:
        found = json.loads(_read(run, "outcome.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def newest_step(run: str) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    found = (re.fullmatch(r".*?step-(\d+)/MANIFEST\.json", path) for path in _glob(run, "checkpoints/*/MANIFEST.json"))
    return max((int(match[1]) for match in found if match), default=0)


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
