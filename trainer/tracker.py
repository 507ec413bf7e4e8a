"""Where numbers and pictures go: the metric log always, the console, W&B. Ranks other than the first use `Silent`.

The metric log is the source of truth. It is cut into segments at checkpoints (`metrics/00001000.jsonl` holds what came
after step 1000), so that resuming deletes the segments from there on and writes them again: a step is never lost and
never there twice. W&B receives a segment when the checkpoint that ends it is committed, for the same reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from .metrics.health import Verdict
from .storage import Storage, StorageError

Metrics = dict[str, float]
TIMING = ("samples_per_second", "data_wait", "gpu_memory_bytes")  # what differs between two equal runs
SHOWN = ("loss", "accuracy", "convergence")  # ends of the names that the console shows; the log has all of them
NOT_SHOWN = ("top5_accuracy", "code_accuracy", "code_read_accuracy", "code_loss", "real_loss", "fake_loss")
SHORT = {"discriminator_loss": "D loss", "discriminator_accuracy": "D accuracy", "generator_loss": "G loss",
         "critic_loss": "C loss", "code_generated_accuracy": "code accuracy"}  # fmt: skip
WIDTH = 80  # of a line on the console
UPLOAD_SECONDS = 10.0


class Sink(Protocol):
    """A place that takes committed records, such as W&B. Never raises; only `close` may wait, and not for long."""

    def past(self, records: list[dict[str, Any]]) -> None:
        """The records of earlier lives of the run, which this place may have or not. Comes first."""

    def log(self, records: list[dict[str, Any]]) -> None: ...
    def image(self, step: int, name: str, png: bytes) -> None: ...
    def alert(self, title: str, text: str) -> None: ...
    def close(self, summary: dict[str, Any], failed: bool) -> None: ...


class MetricLog:
    """JSON lines in segments below `metrics/`.

    A local segment is written line by line. One that is remote, or whose local file failed, is held in memory and
    written as a whole by `flush`, until that succeeds.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._segment = 0
        self._lines: list[str] = []
        self._unsaved: dict[int, list[str]] = {}  # by segment
        self._ended: list[IO[str]] = []  # local files to make durable
        self._file: IO[str] | None = None
        self._written = time.monotonic()
        self._flushing = threading.Lock()  # of two uploads of one segment, the older must not come last

    @staticmethod
    def _name(segment: int) -> str:
        return f"metrics/{segment:08d}.jsonl"

    def segments(self) -> list[int]:
        found = (re.fullmatch(r"(\d{8,})\.jsonl", name) for name in self._storage.list("metrics"))
        return sorted(int(match[1]) for match in found if match)

    def read(self, segment: int) -> list[dict[str, Any]]:
        """The records of a segment; a torn last line is left out."""
        return read_records(self._storage.read(self._name(segment)))

    def before(self, step: int) -> list[dict[str, Any]]:
        """What was logged before the checkpoint of a step."""
        return [record for segment in self.segments() if segment < step for record in self.read(segment)]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Start after `step`: forget what came later and return what came before."""
        records = self.before(step)
        for segment in self.segments():
            if segment >= step:
                self._storage.delete(self._name(segment))
        self._segment = step
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record. Raises OSError where the local disk does not take it; it is kept in memory all the same."""
        self._lines.append(json.dumps(_finite(record)) + "\n")
        if not self._storage.local or self._segment in self._unsaved:
            self._unsaved[self._segment] = list(self._lines)
            return
        try:
            if self._file is None:
                path = Path(self._storage.url.removeprefix("file://")) / self._name(self._segment)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8")
            self._file.write(self._lines[-1])
            self._file.flush()
        except OSError:
            self._unsaved[self._segment] = list(self._lines)
            if self._file:
                _close(self._file)
                self._file = None
            raise

    def cut(self, step: int) -> list[dict[str, Any]]:
        """End the segment at a checkpoint; returns its records."""
        if step == self._segment:  # nothing was trained since; what comes still belongs here
            return []
        records = self.tail()
        if self._file:
            self._ended.append(self._file)
        self._segment, self._lines, self._file = step, [], None
        return records

    def tail(self) -> list[dict[str, Any]]:
        """The records since the last cut."""
        return [_parse(line) for line in self._lines]

    def due(self) -> bool:
        """Whether a log in memory has waited long enough to be written between checkpoints."""
        return bool(self._unsaved) and time.monotonic() - self._written > UPLOAD_SECONDS

    def flush(self) -> None:
        """Make durable what was logged; raises StorageError. May run in several threads."""
        with self._flushing:
            self._written = time.monotonic()
            while self._ended:
                file = self._ended.pop()
                with contextlib.suppress(OSError):  # not every file system can do it
                    os.fsync(file.fileno())
                _close(file)
            for segment in sorted(self._unsaved):
                lines = self._unsaved[segment]
                self._storage.write(self._name(segment), "".join(lines).encode())
                # Appending replaces the list, so this tells whether something was added meanwhile. A local segment
                # that is still growing stays here: its file was replaced.
                if self._unsaved[segment] is lines and not (self._storage.local and segment == self._segment):
                    del self._unsaved[segment]

    def close(self) -> None:
        if self._file:
            self._ended.append(self._file)
            self._file = None
        self.flush()


def _close(file: IO[str]) -> None:
    with contextlib.suppress(OSError):
        file.close()


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON can hold it, which knows no nan and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _parse(line: str) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not a record")
    return {name: math.nan if value is None else value for name, value in record.items()}


