"""WGAN (Arjovsky et al. 2017): a critic that is kept Lipschitz by clipping its weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..config.options import OptimizerOptions
from ..data.description import ImageDescription
from ..gan.adversarial import Adversarial, AdversarialOptions
from ..gan.dcgan import Discriminator, Generator

_CLIPPED = "whose critic is clipped"


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = {
        "label_smoothing": "which has no targets", "spectral_norm": _CLIPPED, "gradient_penalty": _CLIPPED,
    }  # fmt: skip

    discriminator_steps: int = Field(5, ge=1, le=1000)
    """Updates of the critic per update of the generator, each on a batch of its own."""
    clip: float = Field(0.01, gt=0)
    """The critic's weights are kept within plus and minus this. Deep critics need more than 0.01 to pass gradients."""
    width: int = Field(64, ge=1)
    """Channels of the layers next to the image; each halving of the image doubles them."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return Wgan(options, data, optimizer)


class Wgan(Adversarial):
    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        norm = "batch" if options.plain_norm else "none"
        super().__init__(
            options, data, optimizer,
            Generator(options.latent, options.width, data),
            Discriminator(options.width, data, norm, packing=options.packing),
            "wasserstein",
        )  # fmt: skip
        critic: list[Tensor] = list(self.discriminator.parameters())

        @torch.no_grad()
        def clip(*_: Any) -> None:
            torch._foreach_clamp_min_(critic, -options.clip)
            torch._foreach_clamp_max_(critic, options.clip)

        judging, _ = self.phases
        judging.optimizer.register_step_post_hook(clip)
