"""BigGAN-lite (Brock et al. 2019): class-conditional residual networks, spectral norm, projection, hinge loss.

Lite: one GPU's or CPU's size. All of the paper's parts are there: BatchNorm conditioned on a shared class embedding and
a chunk of z (hierarchical latent), orthogonal regularisation, self-attention, an averaged generator and truncation.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from ..config.options import OptimizerOptions
from ..data.description import Batch, ImageDescription
from ..gan.adversarial import Adversarial, AdversarialOptions
from ..gan.dcgan import halvings
from ..randomness import Draws
from ..workload import Scalars

ATTENTION_FROM = 64  # pixels of an image that is large enough for self-attention, at a quarter to half of its size


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = {
        "label_smoothing": "whose loss is the hinge", "packing": "which judges an image with its class",
    }  # fmt: skip

    latent: int = Field(80, ge=1, le=8192)
    """Length of z; with `hierarchical` every block gets its own part of it."""
    width: int = Field(64, ge=1)
    """Channels of the blocks next to the image; they double towards the middle, up to 16 times as many."""
    constant_width: bool = False
    """The same number of channels in all blocks, as is customary for CIFAR-10."""
    embedding: int = Field(128, ge=1)
    """Length of the class embedding that all conditional BatchNorms share."""
    hierarchical: bool = True
    """Every block sees a part of z of its own."""
    orthogonal: float = Field(1e-4, ge=0)
    """Weight of the regularisation that keeps the rows of the generator's weights orthogonal. 0 is off."""
    attention: Literal["auto", "yes", "no"] = "auto"
    """Self-attention (Zhang et al. 2019) in both networks; auto: for images of 64 pixels and more."""
    spectral_norm: bool = True
    """Divide every weight of both networks by its largest singular value (Miyato et al. 2018)."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the generator's weights, which then is what samples and is evaluated. 0 is off."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return BigGan(options, data, optimizer)


class BigGan(Adversarial):
    options: Options
    conditional = True

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        if len(data.classes) < 2:
            raise ValueError(f"workload.name: biggan needs classes, but {data.name} has none: use dcgan or wgan_gp")
        generator, discriminator = Generator(options, data), Discriminator(options, data)
        super().__init__(options, data, optimizer, generator, discriminator, "hinge")

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        loss, scalars = super().generator_loss(batch, draws)
        if self.options.orthogonal:
            loss = loss + self.options.orthogonal * orthogonal_penalty(self.generator)
        return loss, scalars


def orthogonal_penalty(network: nn.Module) -> Tensor:
    """The sum over the layers of |W W^T without its diagonal|^2, embeddings left out (Brock et al. 2019)."""
    penalties = []
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # Where the weight is normalised, the raw one, as the weight itself would iterate the norm once more.
            raw: Any = module
            raw = raw.parametrizations.weight.original if is_parametrized(module) else raw.weight
            penalties.append(_orthogonal_penalty(raw.flatten(1)))
    return torch.stack(penalties).sum()


def _orthogonal_penalty(rows: Tensor) -> Tensor:
    """|W W^T without its diagonal|^2 of one matrix W (N, M)."""
    if len(rows) > rows.shape[1]:  # |W W^T| is |W^T W|, which is M x M: of the first layer 20 x 20, not 2048 x 2048
        return (rows.t() @ rows).square().sum() - rows.square().sum(1).square().sum()
    gram = rows @ rows.t()
    return (gram - gram.diag().diag()).square().sum()


def _stages(options: Options, data: ImageDescription) -> tuple[list[int], int]:
    """Channels from the middle to the image, one more than there are blocks, and the size in the middle."""
    times, size = halvings(data)
    if options.constant_width:
        return [options.width] * (times + 1), size
    return [options.width * min(2**stage, 16) for stage in reversed(range(times + 1))], size


def _attends(options: Options, data: ImageDescription) -> bool:
    return options.attention == "yes" or (options.attention == "auto" and data.size >= ATTENTION_FROM)


def _constrain(network: nn.Module, wanted: bool) -> None:
    """Orthogonal initial weights, and spectral norm on all but the class embedding of the generator."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
    for module in list(network.modules()):
        if wanted and isinstance(module, (nn.Conv2d, nn.Linear)):
            spectral_norm(module, eps=1e-6)


