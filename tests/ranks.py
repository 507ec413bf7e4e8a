"""Runs the trainer in real processes: a forkserver with torch preloaded makes a rank in a tenth of a second."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch", "torch._dynamo", "trainer.commands.train", "trainer.commands.evaluate",
    "trainer.commands.doctor", "trainer.workloads.classifier", "accelerate",
    "sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image", "s3fs",
])  # fmt: skip


def free_port() -> int:
    """Below the ports that the system gives to connections, one of which could take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank(arguments: Sequence[str], environment: Mapping[str, str], folder: str, output: str) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from trainer.__main__ import main

    code = 1
    try:
        code = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Ranks:
    """The processes of one run."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def text(self, rank: int = 0) -> str:
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid or 0, number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; kills what is left at the timeout, and fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.kill(rank)
        assert not late, f"ranks {late} were still running after {timeout} s:\n{self.text(late[0])}"
        return [int(process.exitcode or 0) for process in self.processes]


def start(
    arguments: Sequence[object], folder: Path, world: int = 1, environment: Mapping[str, str] | None = None,
    last: tuple[Sequence[object], Mapping[str, str]] = ((), {}),
) -> Ranks:  # fmt: skip
    """Start the ranks of `python -m trainer ARGUMENTS` in a folder; the last may have more words and variables."""
    port = str(free_port())
    processes, outputs = [], []
    life = len(list(folder.glob(".output-*")))
    for rank in range(world):
        variables = {"OMP_NUM_THREADS": "1", "TRAINER_WANDB__MODE": "disabled", **(environment or {})}
        if world > 1:
            variables |= {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        words = [str(argument) for argument in (*arguments, *(last[0] if rank == world - 1 else ()))]
        variables |= last[1] if rank == world - 1 else {}
        output = folder / f".output-{life}-{rank}"
        process = _context.Process(target=_rank, args=(words, variables, str(folder), str(output)))
        process.start()
        processes.append(process)
        outputs.append(output)
    return Ranks(processes, outputs)


def run(
    arguments: Sequence[object], folder: Path, world: int = 1, environment: Mapping[str, str] | None = None,
    code: int = 0, timeout: float = 120,
) -> str:  # fmt: skip
    """Run to the end, assert the exit code of every rank, return rank 0's output."""
    ranks = start(arguments, folder, world, environment)
    codes = ranks.wait(timeout)
    assert codes == [code] * world, f"exit codes {codes}:\n" + "\n".join(ranks.text(r) for r in range(world))
    return ranks.text()


def wait_for(condition: Callable[[], bool], ranks: Ranks, timeout: float = 60) -> bool:
    """Until the condition holds; False when the ranks ended before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        if not any(process.is_alive() for process in ranks.processes):
            return False
        time.sleep(0.002)
    raise AssertionError(f"timed out:\n{ranks.text()}")
