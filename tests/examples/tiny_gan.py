"""A GAN of one's own, for `--workload.name path/to/tiny_gan.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config.options import OptimizerOptions
from trainer.data.description import Batch, ImageDescription
from trainer.gan.adversarial import Adversarial, AdversarialOptions
from trainer.randomness import Draws
from trainer.workload import Scalars


class Options(AdversarialOptions):
    width: int = 16
    """Units of the hidden layers."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    pixels = data.channels * data.size**2
    generator = nn.Sequential(
        nn.Linear(options.latent, options.width), nn.LeakyReLU(0.2), nn.Linear(options.width, pixels), nn.Tanh(),
        nn.Unflatten(1, data.shape),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Flatten(), nn.Linear(pixels * options.packing, options.width), nn.LeakyReLU(0.2),
        nn.Linear(options.width, 1), nn.Flatten(0),
    )  # fmt: skip
    return TinyGan(options, data, optimizer, generator, discriminator, "hinge")


class TinyGan(Adversarial):
    """The generator also pays for bright pixels."""

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        fakes = self.generate_fakes(batch, draws)
        logits = self.discriminate(self.augment_inputs(fakes.views, draws, "fake"), fakes.labels, draws)
        loss = self.criterion.generator(logits) + 0.1 * torch.relu(fakes.views[0]).mean()
        return loss, {"generator_loss": loss.detach()}
