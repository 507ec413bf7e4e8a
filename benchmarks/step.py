"""Samples per second of our loop against the plain PyTorch program, on the same network, optimizer and batch size.

Ours is the real engine with the resident loader and a log every 50 steps; the plain program (benchmarks/plain.py) reads
through a DataLoader with ToTensor and calls `.item()` in every step. Both run in this process on one thread, in turns.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from . import plain
from .common import SETTINGS, at_least, ratios, spread, steps_of, table, take_turns
from .ours import ours

CASES: list[tuple[str, str, dict[str, Any], float]] = [
    ("softmax b20, SGD", "softmax", {}, 8),
    ("FNN b100, Adam", "fnn", {}, 3),
    ("CNN b100, Adam", "cnn", {"channels_last": False}, 1.1),
    ("  and channels_last", "cnn", {}, 1.1),
    ("  and bf16 as well", "cnn", {"precision": "bf16"}, 2.2),
    ("DCGAN b64, Adam", "dcgan", {"channels_last": False}, 1.05),
    ("  and channels_last", "dcgan", {}, 1.05),
    ("  and bf16 as well", "dcgan", {"precision": "bf16"}, 2.2),
]


def measure(data: str, quick: bool) -> None:
    torch.set_num_threads(1)
    rows = []
    for title, name, settings, target in CASES:
        batch_size = SETTINGS[name]["batch_size"]
        program = plain.adversarial(data, batch_size) if name == "dcgan" else plain.training(data, *plain.build(name))
        with ours(data, {"precision": "fp32", **SETTINGS[name], **settings}) as run:
            blocks = {"ours": run.block, "plain": steps_of(program)}
            costs = take_turns(blocks, 0.3 if quick else 1.5, 1 if quick else 7)
        assert run.config.batch_size == batch_size
        walls = {side: [cost.wall for cost in found] for side, found in costs.items()}
        gain = ratios(walls["plain"], walls["ours"])
        speeds = [f"{batch_size / statistics.median(walls[side]):,.0f}" for side in ("ours", "plain")]
        rows.append([title, *speeds, spread(gain), at_least(gain, target)])
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    notes = [] if bf16 else ["this CPU has no bf16 instructions: the bf16 row says nothing"]
    header = ["", "ours/s", "plain/s", "ratio", "target"]
    table("step: samples/s, our engine against the plain program, 1 thread", header, rows, notes)
