"""Where numbers and pictures go: the metric log always, the console, W&B. Ranks other than the first use `Silent`.

W&B receives a segment of the log when the checkpoint that ends it is committed, so that a step is never there twice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..metrics.health import Verdict
from ..storage.metric_log import UPLOAD_SECONDS, MetricLog
from ..storage.objects import StorageError
from .console import Console

Metrics = dict[str, float]


class Sink(Protocol):
    """Takes committed records, such as W&B. Never raises; only `close` may wait, and not for long."""

    def past(self, records: list[dict[str, Any]]) -> None:
        """The records of earlier attempts at the run, which this sink may have or not. Comes first."""

    def log(self, records: list[dict[str, Any]]) -> None: ...
    def image(self, step: int, name: str, picture: bytes) -> None: ...
    def alert(self, title: str, text: str) -> None: ...
    def close(self, summary: dict[str, Any], failed: bool) -> None: ...


class Silent:
    """The tracker of the ranks that are not the first."""

    def progress(self, step: int) -> None: ...
    def log(self, step: int, kind: str, values: Metrics) -> None: ...
    def health(self, verdict: Verdict) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Tracker:
    """Rank 0's tracker."""

    log_: MetricLog
    console: Console
    sinks: tuple[Sink, ...] = ()
    records: list[dict[str, Any]] = field(default_factory=list)  # all of the run, for curves and the best checkpoint
    _pending: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    sent: int = 0  # records that the sinks have had, those that a rollback made void included
    _past: list[dict[str, Any]] | None = None  # what `records` held when this attempt began to log
    _uploading: threading.Thread | None = None
    _warned: bool = False

    def progress(self, step: int) -> None:
        self.console.progress(step)

    def log(self, step: int, kind: str, values: Metrics) -> None:
        self._catch_up()
        record = {"step": step, "kind": kind, **values}
        self.records.append(record)
        try:
            self.log_.append(record)
        except OSError as error:  # a full disk must not end the run
            self.note(f"warning: the metric log cannot be written: {error}")
        self.console.log(step, kind, values)
        if self.log_.due() and not (self._uploading and self._uploading.is_alive()):
            self._uploading = threading.Thread(target=self.flush, name="metrics", daemon=True)
            self._uploading.start()

    def note(self, text: str) -> None:
        self.console.note(text)

    def cut(self, step: int) -> None:
        self._pending.append((step, self.log_.cut(step)))

    def flush(self) -> None:
        """Make the segments before a checkpoint durable, ahead of its commit.

        What cannot be written is warned of and tried again later: metrics are worth less than the checkpoint.
        """
        try:
            self.log_.flush()
            self._warned = False
        except StorageError as error:
            if not self._warned:
                self.note(f"warning: the metric log: {error}")
            self._warned = True

    def committed(self, step: int) -> None:
        """Pass on what a committed checkpoint covers: it will not be logged again."""
        while self._pending and self._pending[0][0] <= step:
            _, records = self._pending.pop(0)
            self.sent += len(records)
            for sink in self.sinks:
                sink.log(records)

    def health(self, verdict: Verdict) -> None:
        """Say that training has become unhealthy, or healthy again."""
        self.console.health = verdict.state
        self.note(f"health at step {verdict.step}: {verdict.state}: {verdict.reason}")
        for sink in self.sinks:
            sink.alert(verdict.state, f"step {verdict.step}: {verdict.reason}")

    def rewind(self, step: int) -> int:
        """Forget what was logged after a checkpoint; returns how many records of the sinks are now void, in all."""
        self._pending.clear()
        self._catch_up()  # where this attempt has logged nothing yet
        return self.sent - len(self.log_.before(step))

    def _catch_up(self) -> None:
        """Tell the sinks once what earlier attempts have logged."""
        if self._past is None:
            self._past = list(self.records)
            self.sent += len(self._past)
            for sink in self.sinks:
                sink.past(self._past)

    def image(self, step: int, name: str, picture: bytes) -> None:
        for sink in self.sinks:
            sink.image(step, name, picture)

    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "evaluate"]

    def best(self, metric: str, maximise: bool, among: Iterable[int] | None = None) -> int | None:
        """The step with the best evaluation."""
        allowed = None if among is None else set(among)
        candidates = [
            record
            for record in self.evaluations()
            if math.isfinite(record.get(metric, math.nan)) and (allowed is None or record["step"] in allowed)
        ]
        pick: Callable[..., Any] = max if maximise else min
        return pick(candidates, key=lambda r: r[metric])["step"] if candidates else None

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        self.console.close()
        if self._uploading:
            self._uploading.join(UPLOAD_SECONDS)
        try:
            self.log_.close()
        except StorageError as error:
            self.note(f"warning: the metric log: {error}")
        for sink in self.sinks:
            if summary.get("status") == "done":  # any other run resumes from its checkpoint and logs this again
                sink.log(self.log_.tail())
            sink.close(summary, failed)