class ConditionalNorm(nn.Module):
    """BatchNorm whose scale and shift are linear in a condition (de Vries et al. 2017)."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Linear(condition, channels, bias=False)
        self.shift = nn.Linear(condition, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.scale(condition)[:, :, None, None], self.shift(condition)[:, :, None, None]
        return self.norm(x) * (1 + scale) + shift


class Up(nn.Module):
    """A residual block of the generator: norm, ReLU, upsample, convolve; twice."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(before, condition), ConditionalNorm(after, condition)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        # No biases: the norm that follows takes them out again, and their gradient would be rounding noise.
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2)
        h = F.relu(self.norm2(self.conv1(h), condition))
        # A 1x1 convolution commutes with nearest upsampling, and is four times cheaper before it.
        return self.conv2(h) + F.interpolate(self.skip(x), scale_factor=2)


class Down(nn.Module):
    """A residual block of the discriminator; `first` sees the image itself and so does not rectify it."""

    def __init__(self, before: int, after: int, first: bool = False, halve: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if halve or before != after else nn.Identity()
        self.first, self.halve = first, halve

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.halve:
            return h + self.skip(x)
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))


class Attention(nn.Module):
    """Self-attention over positions (Zhang et al. 2019), which starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        small, middle = max(channels // 8, 1), max(channels // 2, 1)
        self.query, self.key = nn.Conv2d(channels, small, 1, bias=False), nn.Conv2d(channels, small, 1, bias=False)
        self.value, self.out = nn.Conv2d(channels, middle, 1, bias=False), nn.Conv2d(middle, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x).flatten(2), F.max_pool2d(self.key(x), 2).flatten(2)
        value = F.max_pool2d(self.value(x), 2).flatten(2)
        query, key, value = (t.transpose(1, 2)[:, None] for t in (query, key, value))  # one head: ONNX wants to know
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.gain * self.out(attended[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Generator(nn.Module):
    """z (B, latent) and labels (B,) to images (B, C, H, W) in [-1, 1]."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        widths, self.size = _stages(options, data)
        parts = len(widths) if options.hierarchical else 1
        if options.latent % parts:
            raise ValueError(
                f"workload.latent: {options.latent} cannot be shared out among {parts} layers: "
                f"use {options.latent // parts * parts or parts}, or set workload.hierarchical to false"
            )
        self.part = options.latent // parts
        condition = options.embedding + (self.part if options.hierarchical else 0)
        self.hierarchical = options.hierarchical
        self.embed = nn.Embedding(len(data.classes), options.embedding)
        self.first = nn.Linear(self.part, widths[0] * self.size**2)
        self.blocks = nn.ModuleList(Up(a, b, condition) for a, b in itertools.pairwise(widths))
        self.attention = Attention(widths[-2]) if _attends(options, data) else None
        self.last = nn.Sequential(
            nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], data.channels, 3, padding=1), nn.Tanh()
        )
        _constrain(self, options.spectral_norm)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        classes = self.embed(labels)
        parts = z.split(self.part, 1)
        x = self.first(parts[0]).unflatten(1, (-1, self.size, self.size))
        for index, block in enumerate(self.blocks):
            if self.attention is not None and index == len(self.blocks) - 1:
                x = self.attention(x)
            x = block(x, torch.cat([classes, parts[index + 1]], 1) if self.hierarchical else classes)
        images: Tensor = self.last(x)
        return images


class Discriminator(nn.Module):
    """Images and labels to logits (B,): a score plus the projection on the class (Miyato and Koyama 2018)."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        widths = list(reversed(_stages(options, data)[0]))
        blocks: list[nn.Module] = [Down(data.channels, widths[1], first=True)]
        if _attends(options, data):
            blocks.append(Attention(widths[1]))
        blocks += [Down(a, b) for a, b in itertools.pairwise(widths[1:])]
        self.blocks = nn.Sequential(*blocks, Down(widths[-1], widths[-1], halve=False), nn.ReLU())
        self.last = nn.Linear(widths[-1], 1)
        self.embed = nn.Embedding(len(data.classes), widths[-1])
        _constrain(self, options.spectral_norm)
        if options.spectral_norm:
            spectral_norm(self.embed, eps=1e-6)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.blocks(images).sum((2, 3))
        logits: Tensor = self.last(features)[:, 0] + (self.embed(labels) * features).sum(1)
        return logits
