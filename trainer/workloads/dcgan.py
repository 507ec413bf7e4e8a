"""DCGAN (Radford et al. 2015): convolutions without pooling, BatchNorm; with multi-scale gradients on request."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..config.options import OptimizerOptions
from ..data.description import Batch, ImageDescription
from ..gan.adversarial import Adversarial, AdversarialOptions, Views
from ..gan.dcgan import Discriminator, Generator


class Options(AdversarialOptions):
    loss: Literal["logistic", "hinge"] = "logistic"
    """logistic (non-saturating) or hinge, which goes well with spectral_norm."""
    width: int = Field(64, ge=1)
    """Channels of the layers next to the image; each halving of the image doubles them."""
    multi_scale: bool = False
    """Multi-scale gradients (MSG-GAN, Karnewar and Wang 2020): the discriminator sees the image at every scale."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return DcGan(options, data, optimizer)


class DcGan(Adversarial):
    generator: Generator

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        if options.multi_scale and options.augment:
            raise ValueError("workload.augment: would move each scale differently: use it without multi_scale")
        norm = "batch" if options.plain_norm else "none"
        super().__init__(
            options, data, optimizer,
            Generator(options.latent, options.width, data, options.multi_scale),
            Discriminator(options.width, data, norm, options.spectral_norm, options.multi_scale, options.packing),
            options.loss,
        )  # fmt: skip
        self.multi_scale = options.multi_scale

    def generate(self, z: Tensor, labels: Tensor | None) -> Views:
        return self.generator.views(z) if self.multi_scale else (self.generator(z),)

    def reals(self, batch: Batch) -> Views:
        views = [batch["image"]]
        for _ in self.generator.to_image:
            views.append(F.avg_pool2d(views[-1], 2))
        return tuple(views)
