"""Two ranks of one thread against one process of one thread, in fp32 at a fixed global batch: CNN and DCGAN.

All contenders are started at once, with torchrun where there are ranks, and then take turns: those whose turn it is not
wait on a socket. The last row is the ceiling: two processes with half of the batch each that never exchange anything.
CPU time is of one rank: what it has more than half of the one process's is the price of the exchange.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from .common import REPOSITORY, SETTINGS, Block, Cost, at_least, ratios, spread, table, take_turns

ADDRESS = "BENCHMARK_ADDRESS"  # of the server, in the environment of the workers
PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Contender:
    title: str
    network: str = "cnn"
    halved: bool = False  # the batch
    batch_norm: str = "sync"
    ranks: int = 1
    copies: int = 1  # processes that know nothing of each other

    def commands(self, arguments: list[str]) -> list[list[str]]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        launcher = torchrun if self.ranks > 1 else []
        return [[sys.executable, *launcher, "-m", "benchmarks.ranks", *arguments]] * self.copies


CONTENDERS = {
    "one": Contender("1 process"),
    "local": Contender("2 ranks, batch_norm: local", batch_norm="local", ranks=2),
    "sync": Contender("2 ranks, batch_norm: sync", ranks=2),
    "apart": Contender("2 x b50, no exchange", halved=True, copies=2),
    "gan one": Contender("1 process", "dcgan"),
    "gan local": Contender("2 ranks, batch_norm: local", "dcgan", batch_norm="local", ranks=2),
    "gan sync": Contender("2 ranks, batch_norm: sync", "dcgan", ranks=2),
    "gan apart": Contender("2 x b32, no exchange", "dcgan", halved=True, copies=2),
}
GROUPS = {"CNN": ("one", 1.6), "DCGAN": ("gan one", 1.9)}


def worker(name: str, data: str) -> None:
    """A rank: runs blocks of steps when it is told to."""
    from .ours import ours

    contender = CONTENDERS[name]
    settings = {**SETTINGS[contender.network], "batch_norm": contender.batch_norm}
    settings["batch_size"] //= 2 if contender.halved else 1
    host, port = os.environ[ADDRESS].split(":")
    with socket.create_connection((host, int(port))) as connection, ours(data, settings) as run:
        talk = connection.makefile("rw")
        _send(talk, name)
        for line in talk:
            _send(talk, asdict(run.block(json.loads(line))))


def _send(talk: IO[str], message: Any) -> None:
    talk.write(json.dumps(message) + "\n")
    talk.flush()


def block_of(talks: list[IO[str]]) -> Block:
    """A block of steps on all ranks of a contender. The slowest counts; CPU time is the mean."""

    def block(steps: int) -> Cost:
        for talk in talks:
            _send(talk, steps)
        costs = [Cost(**json.loads(talk.readline())) for talk in talks]
        return Cost(max(cost.wall for cost in costs), sum(cost.cpu for cost in costs) / len(costs))

    return block


def _accepted(server: socket.socket, processes: list[subprocess.Popen[bytes]]) -> socket.socket:
    """The connection of the next worker; raises RuntimeError where one has ended instead."""
    for _ in range(PATIENCE):
        with contextlib.suppress(TimeoutError):
            return server.accept()[0]
        if ended := next((process for process in processes if process.poll() is not None), None):
            raise RuntimeError(f"a worker ended before it was ready: {ended.args!r}")
    raise RuntimeError(f"the workers were not ready after {PATIENCE} s")


@contextlib.contextmanager
def started(data: str) -> Iterator[dict[str, Block]]:
    """All contenders, ready to run."""
    processes: list[subprocess.Popen[bytes]] = []
    talks: dict[str, list[IO[str]]] = {name: [] for name in CONTENDERS}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        environment = {**os.environ, ADDRESS: f"127.0.0.1:{server.getsockname()[1]}"}
        try:
            for name, contender in CONTENDERS.items():
                for command in contender.commands([name, data]):
                    processes.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY))
            for _ in range(sum(contender.ranks * contender.copies for contender in CONTENDERS.values())):
                connection = _accepted(server, processes)
                connection.settimeout(PATIENCE)
                with connection:  # the file keeps it open
                    talk: IO[str] = connection.makefile("rw")
                talks[json.loads(talk.readline())].append(talk)
            yield {name: block_of(found) for name, found in talks.items()}
            for found in talks.values():
                for talk in found:
                    talk.close()
            for process in processes:
                process.wait(PATIENCE)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def measure(data: str, quick: bool) -> None:
    with started(data) as blocks:
        costs = take_turns(blocks, 0.5 if quick else 2.0, 1 if quick else 9)
    cores = len(os.sched_getaffinity(0))
    notes = [f"only {cores} core: two ranks cannot be faster"] if cores < 2 else []
    for title, (base, wanted) in GROUPS.items():
        rows = []
        one = [cost.wall for cost in costs[base]]
        for name, contender in CONTENDERS.items():
            if contender.network != CONTENDERS[base].network:
                continue
            walls = [cost.wall for cost in costs[name]]
            medians = [f"{1e3 * statistics.median(times):.1f}" for times in (walls, [cost.cpu for cost in costs[name]])]
            gain = ratios(one, walls)
            target = at_least(gain, wanted) if contender.ranks > 1 else ""
            rows.append([contender.title, *medians, spread(gain) if name != base else "1.00", target])
        header = ["", "ms/step", "CPU ms", "ratio", "target"]
        table(f"ranks: {title} fp32, fixed global batch, 1 thread a rank", header, rows, notes)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2])
