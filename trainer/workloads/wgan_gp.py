"""WGAN-GP (Gulrajani et al. 2017): the critic is kept Lipschitz by a penalty on its gradient between real and fake."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..config.options import OptimizerOptions
from ..data.description import ImageDescription
from ..gan.adversarial import Adversarial, AdversarialOptions
from ..gan.dcgan import Discriminator, Generator


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = {"label_smoothing": "which has no targets"}

    discriminator_steps: int = Field(5, ge=1, le=1000)
    """Updates of the critic per update of the generator, each on a batch of its own."""
    gradient_penalty: float = Field(10.0, gt=0)
    """Weight of (|gradient| - 1)^2 between real and fake images."""
    norm: Literal["layer", "none"] = "layer"
    """Normalisation in the critic. BatchNorm would make the penalty of one image depend on the others."""
    width: int = Field(64, ge=1)
    """Channels of the layers next to the image; each halving of the image doubles them."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return Adversarial(
        options, data, optimizer,
        Generator(options.latent, options.width, data),
        Discriminator(options.width, data, options.norm, options.spectral_norm, packing=options.packing),
        "wasserstein",
    )  # fmt: skip
