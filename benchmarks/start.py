"""From the start of the process to the end of the first optimizer step, and the most memory a short run ever holds.

`python -m trainer` on the Fashion-MNIST CNN against the plain program, which imports torchvision: 100 steps and one
evaluation each, from unpacked files in the page cache. Ours also opens its run directory, saves a checkpoint and draws
its pictures; the largest of all that is its memory. Timed from outside, by the line that each prints after step 1.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .common import REPOSITORY, at_most, spread, table

STEPS = 100


@dataclass(frozen=True)
class Attempt:
    first_step: float  # seconds
    all: float
    memory: float  # MB


def measure_process(command: Sequence[str]) -> Attempt:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        first = 0.0
        for line in process.stdout:
            if not first and re.match(r"step +1\b", line):
                first = time.perf_counter() - began
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{' '.join(command)} failed with code {process.returncode}"
    assert first, f"{' '.join(command)} printed no line for step 1"
    return Attempt(first, time.perf_counter() - began, usage.ru_maxrss / 1024)


def measure(data: str, quick: bool) -> None:
    settings = {
        "workload.network": "cnn", "data.name": "fashion_mnist", "data.root": data, "batch_size": 100,
        "duration": f"{STEPS} steps", "log.every": "1 step", "threads": 1, "device": "cpu", "wandb.mode": "disabled",
    }  # fmt: skip
    plain = [sys.executable, "-m", "benchmarks.plain"]
    attempts: dict[str, list[Attempt]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-start-") as folder:
        for repeat in range(1 if quick else 5):
            flags = [f"--{name}={value}" for name, value in {**settings, "run.url": f"{folder}/{repeat}"}.items()]
            attempts["ours"].append(measure_process([sys.executable, "-m", "trainer", *flags]))
            attempts["plain"].append(measure_process([*plain, data, "cnn", str(STEPS)]))
    rows = []
    units = {
        "first_step": ("first step, s", 2, 0.5),
        "memory": ("peak memory, MB", 0, 300),
        "all": ("all of it, s", 2, 0),
    }
    for name, (title, digits, target) in units.items():
        sides = {side: [getattr(one, name) for one in measured] for side, measured in attempts.items()}
        extra = [a - b for a, b in zip(sides["ours"], sides["plain"], strict=True)]
        medians = [f"{statistics.median(sides[side]):,.{digits}f}" for side in sides]
        rows.append([title, *medians, spread(extra, digits), at_most(extra, target) if target else ""])
    header = ["", "ours", "plain", "ours - plain", "target"]
    table("start: python -m trainer against the plain program, CNN b100, 1 thread", header, rows)
