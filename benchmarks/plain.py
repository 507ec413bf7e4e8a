"""The plain PyTorch program that ours is compared with: as tutorials write it, and complete.

A DataLoader over torchvision's dataset with ToTensor, an optimizer with its defaults, the running accuracy and the loss
by `.item()` in every step, as ours logs them. Run as a program, with DATA NETWORK STEPS, it also evaluates at the end.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from .common import SETTINGS

DCGANS = {"small dcgan": 28, "dcgan": 64}  # pixels


def program(data: str, name: str) -> Iterator[float]:
    """Does a step with each `next`, without end; yields the loss. Names are those of common.SETTINGS."""
    batch_size = SETTINGS[name]["batch_size"]
    return adversarial(data, batch_size, DCGANS[name]) if name in DCGANS else training(data, *build(name))


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
    """A classifier's steps, each of which also adds up the running accuracy."""
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


def dcgan(size: int, channels: int = 1) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator, which gives logits, of ours for 28, 32 or 64 pixels."""
    first = {28: 7, 32: 4, 64: 4}[size]  # pixels behind the first layer
    widths = [64 * 2**i for i in range((size // first).bit_length() - 1)]

    def conv(layer: type[nn.Module], before: int, after: int, *shape: int) -> nn.Module:
        return layer(before, after, *shape, bias=False)

    up: list[nn.Module] = [conv(nn.ConvTranspose2d, 100, widths[-1], first, 1, 0)]
    for after, before in reversed(list(itertools.pairwise(widths))):
        up += [nn.BatchNorm2d(before), nn.ReLU(True), conv(nn.ConvTranspose2d, before, after, 4, 2, 1)]
    up += [nn.BatchNorm2d(64), nn.ReLU(True), conv(nn.ConvTranspose2d, 64, channels, 4, 2, 1), nn.Tanh()]
    down: list[nn.Module] = [conv(nn.Conv2d, channels, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for before, after in itertools.pairwise(widths):
        down += [conv(nn.Conv2d, before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, True)]
    down += [conv(nn.Conv2d, widths[-1], 1, first, 1, 0)]
    return nn.Sequential(*up), nn.Sequential(*down)


def adversarial(data: str, batch_size: int, size: int) -> Iterator[float]:
    """DCGAN's steps as tutorials write them: the networks of ours for 28 or 64 pixels, a sigmoid and
    BCELoss, the generator's step through a discriminator whose gradients are computed and thrown away, `.item()` of
    all losses."""
    generator, logits = dcgan(size)
    discriminator = nn.Sequential(logits, nn.Sigmoid())
    criterion = nn.BCELoss()
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in (discriminator, generator)
    ]
    transform = Compose([Resize(size), ToTensor(), Normalize(0.5, 0.5)])
    loader = DataLoader(FashionMNIST(data, train=True, transform=transform), batch_size, shuffle=True, drop_last=True)
    real, fake = torch.ones(batch_size), torch.zeros(batch_size)
    while True:
        for images, _ in loader:
            discriminator.zero_grad()
            error = criterion(discriminator(images).view(-1), real)
            error.backward()
            fakes = generator(torch.randn(batch_size, 100, 1, 1))
            other = criterion(discriminator(fakes.detach()).view(-1), fake)
            other.backward()
            optimizers[0].step()
            generator.zero_grad()
            loss = criterion(discriminator(fakes).view(-1), real)
            loss.backward()
            optimizers[1].step()
            error.item(), other.item()
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
