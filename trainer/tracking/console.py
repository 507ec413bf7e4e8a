"""What a person sees of a run: a progress bar on a terminal, lines without one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from ..figures import ScalarDisplay

WIDTH = 80  # of a line on the console


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


def shown_text(values: Mapping[str, float], scalars: Mapping[str, ScalarDisplay]) -> list[str]:
    """The values that the console shows, in the order of `scalars`; of several feature extractors each score."""
    names = [n for s in scalars if scalars[s].on_console for n in values if n == s or n.startswith(f"{s}@")]
    bases = {name: name.partition("@")[0] for name in names}
    return [f"{scalars[base].label or base} {value_text(base, values[name])}" for name, base in bases.items()]


class Output:
    """A text stream that a run may lose, and goes on without: a closed pipe or terminal, a full disk behind it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed in this process
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal of fewer characters
                encoding = getattr(self._stream, "encoding", None) or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class Console:
    """A progress bar with ETA on a terminal, lines of the same content without one."""

    def __init__(
        self, total: int | None, scalars: Mapping[str, ScalarDisplay] = {}, stream: IO[str] | None = None
    ) -> None:
        self._scalars = scalars
        self._stream: Any = Output(stream or sys.stdout)
        self._total = total
        self._step = self._first = 0
        self._begin = time.monotonic()
        self._terminal = self._stream.isatty()
        self._latest: dict[str, float] = {}
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
        return _line(
            [self._where(), *health, *shown_text(self._latest, self._scalars), *rate, self._remaining()], WIDTH - 6
        )

    def _remaining(self) -> str:
        done = self._step - self._first
        if not self._total or not done:
            return ""
        seconds = (time.monotonic() - self._begin) / done * (self._total - self._step)
        return f"ETA {duration_text(seconds)}"

    def log(self, step: int, kind: str, values: dict[str, float]) -> None:
        self._step = step
        if kind == "train":
            self._latest = values
            if self._terminal:
                return
        parts = [f"step {self._where()}", f"epoch {values['epoch']:.2f}", *shown_text(values, self._scalars)]
        if kind == "train":
            parts += [rate_text(values["samples_per_second"]), self._remaining()]
        self.note(_line([*parts, *(["held out"] if kind == "evaluate" else [])], WIDTH))

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _line(parts: list[str], width: int) -> str:
    """The parts in one line, set closer where it would be too long."""
    line = "  ".join(filter(None, parts))
    return line if len(line) <= width else " ".join(filter(None, parts))
