"""A run stops by itself before its job ends, also without a signal, and a signal that comes early is not lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.distributed.deadline import Deadline, end_of_job, p95

from ..ranks import run
from ..results import final_tensors, largest_difference, outcome, records

SETTINGS = ["--log.every", "500 steps", "--checkpoint.every", "100 steps", "--evaluate.every", "1000 steps",
            "--run.url", "run", "--schedule.name", "constant"]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "end"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000", "LAUNCH_END": "1"}, 1.8e9),
        ({"SLURM_JOB_ID": "7", "LAUNCH_END": "1800000000"}, 1.8e9),
        ({"SLURM_JOB_ID": "7", "LAUNCH_END": "N/A"}, None),
        ({"SLURM_JOB_ID": "7", "PATH": "/nowhere"}, None),
    ],
)
def test_the_end_of_the_job_is_what_slurm_says(environment: dict[str, str], end: float | None) -> None:
    assert end_of_job(environment) == end


@pytest.mark.parametrize(("answer", "end"), [("echo 1800000000", 1.8e9), ("echo NONE", None), ("exit 1", None)])
def test_where_the_environment_does_not_tell_squeue_does(tmp_path: Path, answer: str, end: float | None) -> None:
    (tmp_path / "squeue").write_text(
        f'#!/bin/sh\n[ "$SLURM_TIME_FORMAT $*" = "%s -h -j 7 -o %e" ] || exit 1\n{answer}\n'
    )
    (tmp_path / "squeue").chmod(0o755)
    assert end_of_job({"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}) == end


def test_the_95th_percentile() -> None:
    assert p95([]) == 0
    assert p95([3.0]) == 3
    assert p95([1.0] * 94 + [9.0] * 6) == 9
    assert p95([1.0] * 96 + [9.0] * 4) == 1


def test_the_margin_is_made_of_the_measured_steps_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    deadline = Deadline(end=now + 100_000)
    assert deadline.margin() == pytest.approx(2 * 0.2 + 30 + 20)
    for _ in range(50):
        deadline.step()
        now += 3
    deadline.saved(40)
    assert deadline.margin() == pytest.approx(2 * 3 + 1.5 * 40 + 20)
    assert deadline.reached() == ""
    now = 101_000 - 87
    assert deadline.reached() == ""
    now += 2
    assert deadline.reached() == "the end of the job's time"
    deadline.saved(0)
    now -= 1000  # a decision is kept, even if the clock is set
    assert deadline.reached()


def test_without_an_end_there_is_no_deadline() -> None:
    deadline = Deadline()
    deadline.step()
    assert deadline.reached() == ""
    assert not deadline.is_time_limit("SIGUSR1")
    assert Deadline(end=time.time() + 1000).is_time_limit("SIGUSR1")
    assert not Deadline(end=time.time() + 1000).is_time_limit("SIGTERM")


@pytest.mark.parametrize("world", [1, 2])
def test_a_job_without_a_signal_stops_in_time_and_the_next_one_resumes(tmp_path: Path, world: int) -> None:
    run([*SETTINGS, "--duration", "1 step", "--run.url", "warm"], tmp_path, world)  # what is slow only once
    text = run([*SETTINGS, "--duration", "1000000 steps"], tmp_path, world,
               environment={"LAUNCH_END": str(round(time.time()) + 12), "SLURM_JOB_ID": "77"})  # fmt: skip
    end = outcome(tmp_path / "run")
    assert (end["status"], end["life"]) == ("time_limit", "77.0")
    assert "stopped by the end of the job's time; the same command resumes from here" in text
    assert json.loads(text.splitlines()[-1])["status"] == "time_limit"
    step = end["step"]
    assert step > 0
    total = ["--duration", f"{step + 100} steps"]
    run([*SETTINGS, *total], tmp_path, world)
    assert outcome(tmp_path / "run")["status"] == "done"
    (tmp_path / "alone").mkdir()
    run([*SETTINGS, *total], tmp_path / "alone", world)
    assert largest_difference(final_tensors(tmp_path / "alone" / "run"), final_tensors(tmp_path / "run")) == 0
    last = [r for r in records(tmp_path / "run") if r["kind"] == "evaluate"][-1]
    assert last == [r for r in records(tmp_path / "alone" / "run") if r["kind"] == "evaluate"][-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_while_python_imports_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *SETTINGS, "--duration", "1000000 steps", "--wandb.mode", "disabled"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not _blocks(process.pid, number):
        assert process.poll() is None
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert outcome(tmp_path / "run")["status"] == "preempted"


def _blocks(pid: int, number: signal.Signals) -> bool:
    """Whether a process blocks a signal at this moment."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigBlk")), 0)
    return bool(mask & 1 << (number - 1))
