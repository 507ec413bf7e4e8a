"""The plain PyTorch program that ours is compared with: as tutorials write it, and complete.

A DataLoader over torchvision's dataset with ToTensor, an optimizer with its defaults, the running accuracy and the loss
by `.item()` in every step, as ours logs them. Run as a program, with DATA NETWORK STEPS, it also evaluates at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """Network, optimizer and batch size."""
    if name == "softmax":
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        return network, torch.optim.SGD(network.parameters(), lr=0.01), 20
    if name == "fnn":
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    else:
        network = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
        )  # fmt: skip
    return network, torch.optim.Adam(network.parameters(), lr=1e-3), 100


def training(data: str, network: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> Iterator[float]:
    """Does a step with each `next`, without end; yields the loss, after it has added up the running accuracy."""
    loader = DataLoader(FashionMNIST(data, train=True, transform=ToTensor()), batch_size, shuffle=True)
    while True:
        hits = 0.0
        for images, labels in loader:
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits += (logits.argmax(1) == labels).float().sum().item()
            yield loss.item()


@torch.no_grad()
def accuracy(data: str, network: nn.Module) -> float:
    test = FashionMNIST(data, train=False, transform=ToTensor())
    network.eval()
    hits = [int((network(images).argmax(1) == labels).sum()) for images, labels in DataLoader(test, 500)]
    return sum(hits) / len(test)


def main(data: str, name: str, steps: int) -> None:
    network, optimizer, batch_size = build(name)
    program = training(data, network, optimizer, batch_size)
    for step in range(1, steps + 1):
        loss = next(program)
        if step == 1 or step % 50 == 0:
            print(f"step {step}  loss {loss:.4f}", flush=True)
    print(f"accuracy {accuracy(data, network):.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
