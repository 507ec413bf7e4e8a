"""Two ranks of one thread against one process of one thread, in fp32 at a fixed global batch: CNN and DCGAN.

All contenders are started at once, with torchrun where there are ranks, and then take turns. The last row of each table
is the ceiling: two processes with half of the batch each that never exchange anything. CPU time is of one rank: what it
has more than half of the one process's is the price of the exchange.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass

from .common import SETTINGS, at_least, ratios, spread, table, take_turns
from .processes import answer, called, started


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
        return [[*launcher, "-m", "benchmarks.ranks", *arguments]] * self.copies


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
GROUPS = {"CNN": ("one", 1.6), "DCGAN, 64 pixels": ("gan one", 1.9)}


def contend(name: str, data: str) -> None:
    """One rank."""
    from .ours import ours

    contender = CONTENDERS[name]
    settings = {**SETTINGS[contender.network], "batch_norm": contender.batch_norm}
    settings["batch_size"] //= 2 if contender.halved else 1
    with called() as line, ours(data, settings) as run:
        answer(line, name, run.block)


def measure(data: str, quick: bool) -> None:
    commands = {name: contender.commands([name, data]) for name, contender in CONTENDERS.items()}
    answers = {name: contender.ranks * contender.copies for name, contender in CONTENDERS.items()}
    with started(commands, answers) as blocks:
        costs = take_turns(blocks, 0.5 if quick else 3.0, 1 if quick else 9)
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
        table(f"ranks: {title}, fp32, fixed global batch, 1 thread a rank", header, rows, notes)


if __name__ == "__main__":
    contend(sys.argv[1], sys.argv[2])
