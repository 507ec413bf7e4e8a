"""The metric log of a run: JSON lines, the source of truth.

It is cut into segments at checkpoints (`metrics/00001000.jsonl` holds what came after step 1000), so that resuming
deletes the segments from there on and writes them again: no step is lost or logged twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from pathlib import Path
from typing import IO, Any

from .objects import Storage

TIMING = ("samples_per_second", "data_wait", "gpu_memory_bytes")  # what differs between two equal runs
UPLOAD_SECONDS = 10.0


class MetricLog:
    """JSON lines in segments below `metrics/`.

    A local segment is written line by line. One that is remote, or whose local file failed, is held in memory and
    rewritten completely by `flush`, until that succeeds.
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
        matches = (re.fullmatch(r"(\d{8,})\.jsonl", name) for name in self._storage.list("metrics"))
        return sorted(int(match[1]) for match in matches if match)

    def read(self, segment: int) -> list[dict[str, Any]]:
        """The records of a segment; a torn last line is left out."""
        return read_records(self._storage.read(self._name(segment)))

    def before(self, step: int) -> list[dict[str, Any]]:
        """What was logged before the checkpoint of a step."""
        return [record for segment in self.segments() if segment < step for record in self.read(segment)]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Start after `step`: delete what came later and return what came before."""
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
                # Appending replaces the list, so a different list means that something was added meanwhile. A local
                # segment that is still growing stays in memory: its file was replaced.
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
    """The record as JSON can hold it, which has neither nan nor infinity."""
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
