"""What our loop costs on top of a bare one, in microseconds a step, where steps are smallest: softmax at batch 20.

The bare loop has the data in memory as ours does: index, normalise, forward, backward, fused optimizer, zero_grad, and
nothing else: no plan, no metrics, no log, no signals. Both run in this process on one thread, in turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config.options import DataOptions
from trainer.data.dataset import Memory
from trainer.data.sources import open_data

from .common import SETTINGS, at_most, spread, steps_of, table, take_turns
from .ours import ours

BATCH = 20


def bare(data: str) -> Iterator[None]:
    """Does a step of softmax regression with each `next`."""
    train = open_data(DataOptions(name="fashion_mnist", root=data), data, "auto").train
    assert isinstance(train, Memory)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, fused=True)
    while True:
        order = torch.randperm(len(train))
        for start in range(0, len(train), BATCH):
            ids = order[start : start + BATCH]
            images, labels = train["image"][ids].float().mul_(1 / 90).add_(-0.81), train["label"][ids]
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def measure(data: str, quick: bool) -> None:
    torch.set_num_threads(1)
    with ours(data, SETTINGS["softmax"]) as run:
        blocks = {"ours": run.block, "bare": steps_of(bare(data))}
        costs = take_turns(blocks, 0.3 if quick else 1.0, 3 if quick else 15)
    rows = []
    for name in ("wall", "cpu"):
        sides = {side: [1e6 * getattr(cost, name) for cost in blocks] for side, blocks in costs.items()}
        extra = [a - b for a, b in zip(sides["ours"], sides["bare"], strict=True)]
        rows.append([name, *(spread(sides[side], 0) for side in sides), spread(extra, 0), at_most(extra, 60)])
    header = ["time", "ours", "bare", "ours - bare", "target"]
    table("overhead: microseconds a step, softmax b20, 1 thread", header, rows)
