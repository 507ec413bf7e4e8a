"""R3GAN (Huang et al. 2024): a loss of pairs with penalties at real and at fake images, and plain residual networks.

The loss compares each real image with a fake of its own; the two penalties in every step make it converge, so that the
networks need no norm, no attention and no other trick. gamma, beta2, the probability of augmentation and the weight
average move over a ramp from the values for a beginner to those for the end, and then stay; the learning rate does so
by `schedule: {name: cosine, length: ..., final: 0.25}`.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config.options import OptimizerOptions
from ..data.description import Batch, ImageDescription
from ..figures import ScalarDisplay
from ..gan.ada import augment
from ..gan.adversarial import Adversarial, AdversarialOptions, Views
from ..gan.criteria import displays
from ..gan.dcgan import halvings
from ..nn.conv import Conv2d, convolve
from ..randomness import Draws
from ..workload import Scalars

SLOPE = 0.2  # of LeakyReLU below zero

_PENALISES = "whose penalties at real and at fake images have the weight gamma"


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = {
        "label_smoothing": "whose loss of pairs has no targets", "packing": "whose loss compares single images",
        "spectral_norm": _PENALISES, "gradient_penalty": _PENALISES, "r1": _PENALISES, "r1_every": _PENALISES,
        "discriminator_steps": "whose networks take turns",
    }  # fmt: skip

    latent: int = Field(64, ge=1, le=8192)
    """Length of z, and of the label's embedding beside it."""
    conditional: bool = True
    """Whether images are of a class that can be chosen."""
    width: int = Field(64, ge=1)
    """Channels of both networks; the blocks have twice as many inside."""
    full_width_until: int = Field(32, ge=4)
    """Pixels up to which there are `width` channels; every doubling of the image beyond halves them."""
    blocks: int = Field(2, ge=1, le=16)
    """Residual blocks at each size of the image."""
    group_channels: int = Field(16, ge=1)
    """Channels that a 3x3 convolution mixes; a block that is narrower mixes all."""
    gamma: tuple[float, float] = (0.05, 0.005)
    """Weight of the penalties gamma/2 |gradient|^2 at real and at fake images, first and after the ramp."""
    beta2: float | None = Field(None, ge=0, lt=1)
    """Adam's beta2 after the ramp; it begins at that of optimizer.betas. Default: it stays there."""
    augment_p: float = Field(0.0, ge=0, le=1)
    """Probability of each of ADA's augmentations (Karras et al. 2020) after the ramp; it begins at 0. 0 is off."""
    ramp: int = Field(10_000, ge=0)
    """Steps in which gamma, beta2, augment_p and the memory of the weight average get to their last values."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the generator's weights after the ramp; it begins with no memory. 0 is off."""

    def ramped(self, step: int, first: float, last: float) -> float:
        """A value on its way from first to last, along half a cosine."""
        return first + (last - first) * self.progress(step)

    def progress(self, step: int) -> float:
        """The share of the ramp that is done: from 0 to 1 along half a cosine, then 1."""
        return 0.5 - 0.5 * math.cos(math.pi * min(step / self.ramp, 1.0)) if self.ramp else 1.0


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return R3Gan(options, data, optimizer)


