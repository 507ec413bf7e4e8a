"""Where numbers and pictures go: the metric log always, the console, W&B. Ranks other than the first use `Silent`.

The metric log is the source of truth. It is cut into segments at checkpoints (`metrics/00001000.jsonl` holds what came
after step 1000), so that resuming deletes the segments from there on and writes them again: a step is never lost and
never there twice. W&B receives a segment when the checkpoint that ends it is committed, for the same reason.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from .storage import Storage, StorageError

Metrics = dict[str, float]
TIMING = ("samples_per_second", "data_wait", "gpu_memory_bytes")  # what differs between two equal runs
SHOWN = ("loss", "accuracy")  # ends of the names that the console shows; the log has all of them
UPLOAD_SECONDS = 10.0


class Sink(Protocol):
    """A place that takes committed records, such as W&B. Must never raise and never wait."""

    def log(self, records: list[dict[str, Any]]) -> None: ...
    def image(self, step: int, name: str, png: bytes) -> None: ...
    def close(self, summary: dict[str, Any], failed: bool) -> None: ...


class MetricLog:
    """JSON lines in segments below `metrics/`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._segment = 0
        self._lines: list[str] = []
        self._unsaved: dict[int, list[str]] = {}  # by segment; a local disk has none
        self._file: IO[str] | None = None
        self._written = time.monotonic()

    @staticmethod
    def _name(segment: int) -> str:
        return f"metrics/{segment:08d}.jsonl"

    def segments(self) -> list[int]:
        names = self._storage.list("metrics")
        return sorted(int(name.partition(".")[0]) for name in names if name.endswith(".jsonl"))

    def read(self, segment: int) -> list[dict[str, Any]]:
        """The records of a segment; a torn last line is left out."""
        return read_records(self._storage.read(self._name(segment)))

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Start after `step`: forget what came later and return what came before."""
        records: list[dict[str, Any]] = []
        for segment in self.segments():
            if segment >= step:
                self._storage.delete(self._name(segment))
            else:
                records += self.read(segment)
        self._open(step)
        return records

    def _open(self, segment: int) -> None:
        if self._file:
            self._file.close()
        self._segment, self._lines, self._file = segment, [], None
        if self._storage.local:
            path = Path(self._storage.url.removeprefix("file://")) / self._name(segment)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record) + "\n"
        self._lines.append(line)
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._unsaved[self._segment] = list(self._lines)

    def cut(self, step: int) -> list[dict[str, Any]]:
        """End the segment at a checkpoint; returns its records."""
        records = [json.loads(line) for line in self._lines]
        self._open(step)
        return records

    def due(self) -> bool:
        """Whether a remote log has waited long enough to be uploaded between checkpoints."""
        return bool(self._unsaved) and time.monotonic() - self._written > UPLOAD_SECONDS

    def flush(self) -> None:
        """Upload what a remote log holds back; raises StorageError. Runs in the checkpoint's thread as well."""
        self._written = time.monotonic()
        for segment in sorted(self._unsaved):
            lines = self._unsaved[segment]
            self._storage.write(self._name(segment), "".join(lines).encode())
            if self._unsaved.get(segment) is lines:
                del self._unsaved[segment]

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        self.flush()


