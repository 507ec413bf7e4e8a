"""What the measurements share: data that both sides read, taking turns, medians, a table. Never imports torch.

Without torch, because the largest memory of a process counts from before its exec: a process that `start` measures must
not be started by a large one.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_ADAM = {"name": "adam", "lr": 2e-4, "betas": [0.5, 0.999]}
# The settings of ours that are the plain program's (benchmarks/plain.py), by the name of the network there.
SETTINGS = {
    "softmax": {"batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.01}, "workload": {"network": "softmax"}},
    "fnn": {"batch_size": 100, "optimizer": {"name": "adam", "lr": 1e-3}, "workload": {"network": "fnn"}},
    "cnn": {"batch_size": 100, "optimizer": {"name": "adam", "lr": 1e-3}, "workload": {"network": "cnn"}},
    "small dcgan": {"batch_size": 64, "optimizer": _ADAM, "workload": {"name": "dcgan", "width": 64}},
    "dcgan": {
        "batch_size": 64, "optimizer": _ADAM, "workload": {"name": "dcgan", "width": 64}, "data": {"size": 64},
    },
}  # fmt: skip
_FILES = {
    "train-images-idx3-ubyte": (60000, 28, 28), "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28), "t10k-labels-idx1-ubyte": (10000,),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Seconds a step, by the clock and of this process's CPU time, which other load on the machine disturbs less."""

    wall: float
    cpu: float


Block = Callable[[int], Cost]  # runs so many steps


@contextlib.contextmanager
def fashion_mnist() -> Iterator[tuple[str, str]]:
    """A folder with Fashion-MNIST as torchvision unpacks it, and a word on what is in it.

    From TRAINER_DATA or ../shared/data; where neither has it, random bytes in the same shape.
    """
    candidates = [os.environ.get("TRAINER_DATA"), str(REPOSITORY.parent / "shared" / "data")]
    sources = [Path(root) / "FashionMNIST" / "raw" for root in candidates if root]
    source = next((raw for raw in sources if raw.is_dir()), None)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, shape in _FILES.items():
            (raw / name).write_bytes(_random(shape) if source is None else _unpacked(source / name))
        yield folder, str(source.parent) if source else "random bytes in the shape of Fashion-MNIST, which is not here"


def _unpacked(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())


def _random(shape: tuple[int, ...]) -> bytes:
    """An IDX file of unsigned bytes; labels are below 10."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    if len(shape) == 1:
        return header + bytes(byte % 10 for byte in os.urandom(shape[0]))
    return header + os.urandom(shape[0] * shape[1] * shape[2])


def exit_on_sigterm() -> None:
    """Unwind on SIGTERM, so that servers are ended and temporary folders removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def measure_by_name(name: str, data: str, quick: bool) -> None:
    """What the process of a measurement runs."""
    exit_on_sigterm()
    importlib.import_module(f".{name}", __package__).measure(data, quick)


def steps_of(program: Iterator[object]) -> Block:
    """Blocks of steps of a program that does one with each `next`."""

    def block(steps: int) -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(program)
        return Cost((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)

    return block


def take_turns(blocks: Mapping[str, Block], seconds: float, repeats: int) -> dict[str, list[Cost]]:
    """The costs of every contender in `repeats` rounds, in which each has a block of about so many seconds."""
    lengths = {name: max(3, round(seconds / block(5).wall)) for name, block in blocks.items()}
    rounds = [{name: block(lengths[name]) for name, block in blocks.items()} for _ in range(repeats)]
    return {name: [costs[name] for costs in rounds] for name in blocks}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (min-max)."""
    middle = f"{statistics.median(values):,.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else middle


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round, so that what slowed both down cancels."""
    return [a / b for a, b in zip(above, below, strict=True)]


def at_least(values: Sequence[float], target: float) -> str:
    return f">= {target:g} {'met' if statistics.median(values) >= target else 'MISSED'}"


def at_most(values: Sequence[float], target: float) -> str:
    return f"<= {target:g} {'met' if statistics.median(values) <= target else 'MISSED'}"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print columns, the first to the left and the others to the right, within 80 characters."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
    for note in notes:
        print(f"  {note}")
    print(flush=True)
