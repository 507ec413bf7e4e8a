"""The original GAN (Goodfellow et al. 2014) of fully connected networks, for images and for points in the plane."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..config.options import OptimizerOptions
from ..data.description import ImageDescription
from ..gan.adversarial import Adversarial, AdversarialOptions


class Options(AdversarialOptions):
    loss: Literal["logistic", "hinge", "wasserstein"] = "logistic"
    """logistic (non-saturating), hinge, or wasserstein, which wants gradient_penalty or spectral_norm."""
    width: int = Field(128, ge=1)
    """Width of the generator's first hidden layer; each of the next is twice as wide, the discriminator's 4 and 2."""
    layers: int = Field(4, ge=1, le=8)
    """Hidden layers of the generator; those of points are all of the first one's width."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return Gan(options, data, optimizer)


class Gan(Adversarial):
    channels_last = False

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        generator = Generator(options, data)
        super().__init__(options, data, optimizer, generator, Discriminator(options, data), options.loss)


class Generator(nn.Module):
    """z (B, latent) to (B, C, H, W): images in [-1, 1], or points, which nothing bounds."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        self.shape = data.shape
        points = data.size == 1
        layers: list[nn.Module] = []
        before = options.latent
        for index in range(options.layers):
            after = options.width * (1 if points else 2**index)
            norm = [nn.BatchNorm1d(after)] if index else []
            layers += [nn.Linear(before, after, bias=not norm), *norm, nn.LeakyReLU(0.2)]
            before = after
        layers.append(nn.Linear(before, data.channels * data.size**2))
        self.network = nn.Sequential(*layers, *([] if points else [nn.Tanh()]))

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.network(z)
        return images.unflatten(1, self.shape)


class Discriminator(nn.Module):
    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        inputs = data.channels * data.size**2 * options.packing
        wide, narrow = (options.width,) * 2 if data.size == 1 else (4 * options.width, 2 * options.width)
        layers = [nn.Linear(inputs, wide), nn.LeakyReLU(0.2), nn.Linear(wide, narrow), nn.LeakyReLU(0.2)]
        if data.size == 1:
            layers += [nn.Linear(narrow, narrow), nn.LeakyReLU(0.2)]
        layers.append(nn.Linear(narrow, 1))
        if options.spectral_norm:
            layers = [spectral_norm(layer) if isinstance(layer, nn.Linear) else layer for layer in layers]
        self.network = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return torch.flatten(logits)