def read_records(data: bytes) -> list[dict[str, Any]]:
    """The records of a segment; a torn last line is left out."""
    records = []
    for line in data.decode(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
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
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.4e}"


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

    def start(self, step: int) -> None:
        """Training begins at this step."""
        self._begin, self._first, self._step = time.monotonic(), step, step
        if not self._terminal:
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        bar = Progress(
            BarColumn(bar_width=None), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=RichConsole(file=self._stream), refresh_per_second=8, transient=True,
        )  # fmt: skip
        self._task = bar.add_task("starting", total=self._total, completed=self._step)
        bar.start()
        self._bar = bar

    def progress(self, step: int) -> None:
        self._step = step
        if self._bar is not None and (now := time.monotonic()) - self._shown > 0.1:
            self._shown = now
            self._bar.update(self._task, completed=step, description=self._describe())

    def _describe(self) -> str:
        of = f"/{self._total}" if self._total else ""
        values = " ".join(f"{n} {value_text(n, v)}" for n, v in self._latest.items() if n.endswith(SHOWN))
        rate = rate_text(self._latest["samples_per_second"]) if "samples_per_second" in self._latest else ""
        return " ".join(filter(None, (f"{self._step}{of}", values, rate)))

    def _remaining(self) -> str:
        done = self._step - self._first
        if not self._total or not done:
            return ""
        seconds = (time.monotonic() - self._begin) / done * (self._total - self._step)
        return f"ETA {duration_text(seconds)}"

    def log(self, step: int, kind: str, values: Metrics) -> None:
        if kind == "train":
            self._step = step
            self._latest = values
            if self._terminal:
                return
        where = f"step {step}/{self._total}" if self._total else f"step {step}"
        parts = [where, f"epoch {values['epoch']:.2f}", *(["held out"] if kind == "evaluate" else [])]
        parts += [f"{n} {value_text(n, values[n])}" for n in values if n.endswith(SHOWN)]
        if kind == "train":
            parts += [rate_text(values["samples_per_second"]), self._remaining()]
        self.note("  ".join(filter(None, parts)))

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)  # noqa: T201 - this is the console

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Silent:
    """The tracker of the ranks that are not the first."""

    def progress(self, step: int) -> None: ...
    def log(self, step: int, kind: str, values: Metrics) -> None: ...
    def note(self, text: str) -> None: ...
    def cut(self, step: int) -> None: ...


@dataclass
class Tracker:
    """Rank 0's tracker."""

    log_: MetricLog
    console: Console
    sinks: tuple[Sink, ...] = ()
    records: list[dict[str, Any]] = field(default_factory=list)  # all of the run, for curves and the best checkpoint
    _pending: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    _uploading: threading.Thread | None = None

    def progress(self, step: int) -> None:
        self.console.progress(step)

    def log(self, step: int, kind: str, values: Metrics) -> None:
        record = {"step": step, "kind": kind, **values}
        self.records.append(record)
        try:
            self.log_.append(record)
        except OSError as error:  # a full disk must not end the run; the next segment starts afresh
            self.note(f"warning: the metric log cannot be written: {error}")
        self.console.log(step, kind, values)
        if self.log_.due() and not (self._uploading and self._uploading.is_alive()):
            self._uploading = threading.Thread(target=self._upload, daemon=True)
            self._uploading.start()

    def _upload(self) -> None:
        try:
            self.log_.flush()
        except StorageError as error:
            self.note(f"warning: {error}")

    def note(self, text: str) -> None:
        self.console.note(text)

    def cut(self, step: int) -> None:
        self._pending.append((step, self.log_.cut(step)))

    def flush(self) -> None:
        """Make the segments before a checkpoint durable, ahead of its commit."""
        self.log_.flush()

    def committed(self, step: int) -> None:
        """Pass on what a committed checkpoint covers: it will not be logged again."""
        while self._pending and self._pending[0][0] <= step:
            _, records = self._pending.pop(0)
            for sink in self.sinks:
                sink.log(records)

    def image(self, step: int, name: str, png: bytes) -> None:
        for sink in self.sinks:
            sink.image(step, name, png)

    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "evaluate"]

    def best(self, metric: str, maximise: bool, among: Iterable[int] | None = None) -> int | None:
        """The step with the best evaluation."""
        allowed = None if among is None else set(among)
        found = [r for r in self.evaluations() if metric in r and (allowed is None or r["step"] in allowed)]
        pick: Callable[..., Any] = max if maximise else min
        return pick(found, key=lambda r: r[metric])["step"] if found else None

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        self.console.close()
        if self._uploading:
            self._uploading.join(UPLOAD_SECONDS)
        try:
            self.log_.close()
        except (StorageError, OSError) as error:
            self.note(f"warning: {error}")
        for sink in self.sinks:
            sink.close(summary, failed)
