"""Returning to an earlier checkpoint after a collapse."""

from __future__ import annotations

import json
from typing import Any

from ..boundary import Outcome
from ..storage.objects import Storage, StorageError
from ..tracking.tracker import Tracker
from .checkpoints import Checkpoints

NAME = "rollbacks.json"


class Rollbacks:
    def __init__(self, storage: Storage, checkpoints: Checkpoints, tracker: Tracker) -> None:
        self.storage, self.checkpoints, self.tracker = storage, checkpoints, tracker

    def read(self) -> list[dict[str, Any]]:
        """How often the run went back after it had ceased to be healthy, and why."""
        try:
            return list(json.loads(self.storage.read(NAME)))
        except StorageError as error:
            if error.missing:
                return []
            raise

    def roll_back(self, outcome: Outcome) -> None:
        """Make the best checkpoint from before the verdict the newest one.

        What came later is deleted before the decision is written: killed in between, the run would train that part
        again and come to the same decision.
        """
        to = self.checkpoints.go_back(before=outcome.health.step or outcome.step)
        entry = {
            "from": outcome.step, "to": to, "state": outcome.status, "reason": outcome.reason,
            "void_records": self.tracker.rewind(to),
        }  # fmt: skip
        self.storage.write(NAME, json.dumps([*self.read(), entry], indent=1).encode())
        self.tracker.note(f"rolling back from step {outcome.step} to step {to}: {outcome.status}: {outcome.reason}")
