"""The convolutional generator and discriminator of DCGAN (Radford et al. 2015), for any size that halves to 4 to 8."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..data.description import ImageDescription


def halvings(data: ImageDescription, largest: int = 1024) -> tuple[int, int]:
    """How often the images halve, and the size that remains, 4 to 7 pixels. Raises ValueError for other sizes."""
    size, times = data.size, 0
    while size % 2 == 0 and size >= 8:
        size, times = size // 2, times + 1
    if not 4 <= size <= 7 or not times or data.size > largest:
        raise ValueError(
            f"data.size: this network cannot make images of {data.size} pixels: use a size that is 4, 5, 6 or 7 times "
            f"a power of two, from 8 to {largest}, such as 28, 32, 64 or 128"
        )
    return times, size


def initialise(network: nn.Module) -> nn.Module:
    """Weights from N(0, 0.02), those of BatchNorm and InstanceNorm around 1."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            nn.init.normal_(module.weight, 1, 0.02)
    return network


class Generator(nn.Module):
    """z (B, latent) to images (B, C, H, W) in [-1, 1]; `views` gives smaller ones too, where `multi_scale` is on.

    No convolution before a BatchNorm has a bias, which the norm would take out again.
    """

    def __init__(self, latent: int, width: int, data: ImageDescription, multi_scale: bool = False) -> None:
        super().__init__()
        times, size = halvings(data)
        widths = [width * 2**stage for stage in reversed(range(times))]
        self.first = nn.Sequential(
            nn.ConvTranspose2d(latent, widths[0], size, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.middle = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
            )
            for before, after in itertools.pairwise(widths)
        )
        self.last = nn.Sequential(nn.ConvTranspose2d(widths[-1], data.channels, 4, 2, 1), nn.Tanh())
        self.to_image = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, data.channels, 1), nn.Tanh()) for channels in widths if multi_scale
        )
        initialise(self)

    def features(self, z: Tensor) -> list[Tensor]:
        features = [self.first(z[:, :, None, None])]
        for stage in self.middle:
            features.append(stage(features[-1]))
        return features

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.features(z)[-1])

    def views(self, z: Tensor) -> tuple[Tensor, ...]:
        """The images, then smaller ones of half the size each."""
        features = self.features(z)
        small = [convert(x) for convert, x in zip(self.to_image, features, strict=True)]
        return (self.last(features[-1]), *reversed(small))


class Discriminator(nn.Module):
    """Images (B, C, H, W), and with `multi_scale` the smaller ones (MSG-GAN, Karnewar and Wang 2020), to logits (B,).

    `norm` is 'batch', 'layer' or 'none'; without BatchNorm the convolutions have a bias.
    """

    def __init__(self, width: int, data: ImageDescription, norm: str = "batch", spectral: bool = False,
                 multi_scale: bool = False, packing: int = 1) -> None:  # fmt: skip
        super().__init__()
        times, size = halvings(data)
        colours = data.channels * packing
        extra = colours if multi_scale else 0
        stages: list[nn.Module] = []
        before = colours
        for stage in range(times):
            after = width * 2**stage
            bias = norm != "batch" or stage == 0
            convolution = nn.Conv2d(before + (extra if stage else 0), after, 4, 2, 1, bias=bias)
            normalise: list[nn.Module] = []
            if stage and norm == "batch":
                normalise = [nn.BatchNorm2d(after)]
            elif stage and norm == "layer":
                normalise = [nn.GroupNorm(1, after)]
            stages.append(nn.Sequential(convolution, *normalise, nn.LeakyReLU(0.2, inplace=True)))
            before = after
        self.stages = nn.ModuleList(stages)
        self.last = nn.Conv2d(before + extra, 1, size)
        initialise(self)
        if spectral:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    spectral_norm(module)

    def features(self, image: Tensor, *smaller: Tensor) -> Tensor:
        """What the last layer sees: (B, channels, h, w)."""
        x = image
        for index, stage in enumerate(self.stages):
            x = stage(torch.cat([x, smaller[index - 1]], 1) if smaller and index else x)
        return torch.cat([x, smaller[-1]], 1) if smaller else x

    def forward(self, *views: Tensor) -> Tensor:
        """Views are the images and, with `multi_scale`, the smaller ones."""
        logits: Tensor = self.last(self.features(*views))
        return logits.flatten()
