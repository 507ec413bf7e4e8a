"""PatchGAN (Isola et al. 2017): a discriminator that judges every patch of an image by itself."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn.norm import Norm, normalisation
from .dcgan import initialise

MOST = 3  # halvings, unless the user wants more: patches of 70 pixels


class PatchDiscriminator(nn.Module):
    """Images (B, channels, H, W) to logits (B, 1, h, w), one a patch.

    `layers` convolutions halve the image, two more keep its size, each of 4x4: C64-C128-C256-C512 of the paper, for
    patches of 70 pixels, are 3 layers of width 64. 2 see 34 pixels, 1 sees 16.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = MOST, norm: Norm = "batch") -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        before = width
        for stage in range(1, layers + 1):
            after = width * min(2**stage, 8)
            stages += [
                nn.Conv2d(before, after, 4, 2 if stage < layers else 1, 1, bias=False),
                normalisation(norm, after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            before = after
        self.network = nn.Sequential(*stages, nn.Conv2d(before, 1, 4, 1, 1))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def receptive_field(network: nn.Module) -> int:
    """The side, in pixels, of what an output of convolutions that follow each other sees."""
    field, step = 1, 1
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            field += (module.kernel_size[0] - 1) * step
            step *= module.stride[0]
    return field


def patch_layers(size: int, layers: int | None) -> int:
    """How many layers halve images of `size` pixels: those asked for, else as many as see about the whole image, and 3
    at most. Raises ValueError where no patch remains."""
    layers = layers or max(1, min(MOST, size.bit_length() - 4))
    most = (size // 3).bit_length() - 1
    if layers > most:
        way_out = f"use {most} or less, or a larger data.size" if most > 0 else "use a data.size of 6 or more"
        raise ValueError(
            f"workload.patch_layers: {layers} halvings leave no patch of images of {size} pixels: {way_out}"
        )
    return layers
