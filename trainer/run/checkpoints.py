"""The checkpoints of a live run: saved in the background, the old ones deleted, the last one rescued if need be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..schedule import Every
from ..storage.checkpoint import Checkpoint, CheckpointStore, folder
from ..storage.lease import Lease
from ..storage.objects import Storage, StorageError
from ..tracking.tracker import Tracker

EXIT_SECONDS = 600.0  # how long the end of a run waits for its last checkpoint


class Checkpoints:
    def __init__(
        self, store: CheckpointStore, lease: Lease, tracker: Tracker, *, best: Callable[[list[int]], int | None],
        keep: int, keep_every: Every, saved: Callable[[float], None], rescue: Path,
    ) -> None:  # fmt: skip
        """Keeps the newest `keep`, the best, and one every `keep_every`.

        `best` tells which of some steps has the best evaluation; `saved` gets the seconds of each save.
        """
        self.store, self.lease, self.tracker = store, lease, tracker
        self.best = best
        self.keep, self.keep_every, self.saved, self.rescue = keep, keep_every, saved, rescue
        self.unsaved: Checkpoint | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Hand over to the background; waits for the save before it."""
        step, began = checkpoint.step, time.perf_counter()

        def work() -> None:
            self.tracker.flush()
            self.store.save(checkpoint)
            self.saved(time.perf_counter() - began)
            self.unsaved = None
            self.tracker.committed(step)
            try:
                if not self.lease.lost:
                    self.prune()
            except StorageError as error:
                self.tracker.note(f"warning: old checkpoints were not deleted: {error}")

        self.tracker.cut(step)
        self.store.wait()
        self.report_failure()
        if not self.lease.lost:  # else the run ends as soon as the ranks have voted
            self.unsaved = checkpoint
            self.store.in_background(work)

    def prune(self) -> None:
        best = self.best(self.store.steps())
        self.store.prune(self.keep, lambda step: step == best or self.keep_every.due(step))

    def go_back(self, before: int) -> int:
        """Delete what came after the best checkpoint from before a step; returns its step, 0 where there is none.

        From a checkpoint that a verdict covers already, it would be reached again before any training.
        """
        self.store.wait()
        self.report_failure()
        self.unsaved = None
        steps = self.store.steps()
        valid = [step for step in steps if step < before]
        best = self.best(valid)
        to = best if best is not None else max(valid, default=0)
        for step in reversed([step for step in steps if step > to]):
            self.store.remove(step)
        return to

    def report_failure(self) -> None:
        failure = self.store.failure()
        if failure is not None:
            self.tracker.note(f"warning: a checkpoint was not saved, training continues: {failure}")

    def finish(self) -> str | None:
        """Wait for the last checkpoint; where it cannot be saved, rescue it to the local disk and say where."""
        try:
            self.store.wait(EXIT_SECONDS)
        except TimeoutError as error:
            self.tracker.note(f"warning: {error}")
        failure = self.store.failure()
        if self.unsaved is None:
            if failure is not None:
                self.tracker.note(f"warning: after the last checkpoint: {failure}")
            return None
        rescue = Storage(str(self.rescue))
        CheckpointStore(rescue).save(self.unsaved)
        return f"the last checkpoint could not be saved ({failure}); it is in {rescue}/{folder(self.unsaved.step)}"
