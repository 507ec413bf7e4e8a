"""What images are compared by: small pixels, the features of a classifier that this trainer trained, or Inception's.

Every extractor has a label, which is part of the name of each score: scores in other features are other scores.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.description import ImageDescription

SMALLEST = 8  # pixels that `Pixels` looks at, along a side


class Features(Protocol):
    label: str
    dimensions: int
    classes: int  # 0 where there are none

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, dimensions) float32 of images (B, C, H, W) in [-1, 1], and class probabilities (B, classes)."""


class Pixels:
    """The image at 8x8 pixels, or the point itself: needs nothing, sees colours and coarse shapes."""

    classes = 0

    def __init__(self, data: ImageDescription) -> None:
        self.label = "points" if data.size == 1 else "pixels"
        self.size = min(SMALLEST, data.size)
        self.dimensions = data.channels * self.size**2

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return F.adaptive_avg_pool2d(images.float(), self.size).flatten(1), None


class Penultimate:
    """The input of the last linear layer of a classifier, and the class probabilities."""

    def __init__(self, network: nn.Module, data: ImageDescription, label: str) -> None:
        self.network, self.data, self.label = network.eval().requires_grad_(False).float(), data, label
        last_linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        self.dimensions, self.classes = last_linear.in_features, last_linear.out_features
        self.inputs: list[Tensor] = []
        last_linear.register_forward_pre_hook(lambda _, arguments: self.inputs.append(arguments[0]))
        mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
        self.scale, self.shift = 0.5 / std, (0.5 - mean) / std  # from [-1, 1] to what the network was trained on

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.float()
        if images.shape[-1] != self.data.size:
            images = F.interpolate(images, size=(self.data.size,) * 2, mode="bilinear", antialias=True)
        logits = self.network.to(images.device)(images * self.scale.to(images.device) + self.shift.to(images.device))
        return self.inputs.pop().float().flatten(1), logits.float().softmax(1)


class PerChannel:
    """A classifier of grey images applied to each channel: stacked MNIST, whose classes are triples of digits."""

    def __init__(self, grey: Penultimate, channels: int) -> None:
        self.grey, self.channels, self.label = grey, channels, grey.label
        self.dimensions, self.classes = grey.dimensions * channels, 0
        self.modes = grey.classes**channels

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return self.grey(images.flatten(0, 1)[:, None])[0].view(len(images), -1), None

    def mode_of(self, images: Tensor) -> Tensor:
        """The mode (B,) of each image: its digits as one number."""
        digits = self.grey(images.flatten(0, 1)[:, None])[1].argmax(1).view(len(images), self.channels)
        places = self.grey.classes ** torch.arange(self.channels - 1, -1, -1, device=images.device)
        return (digits * places).sum(1)


class Inception:
    """The features that FID is named after (Szegedy et al. 2016, Heusel et al. 2017), from the user's file of weights.

    The network and its resizing are torch-fidelity's, which reproduce the original's values.
    """

    dimensions, classes = 2048, 1008

    def __init__(self, path: str, digest: str) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.label = f"inception-{digest}"
        names = ["2048", "logits_unbiased"]
        self.network: Any = FeatureExtractorInceptionV3("inception-v3-compat", names, path).eval()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        features, logits = self.network.to(images.device)(pixels)
        return features.float(), logits.float().softmax(1)
