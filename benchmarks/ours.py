"""Our trainer as a contender: the real engine, loader, tracker and log, run a block of steps at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import yaml

from trainer.config.options import RunConfig
from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime
from trainer.engine import Engine
from trainer.run.build import recipe
from trainer.run.directory import NullDirectory
from trainer.run.opened import load_config
from trainer.schedule import NEVER
from trainer.storage.metric_log import MetricLog
from trainer.storage.objects import Storage
from trainer.tracking.console import Console
from trainer.tracking.tracker import Silent, Tracker

from .common import Cost

WARM = 3  # steps at the beginning of a block that do not count: the loader and the caches come back
_ALWAYS = {"duration": "1000000 steps", "seed": 0, "threads": 1, "device": "cpu", "log": {"every": "50 steps"}}


class Stopwatch:
    """The engine's tracker, with a look at the clocks after the steps that begin and end a block."""

    def __init__(self, tracker: Tracker | Silent) -> None:
        self.log, self.health, self.note = tracker.log, tracker.health, tracker.note
        self._progress = tracker.progress
        self.first = self.last = 0
        self._began = self._ended = (0.0, 0.0)

    def progress(self, step: int) -> None:
        self._progress(step)
        if step in (self.first, self.last) and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if step == self.first:
            self._began = time.perf_counter(), time.process_time()
        elif step == self.last:
            self._ended = time.perf_counter(), time.process_time()

    def cost(self) -> Cost:
        wall, cpu = (end - begin for begin, end in zip(self._began, self._ended, strict=True))
        return Cost(wall / (self.last - self.first), cpu / (self.last - self.first))


@dataclasses.dataclass
class Ours:
    engine: Engine
    stopwatch: Stopwatch
    config: RunConfig
    tracker: Tracker | Silent

    def block(self, steps: int) -> Cost:
        """The cost of that many steps of `Engine.train`, after a few that do not count."""
        engine, watch, boundary = self.engine, self.stopwatch, self.engine.boundary
        watch.first = engine.state.step + WARM
        watch.last = watch.first + steps
        boundary.limits = dataclasses.replace(boundary.limits, total_steps=watch.last)
        # The evaluation that ends a run is no part of the loop: it counts as done.
        boundary.last_eval_step, boundary.totals = watch.last, {"nothing": torch.zeros(())}
        outcome = engine.train()
        if outcome.status != "done":
            raise KeyboardInterrupt(outcome.reason)
        return watch.cost()


@contextlib.contextmanager
def ours(data: str, settings: Mapping[str, Any]) -> Iterator[Ours]:
    """The trainer as `python -m trainer` puts it together, without checkpoints and evaluation, on Fashion-MNIST unless
    the settings say otherwise."""
    values = {**_ALWAYS, **settings, "workload": {"name": "classifier", **settings["workload"]},
              "data": {"name": "fashion_mnist", "root": data, **settings.get("data", {})}}  # fmt: skip
    config = load_config(yaml.safe_dump(values), "benchmark")
    process = ProcessInfo.from_environment()
    parts = recipe(config, process.world)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-run-") as folder,
        Runtime(
            process, device=config.device, precision=config.precision, batch_norm=config.batch_norm, threads=1
        ) as runtime,
    ):
        parts.prepare_workload(runtime, config.compile)
        loader = parts.open_loader(runtime)
        log = MetricLog(Storage(folder))
        log.rewind(0)
        tracker = Tracker(log, Console(None, stream=io.StringIO())) if runtime.main else Silent()
        stopwatch = Stopwatch(tracker)
        parts.limits = dataclasses.replace(parts.limits, evaluate=NEVER, save=NEVER, samples=NEVER)
        engine = parts.engine(runtime, loader, stopwatch, NullDirectory())
        yield Ours(engine, stopwatch, config, tracker)
        log.close()
