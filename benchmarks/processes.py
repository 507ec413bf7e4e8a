"""Contenders in processes of their own, which take turns at a word from here. What one does to its process (memory,
threads, imports) neither helps nor hinders another; those whose turn it is not wait on a socket. Never imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from .common import REPOSITORY, Block, Cost

ADDRESS = "BENCHMARK_ADDRESS"  # of the one who gives the word, in the environment of the contenders
PATIENCE = 120  # seconds
Command = Sequence[str]  # arguments of a Python


@contextlib.contextmanager
def called() -> Iterator[IO[str]]:
    """For a contender: the line to the one who gives the word. Say who you are once you are ready."""
    host, port = os.environ[ADDRESS].split(":")
    with socket.create_connection((host, int(port))) as connection, connection.makefile("rw") as line:
        yield line


def answer(line: IO[str], name: str, block: Block) -> None:
    """For a contender: run blocks of steps when told to, until there are no more."""
    _send(line, name)
    for steps in line:
        _send(line, asdict(block(json.loads(steps))))


@contextlib.contextmanager
def started(contenders: Mapping[str, Sequence[Command]], answers: Mapping[str, int]) -> Iterator[dict[str, Block]]:
    """Contenders by name, ready to run. Each is some commands, of which `answers[name]` processes will call."""
    processes: list[subprocess.Popen[bytes]] = []
    lines: dict[str, list[IO[str]]] = {name: [] for name in contenders}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        environment = {**os.environ, ADDRESS: f"127.0.0.1:{server.getsockname()[1]}"}
        try:
            for commands in contenders.values():
                for command in commands:
                    processes.append(subprocess.Popen([sys.executable, *command], env=environment, cwd=REPOSITORY))
            for _ in range(sum(answers[name] for name in contenders)):
                connection = _accepted(server, processes)
                connection.settimeout(PATIENCE)
                with connection:  # the file keeps it open
                    line: IO[str] = connection.makefile("rw")
                lines[json.loads(line.readline())].append(line)
            yield {name: _together(files) for name, files in lines.items()}
            for files in lines.values():
                for line in files:
                    line.close()
            for process in processes:
                process.wait(PATIENCE)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def _together(lines: list[IO[str]]) -> Block:
    """A block of steps in all processes of a contender. The slowest counts; CPU time is the mean."""

    def block(steps: int) -> Cost:
        for line in lines:
            _send(line, steps)
        costs = [Cost(**json.loads(line.readline())) for line in lines]
        return Cost(max(cost.wall for cost in costs), sum(cost.cpu for cost in costs) / len(costs))

    return block


def _send(line: IO[str], message: Any) -> None:
    line.write(json.dumps(message) + "\n")
    line.flush()


def _accepted(server: socket.socket, processes: list[subprocess.Popen[bytes]]) -> socket.socket:
    """The connection of the next process; raises RuntimeError where one has ended instead."""
    for _ in range(PATIENCE):
        with contextlib.suppress(TimeoutError):
            return server.accept()[0]
        if ended := next((process for process in processes if process.poll() is not None), None):
            raise RuntimeError(f"a process ended before it was ready: {ended.args!r}")
    raise RuntimeError(f"the processes were not ready after {PATIENCE} s")
