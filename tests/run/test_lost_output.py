"""A run whose reader, terminal or session goes away: it goes on, or saves and ends, and is never "crashed"."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ..results import outcome, records

WORDS = ["--workload.network", "softmax", "--data.name", "fake", "--data.samples", "400", "--data.size", "8",
         "--batch_size", "10", "--log.every", "1 step", "--run.url", "run"]  # fmt: skip
ENVIRONMENT = {**os.environ, "TRAINER_WANDB__MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *WORDS, *more]


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while len(records(folder / "run")) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_reader_has_gone_trains_to_its_end(tmp_path: Path) -> None:
    """As of `python -m trainer | head -1`."""
    process = subprocess.Popen(command("--duration", "200 steps"), cwd=tmp_path, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"classifier softmax")
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert outcome(tmp_path / "run")["status"] == "done"


def on_a_terminal(folder: Path, *more: str, before: list[str] | None = None) -> tuple[subprocess.Popen[bytes], int]:
    """A run in a session of its own on a terminal, and our end of that."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen([*(before or []), *command(*more)], cwd=folder, env=ENVIRONMENT, stdin=theirs,
                               stdout=theirs, stderr=theirs, preexec_fn=take_terminal)  # fmt: skip
    os.close(theirs)
    return process, ours


def test_a_run_whose_terminal_is_closed_saves_and_is_resumed(tmp_path: Path) -> None:
    process, terminal = on_a_terminal(tmp_path, "--duration", "1000000 steps")
    wait_for_steps(tmp_path, 5, process)
    os.close(terminal)  # as when ssh is cut: SIGHUP, and nothing can be written any more
    assert process.wait(120) == 0
    ended = outcome(tmp_path / "run")
    assert ended["status"] == "preempted"
    assert ended["reason"].startswith("stopped by SIGHUP")
    step = ended["step"]
    done = subprocess.run(command("--duration", f"{step + 5} steps"), cwd=tmp_path, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert f"resuming {tmp_path}/run at step {step}" in done.stdout


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    process, terminal = on_a_terminal(tmp_path, "--duration", "600 steps", before=["nohup"])
    wait_for_steps(tmp_path, 5, process)
    os.close(terminal)
    assert process.wait(120) == 0
    assert outcome(tmp_path / "run")["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_imports_is_not_lost(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(command("--duration", "1000000 steps"), cwd=tmp_path, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not held_back(process.pid, number):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"stopped by {number.name}".encode() in output


def held_back(pid: int, number: signal.Signals) -> bool:
    """Whether a process blocks a signal, as the command line does while it imports."""
    (mask,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)
