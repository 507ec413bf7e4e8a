"""A network of one's own, for `--workload.network path/to/tiny_net.py:TinyNet`."""

from __future__ import annotations

from torch import Tensor, nn


class TinyNet(nn.Module):
    """Images (B, channels, size, size) to logits (B, classes)."""

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, 16), nn.Tanh(), nn.Linear(16, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits
