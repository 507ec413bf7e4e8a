"""What the engine counts between two logs: means of scalars, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

Dump = dict[str, tuple[float, int]]  # sum and count by name


class Meter:
    """Sums of scalars since the last log, on the device; a rank's own."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: dict[str, Tensor], weight: float, first: bool) -> None:
        """Add means over some rows, which are `weight` of a global batch; `first` opens a batch."""
        for name, value in scalars.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value)
                self.counts[name] = 0
        torch._foreach_add_([self.sums[name] for name in scalars], list(scalars.values()), alpha=weight)
        if first:
            for name in scalars:
                self.counts[name] += 1

    def means(self, total: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, float]:
        """Means over the steps and, by `total`, over the ranks; starts again from nothing."""
        means = {name: float(value) / self.counts[name] for name, value in total(self.sums).items()}
        self.sums, self.counts = {}, {}
        return means

    def dump(self) -> Dump:
        return {name: (float(value), self.counts[name]) for name, value in self.sums.items()}

    def load(self, meters: list[Dump], rank: int, world: int, device: torch.device, dtype: torch.dtype) -> None:
        """Take over what all ranks dumped. Of another world size the first rank takes all: only the sums count."""
        own: Dump = {}
        for meter in meters[rank : rank + 1] if len(meters) == world else meters:
            for name, (value, count) in meter.items():
                before = own.get(name, (0.0, 0))[0]
                own[name] = (before + value if len(meters) == world or rank == 0 else 0.0, count)
        self.sums = {name: torch.tensor(value, device=device, dtype=dtype) for name, (value, _) in own.items()}
        self.counts = {name: count for name, (_, count) in own.items()}


class Clock:
    """The time of this attempt at the run; evaluation and saving do not count as training speed."""

    def __init__(self, seconds_before: float, step: int) -> None:
        now = time.perf_counter()
        self._origin = now - seconds_before
        self._saved = self._mark = self._interval = now
        self._interval_step = step
        self._waited = self._elsewhere = 0.0
        self.saving = self.evaluating = 0.0  # seconds of this attempt
        self._steps, self._seconds = 0, 0.0  # of training alone

    def run_seconds(self) -> float:
        """Since the beginning of the run, over all its attempts."""
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
        """Samples per second over all that was trained in this attempt."""
        return self._steps * samples_per_step / self._seconds if self._steps else 0.0