class R3Gan(Adversarial):
    options: Options

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        self.check(options, data, optimizer)
        super().__init__(options, data, optimizer, Generator(options, data), Discriminator(options, data))
        self.conditional = options.conditional
        self.betas = optimizer.betas
        self.scalars = displays(
            discriminator_loss=ScalarDisplay(True, "D loss"),
            generator_loss=ScalarDisplay(True, "G loss"),
            discriminator_accuracy=ScalarDisplay(True, "D accuracy"),
            r1=ScalarDisplay(),
            r2=ScalarDisplay(),
        )

    @staticmethod
    def check(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        """Raises ValueError for settings that do not go together."""
        if options.conditional and len(data.classes) < 2:
            raise ValueError(
                f"workload.conditional: {data.name} has no classes to choose from: set workload.conditional to false"
            )
        if min(options.gamma) < 0:
            raise ValueError(f"workload.gamma: {list(options.gamma)} has a negative weight: use zero or more")
        if options.beta2 is not None and optimizer.name not in ("adam", "adamw"):
            raise ValueError(f"workload.beta2: {optimizer.name} has none: remove it, or use optimizer.name adam")

    def augment_inputs(self, views: Views, draws: Draws, name: str) -> Views:
        if probability := self.options.ramped(draws.step, 0.0, self.options.augment_p):
            views = tuple(augment(view, probability, draws, name) for view in views)
        return super().augment_inputs(views, draws, name)

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        self.set_beta2(draws.step)
        made = self.detached_fakes(batch, draws)
        images = tuple(x.detach().to(self.dtype).requires_grad_(True) for x in (batch["image"], *made.views))
        # No layer looks across the batch, so that real and fake images may share a pass. Its graph serves the loss and
        # the penalties, whose gradients are of the images before they were augmented.
        seen = (self.augment_inputs((x,), draws, name)[0] for x, name in zip(images, ("real", "fake"), strict=True))
        labels = None if made.labels is None else made.labels.repeat(2)
        scores = self.discriminate((torch.cat(tuple(seen)),), labels, draws)
        gradients = torch.autograd.grad(scores.sum(), images, create_graph=True)
        gamma = self.options.ramped(draws.step, *self.options.gamma)
        r1, r2 = (gamma / 2 * gradient.flatten(1).square().sum(1).mean() for gradient in gradients)
        margin = torch.sub(*scores.chunk(2))
        loss = F.softplus(-margin).mean()
        return loss + r1 + r2, {
            "discriminator_loss": loss.detach(),
            "discriminator_accuracy": (margin > 0).to(loss.dtype).mean(),
            "r1": r1.detach(),
            "r2": r2.detach(),
        }

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        self.set_beta2(draws.step)
        made = self.generate_fakes(batch, draws)
        with torch.no_grad():
            real = self.discriminate(self.augment_inputs(self.reals(batch), draws, "real"), made.labels, draws)
        fake = self.discriminate(self.augment_inputs(made.views, draws, "fake"), made.labels, draws)
        loss = F.softplus(real - fake).mean()
        return loss, {"generator_loss": loss.detach()}

    def set_beta2(self, step: int) -> None:
        """A function of the step alone, as the learning rates are, so that no checkpoint needs it."""
        if self.options.beta2 is not None:
            first, second = self.betas
            for group in (group for phase in self.phases for group in phase.optimizer.param_groups):
                group["betas"] = first, self.options.ramped(step, second, self.options.beta2)

    def after_step(self, step: int, means: Scalars) -> None:
        if self.average is not None:
            self.average.decay = self.decay(step)
        super().after_step(step, means)

    def decay(self, step: int) -> float:
        """That of the weight average, whose half-life grows from nothing: half-lives are as 1 / log(decay)."""
        share = self.options.progress(step)
        return self.options.ema ** (1 / share) if share else 0.0


class Pointwise(nn.Linear):
    """A 1x1 convolution of (B, C, H, W): where channels come last in memory, a matrix product, which is faster."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Adds to its input (B, C, H, W) what a 1x1 convolution to 2C, a grouped 3x3 and a 1x1 back to C make of it."""

    def __init__(self, channels: int, group: int) -> None:
        super().__init__()
        inside = 2 * channels
        self.widen = Pointwise(channels, inside)
        self.mix = Conv2d(inside, inside, 3, padding=1, groups=inside // min(group, inside))
        self.narrow = Pointwise(inside, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(x), SLOPE)
        h = F.leaky_relu(self.mix(h), SLOPE)
        return x + self.narrow(h)


class Resample(nn.Module):
    """Twice or half the size by the filter [1, 3, 3, 1], and a 1x1 convolution at the smaller size to other widths."""

    kernel: Tensor

    def __init__(self, before: int, after: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.convert = Pointwise(before, after, bias=False) if before != after else nn.Identity()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (4 if up else 8)  # zeros between the pixels halve a sum
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = self.convert(x)
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 4, 4)
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)
        shrunk: Tensor = self.convert(convolve(x, kernel, stride=2, padding=1, groups=channels))
        return shrunk


def widths(options: Options, data: ImageDescription) -> tuple[list[int], int]:
    """Channels from the smallest size to the image's, and that smallest size. Raises ValueError for what cannot be."""
    times, smallest = halvings(data)
    channels = []
    for size in (smallest * 2**stage for stage in range(times + 1)):
        parts = 2 ** max(0, math.ceil(math.log2(size / options.full_width_until)))
        if options.width % parts:
            raise ValueError(
                f"workload.width: {options.width} channels cannot be halved down to those at {size} pixels: "
                f"use a multiple of {parts}, or a larger workload.full_width_until"
            )
        channels.append(options.width // parts)
        inside = 2 * channels[-1]
        if inside % min(options.group_channels, inside):
            raise ValueError(
                f"workload.group_channels: {options.group_channels} do not divide the {inside} channels in a block "
                f"at {size} pixels: use a divisor of {inside}, or another workload.width"
            )
    return channels, smallest


def _blocks(options: Options, channels: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels, options.group_channels) for _ in range(options.blocks)))


