"""Samples per second of our loop against the plain PyTorch program, on the same network, optimizer and batch size.

Ours is the real engine with the resident loader and a log every 50 steps; the plain program (benchmarks/plain.py) reads
through a DataLoader with ToTensor and calls `.item()` in every step. Each is a process of one thread; they take turns.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch

from .common import SETTINGS, at_least, ratios, spread, steps_of, table, take_turns
from .processes import answer, called, started

CASES: list[tuple[str, str, dict[str, Any], float]] = [
    ("softmax b20, SGD", "softmax", {}, 8),
    ("FNN b100, Adam", "fnn", {}, 3),
    ("  and bf16", "fnn", {"precision": "bf16"}, 3),
    ("CNN b100, Adam", "cnn", {"channels_last": False}, 1.1),
    ("  and channels_last", "cnn", {}, 1.1),
    ("  and bf16 as well", "cnn", {"precision": "bf16"}, 2.2),
    ("DCGAN 28px b64", "small dcgan", {"channels_last": False}, 1.05),
    ("  and channels_last", "small dcgan", {}, 1.05),
    ("  and bf16 as well", "small dcgan", {"precision": "bf16"}, 2.2),
    ("DCGAN 64px b64", "dcgan", {"channels_last": False}, 1.05),
    ("  and channels_last", "dcgan", {}, 1.05),
    ("  and bf16 as well", "dcgan", {"precision": "bf16"}, 2.2),
]


def contend(side: str, case: int, data: str) -> None:
    """One side of a case."""
    _, name, settings, _ = CASES[case]
    torch.set_num_threads(1)
    with called() as line:
        if side == "ours":
            from .ours import ours

            with ours(data, {"precision": "fp32", **SETTINGS[name], **settings}) as run:
                assert run.config.batch_size == SETTINGS[name]["batch_size"]
                answer(line, side, run.block)
        else:
            from . import plain

            answer(line, side, steps_of(plain.program(data, name)))


def measure(data: str, quick: bool) -> None:
    rows = []
    for index, (title, name, _, target) in enumerate(CASES):
        commands = {side: [["-m", "benchmarks.step", side, str(index), data]] for side in ("ours", "plain")}
        with started(commands, {"ours": 1, "plain": 1}) as blocks:
            costs = take_turns(blocks, 0.3 if quick else 2.0, 1 if quick else 7)
        walls = {side: [cost.wall for cost in blocks] for side, blocks in costs.items()}
        gain = ratios(walls["plain"], walls["ours"])
        speeds = [f"{SETTINGS[name]['batch_size'] / statistics.median(walls[side]):,.0f}" for side in ("ours", "plain")]
        rows.append([title, *speeds, spread(gain), at_least(gain, target)])
    header = ["", "ours/s", "plain/s", "ratio", "target"]
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    notes = [] if bf16 else ["this CPU has no bf16 instructions: the bf16 rows say nothing"]
    table("step: samples/s, our engine against the plain program, 1 thread", header, rows, notes)


if __name__ == "__main__":
    contend(sys.argv[1], int(sys.argv[2]), sys.argv[3])
