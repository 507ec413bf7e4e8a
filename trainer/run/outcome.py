"""How a run ended: outcome.json, for the next attempt and for batch scripts, and the last line, for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..boundary import Outcome
from ..schedule import Limits
from ..storage.goodput import current_attempt
from ..storage.lease import Lease
from ..storage.objects import Storage, StorageError
from ..tracking.console import Output
from ..tracking.tracker import Tracker

NAME = "outcome.json"


def read_outcome(storage: Storage) -> dict[str, Any]:
    """How a run ended; empty where there is no file, or none that can be read."""
    try:
        return dict(json.loads(storage.read(NAME)))
    except (StorageError, ValueError, TypeError):
        return {}


class OutcomeFile:
    def __init__(self, storage: Storage, lease: Lease, tracker: Tracker) -> None:
        self.storage, self.lease, self.tracker = storage, lease, tracker

    def read(self) -> dict[str, Any]:
        return read_outcome(self.storage)

    def write(self, outcome: dict[str, Any]) -> None:
        if self.lease.lost:  # the directory is another job's, and so is its outcome
            return
        try:
            # A batch script asks whose outcome this is.
            attempt = {"life": current_attempt()} if current_attempt() else {}
            self.storage.write(NAME, json.dumps({**outcome, **attempt}, indent=1).encode())
        except StorageError as error:
            self.tracker.note(f"warning: {error}")

    def refused(self, outcome: Outcome) -> None:
        """Training ended for a reason that the user has to mend: a batch script need not try again."""
        self.write({"status": outcome.status, "step": outcome.step, "reason": outcome.reason})

    def crashed(self, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.write({"status": "crashed", "step": None, "reason": reason})


def reached(outcome: dict[str, Any], limits: Limits) -> bool:
    """Whether a run that ended so has reached its duration."""
    if outcome.get("status") != "done":
        return False
    if limits.total_steps is not None:
        return outcome["step"] >= limits.total_steps
    return outcome.get("seconds", 0.0) >= (limits.total_seconds or 0.0)


def print_result(result: dict[str, Any]) -> None:
    """The last line of a run."""
    hidden = ("reason", "metrics", "seconds", "health", "rollbacks", "goodput", "life")
    shown = {key: value for key, value in result.items() if key not in hidden}
    print(json.dumps(shown), file=Output(sys.stdout), flush=True)