@torch.no_grad()
def _initialise(network: nn.Module) -> None:
    """Weights that keep the variance, smaller in the blocks the more there are; each of these begins as the identity.

    So that no norm is needed (Zhang et al. 2019, Fixup).
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    gain = math.sqrt(2 / (1 + SLOPE**2)) * len(blocks) ** -0.25
    for module in network.modules():
        if isinstance(module, (Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):  # a linear layer of as many inputs as there are classes
            nn.init.normal_(module.weight, 0, module.num_embeddings**-0.5)
    for block in blocks:
        block.widen.weight.mul_(gain)
        block.mix.weight.mul_(gain)
        nn.init.zeros_(block.narrow.weight)


class Generator(nn.Module):
    """z (B, latent), and labels (B,) where it is conditional, to images (B, C, H, W), not bounded by a tanh."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        channels, size = widths(options, data)
        self.embed = nn.Embedding(len(data.classes), options.latent) if options.conditional else None
        self.first = nn.Linear(options.latent * (1 + options.conditional), channels[0], bias=False)
        self.basis = nn.Parameter(nn.init.normal_(torch.empty(channels[0], size, size)))
        stages: list[nn.Module] = [_blocks(options, channels[0])]
        for before, after in itertools.pairwise(channels):
            stages += [Resample(before, after, up=True), _blocks(options, after)]
        self.stages = nn.Sequential(*stages)
        self.to_image = Pointwise(channels[-1], data.channels, bias=False)
        _initialise(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embed is not None:
            z = torch.cat([z, self.embed(labels)], 1)
        images: Tensor = self.to_image(self.stages(self.first(z)[:, :, None, None] * self.basis))
        return images


class Discriminator(nn.Module):
    """Images (B, C, H, W), and labels (B,) where it is conditional, to scores (B,)."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        channels, size = widths(options, data)
        channels.reverse()
        stages: list[nn.Module] = [Pointwise(data.channels, channels[0], bias=False)]
        for before, after in itertools.pairwise(channels):
            stages += [_blocks(options, before), Resample(before, after, up=False)]
        self.stages = nn.Sequential(*stages)
        last = channels[-1]
        self.head = nn.Sequential(
            _blocks(options, last),
            Conv2d(last, last, size, groups=last, bias=False),
            nn.Flatten(),
            nn.Linear(last, last if options.conditional else 1, bias=False),
        )
        self.embed = nn.Embedding(len(data.classes), last) if options.conditional else None
        _initialise(self)
        if self.embed is not None:
            with torch.no_grad():
                self.embed.weight.mul_(last**-0.5)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.stages(images)
        # In full precision: the loss is of small differences between scores.
        with torch.autocast(x.device.type, enabled=False):
            features = self.head(x.to(next(self.head.parameters()).dtype))
            scores: Tensor = features[:, 0] if self.embed is None else (features * self.embed(labels)).sum(1)
        return scores
