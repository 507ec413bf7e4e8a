"""Two ranks of one thread against one process of one thread, in fp32 at a fixed global batch: CNN and DCGAN.

All contenders are started at once, with torchrun where there are ranks, and then take turns. The last row of each table
is the ceiling: two processes with half of the batch each that never exchange anything. The plain program
(benchmarks/plain.py) stands beside our one process. The CNN's target is over ours. The DCGAN's is over the plain
program, of which the figures that it lies between are: 1.67 for DDP around it, 2.06 without the reductions that it does
not need. Over ours it would lie above what two processes reach that do nothing in common.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass

from .common import SETTINGS, at_least, ratios, spread, steps_of, table, take_turns
from .processes import answer, called, started


@dataclass(frozen=True)
class Contender:
    title: str
    network: str = "cnn"
    halved: bool = False  # the batch
    batch_norm: str = "sync"
    ranks: int = 1
    copies: int = 1  # processes that know nothing of each other
    plain: bool = False  # the program that does without us

    def commands(self, arguments: list[str]) -> list[list[str]]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        launcher = torchrun if self.ranks > 1 else []
        return [[*launcher, "-m", "benchmarks.ranks", *arguments]] * self.copies


CONTENDERS = {
    "plain": Contender("plain program", plain=True),
    "one": Contender("1 process"),
    "local": Contender("2 ranks, BN local", batch_norm="local", ranks=2),
    "sync": Contender("2 ranks, BN sync", ranks=2),
    "apart": Contender("2 apart, b50 each", halved=True, copies=2),
    "gan plain": Contender("plain program", "dcgan", plain=True),
    "gan one": Contender("1 process", "dcgan"),
    "gan local": Contender("2 ranks, BN local", "dcgan", batch_norm="local", ranks=2),
    "gan sync": Contender("2 ranks, BN sync", "dcgan", ranks=2),
    "gan apart": Contender("2 apart, b32 each", "dcgan", halved=True, copies=2),
}
# The networks, their two bases, and what two ranks have to reach over which of these.
GROUPS = {
    "CNN, b100": ("cnn", {"over ours": "one", "over plain": "plain"}, "over ours", 1.6),
    "DCGAN 64px, b64": ("dcgan", {"over ours": "gan one", "over plain": "gan plain"}, "over plain", 1.9),
}


def contend(name: str, data: str) -> None:
    """One rank."""
    contender = CONTENDERS[name]
    settings = {**SETTINGS[contender.network], "batch_norm": contender.batch_norm}
    settings["batch_size"] //= 2 if contender.halved else 1
    with called() as line:
        if contender.plain:
            from . import plain

            answer(line, name, steps_of(plain.program(data, contender.network)))
        else:
            from .ours import ours

            with ours(data, settings) as run:
                answer(line, name, run.block)


def measure(data: str, quick: bool) -> None:
    commands = {name: contender.commands([name, data]) for name, contender in CONTENDERS.items()}
    answers = {name: contender.ranks * contender.copies for name, contender in CONTENDERS.items()}
    with started(commands, answers) as blocks:
        costs = take_turns(blocks, 0.5 if quick else 3.0, 1 if quick else 9)
    cores = len(os.sched_getaffinity(0))
    notes = [f"only {cores} core: two ranks cannot be faster"] if cores < 2 else []
    for title, (network, bases, judged, wanted) in GROUPS.items():
        rows = []
        for name, contender in CONTENDERS.items():
            if contender.network != network:
                continue
            walls = [cost.wall for cost in costs[name]]
            gains = {over: ratios([cost.wall for cost in costs[base]], walls) for over, base in bases.items()}
            target = at_least(gains[judged], wanted) if contender.ranks > 1 else ""
            median = f"{1e3 * statistics.median(walls):.1f}"
            rows.append([contender.title, median, *map(spread, gains.values()), target])
        header = ["", "ms/step", *bases, "target"]
        table(f"ranks: {title} in all, fp32, 1 thread a rank; the target is {judged}", header, rows, notes)


if __name__ == "__main__":
    contend(sys.argv[1], sys.argv[2])
