"""What the engine counts between two logs: means of scalars, and where the time goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .workload import Scalars

if TYPE_CHECKING:
    from .distributed.runtime import Runtime


class Meter:
    """Sums of scalars since the last log, on the device; a rank's own, so part of what a checkpoint keeps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: Scalars, weight: float, first: bool) -> None:
        """Add means over some rows, which are `weight` of a global batch; `first` opens a batch."""
        for name, value in scalars.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value)
                self.counts[name] = 0
        torch._foreach_add_([self.sums[name] for name in scalars], list(scalars.values()), alpha=weight)
        if first:
            for name in scalars:
                self.counts[name] += 1

    def means(self, runtime: Runtime) -> dict[str, float]:
        """Means over the steps and the global batches, on every rank; starts anew."""
        totals = runtime.total(self.sums)
        means = {name: float(total) / self.counts[name] for name, total in totals.items()}
        self.sums, self.counts = {}, {}
        return means

    def dump(self) -> dict[str, tuple[float, int]]:
        return {name: (float(value), self.counts[name]) for name, value in self.sums.items()}

    def load(self, dumped: dict[str, tuple[float, int]], device: torch.device, dtype: torch.dtype) -> None:
        self.sums = {name: torch.tensor(value, device=device, dtype=dtype) for name, (value, _) in dumped.items()}
        self.counts = {name: count for name, (_, count) in dumped.items()}


class Clock:
    """Where the time of this life of the run goes; evaluation and saving do not count as training speed."""

    def __init__(self, seconds_before: float, step: int) -> None:
        now = time.perf_counter()
        self._origin = now - seconds_before
        self._saved = self._mark = self._interval = now
        self._interval_step = step
        self._waited = self._elsewhere = 0.0
        self.saving = self.evaluating = 0.0  # seconds of this life
        self._steps, self._seconds = 0, 0.0  # of training alone

    def run_seconds(self) -> float:
        """Since the beginning of the run, over all its lives."""
        return time.perf_counter() - self._origin

    def since_save(self) -> float:
        return time.perf_counter() - self._saved

    def start(self) -> None:
        self._mark = time.perf_counter()

    def stop_waiting(self) -> None:
        self._waited += time.perf_counter() - self._mark

    def stop_elsewhere(self, saved: bool = False) -> None:
        now = time.perf_counter()
        self._elsewhere += now - self._mark
        if saved:
            self._saved = now
            self.saving += now - self._mark
        else:
            self.evaluating += now - self._mark

    def interval(self, step: int, samples_per_step: int) -> dict[str, float]:
        """Speed and the share of the time that went into waiting for data, since the last call."""
        now = time.perf_counter()
        steps, seconds = step - self._interval_step, max(now - self._interval - self._elsewhere, 1e-9)
        values = {"samples_per_second": steps * samples_per_step / seconds, "data_wait": self._waited / seconds}
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self._interval, self._interval_step, self._waited, self._elsewhere = now, step, 0.0, 0.0
        return values

    def speed(self, samples_per_step: int) -> float:
        """Samples per second over all that was trained in this life."""
        return self._steps * samples_per_step / self._seconds if self._steps else 0.0