def read_records(data: bytes) -> list[dict[str, Any]]:
    """The records of a segment; a torn last line is left out."""
    records = []
    for line in data.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            records.append(_parse(line))
    return records


def duration_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate_text(value: float) -> str:
    return f"{value / 1000:.1f}k/s" if value >= 10000 else f"{value:.0f}/s"


def value_text(name: str, value: float) -> str:
    if name.endswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:#.4g}" if abs(value) < 1000 else f"{value:.4g}"


def shown_text(values: Metrics) -> list[str]:
    """The values that the console shows, losses before accuracies, each with its name."""
    names = [name for end in SHOWN for name in values if name.endswith(end) and name not in NOT_SHOWN]
    scores = [name for name in values if name.startswith("fid@") or name == "modes"]
    shown = {name: SHORT.get(name, name.partition("@")[0]) for name in scores + names}
    return [f"{label} {value_text(name, values[name])}" for name, label in shown.items()]


class Console:
    """A progress bar with ETA on a terminal, lines of the same content without one."""

    def __init__(self, total: int | None, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._total = total
        self._step = self._first = 0
        self._begin = time.monotonic()
        self._terminal = self._stream.isatty()
        self._latest: Metrics = {}
        self._shown = 0.0
        self._bar: Any = None
        self.health = "healthy"

    def start(self, step: int) -> None:
        """Training begins at this step."""
        self._begin, self._first, self._step = time.monotonic(), step, step
        if not self._terminal:
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=RichConsole(file=self._stream), refresh_per_second=8, transient=True, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task(self._describe(), total=self._total, completed=step)
        self._bar.start()

    def progress(self, step: int) -> None:
        self._step = step
        if self._bar is not None and (now := time.monotonic()) - self._shown > 0.1:
            self._shown = now
            self._bar.update(self._task, completed=step, description=self._describe())

    def _where(self) -> str:
        return f"{self._step:>{len(str(self._total))}}/{self._total}" if self._total else str(self._step)

    def _describe(self) -> str:
        rate = [rate_text(self._latest["samples_per_second"])] if "samples_per_second" in self._latest else []
        health = [] if self.health == "healthy" else [self.health.replace("_", " ")]
        return _line([self._where(), *health, *shown_text(self._latest), *rate, self._remaining()], WIDTH - 6)

    def _remaining(self) -> str:
        done = self._step - self._first
        if not self._total or not done:
            return ""
        seconds = (time.monotonic() - self._begin) / done * (self._total - self._step)
        return f"ETA {duration_text(seconds)}"

    def log(self, step: int, kind: str, values: Metrics) -> None:
        self._step = step
        if kind == "train":
            self._latest = values
            if self._terminal:
                return
        parts = [f"step {self._where()}", f"epoch {values['epoch']:.2f}", *shown_text(values)]
        if kind == "train":
            parts += [rate_text(values["samples_per_second"]), self._remaining()]
        self.note(_line([*parts, *(["held out"] if kind == "evaluate" else [])], WIDTH))

    def note(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # a full disk behind standard output must not end the run; the metric log has the numbers
            return

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _line(parts: list[str], width: int) -> str:
    """The parts in one line, set closer where it would be too long."""
    line = "  ".join(filter(None, parts))
    return line if len(line) <= width else " ".join(filter(None, parts))


class Silent:
    """The tracker of the ranks that are not the first."""

    def progress(self, step: int) -> None: ...
    def log(self, step: int, kind: str, values: Metrics) -> None: ...
    def note(self, text: str) -> None: ...
    def cut(self, step: int) -> None: ...
    def health(self, verdict: Verdict) -> None: ...


@dataclass
class Tracker:
    """Rank 0's tracker."""

    log_: MetricLog
    console: Console
    sinks: tuple[Sink, ...] = ()
    records: list[dict[str, Any]] = field(default_factory=list)  # all of the run, for curves and the best checkpoint
    _pending: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    sent: int = 0  # records that the sinks have had, those that a rollback made void included
    _past: list[dict[str, Any]] | None = None  # what `records` held when this life began to log
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
        """Forget what was logged after a checkpoint; returns how many records the sinks have had in vain, in all."""
        self._pending.clear()
        self._catch_up()  # where this life has logged nothing yet
        return self.sent - len(self.log_.before(step))

    def _catch_up(self) -> None:
        """Tell the sinks once what earlier lives have logged."""
        if self._past is None:
            self._past = list(self.records)
            self.sent += len(self._past)
            for sink in self.sinks:
                sink.past(self._past)

    def image(self, step: int, name: str, png: bytes) -> None:
        for sink in self.sinks:
            sink.image(step, name, png)

    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "evaluate"]

    def best(self, metric: str, maximise: bool, among: Iterable[int] | None = None) -> int | None:
        """The step with the best evaluation."""
        allowed = None if among is None else set(among)
        found = [
            record
            for record in self.evaluations()
            if math.isfinite(record.get(metric, math.nan)) and (allowed is None or record["step"] in allowed)
        ]
        pick: Callable[..., Any] = max if maximise else min
        return pick(found, key=lambda r: r[metric])["step"] if found else None

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        self.console.close()
        if self._uploading:
            self._uploading.join(UPLOAD_SECONDS)
        try:
            self.log_.close()
        except StorageError as error:
            self.note(f"warning: the metric log: {error}")
        for sink in self.sinks:
            if summary.get("status") == "done":  # any other run goes on from its checkpoint and logs this again
                sink.log(self.log_.tail())
            sink.close(summary, failed)
