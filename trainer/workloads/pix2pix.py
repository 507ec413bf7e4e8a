"""pix2pix (Isola et al. 2017): images from images, learned from pairs. The noise is dropout, which stays at test."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config.options import OptimizerOptions, WorkloadOptions
from ..data.description import Batch, ImageDescription
from ..figures import Figure, ScalarDisplay
from ..gan.adversarial import wide
from ..gan.criteria import CRITERIA, displays
from ..gan.dcgan import initialise
from ..gan.newest import Newest
from ..gan.patch import PatchDiscriminator, patch_layers
from ..gan.strips import shown_ids, strips
from ..metrics import pairs
from ..metrics.evaluator import Evaluator, Scores, Totals
from ..nn import optim
from ..nn.dropout import Dropout, drawing
from ..nn.norm import Norm, normalisation
from ..randomness import Draws
from ..workload import HeldOut, Phase, Scalars, Workload

EDGE = 0.1  # the least slope of an edge, in brightness from 0 to 1 a pixel


class Options(WorkloadOptions):
    pairs: Literal["given", "edges", "grey", "low_resolution"] = "given"
    """What an image is made of: its partner, of a data set of pairs; or, of any images, their edges, their grey levels,
    or themselves at a lower resolution."""
    factor: int = Field(4, ge=2, le=64)
    """low_resolution only: how many times lower it is."""
    adversarial: float = Field(1.0, ge=0)
    """Weight of the discriminator's say. 0: none, which leaves L1 alone."""
    l1: float = Field(100.0, ge=0)
    """Weight of the mean absolute error, of pixels in [-1, 1]."""
    width: int = Field(64, ge=1)
    """Channels of the layers next to the image, in both networks; they double with every halving, up to 8 times."""
    depth: int | None = Field(None, ge=1, le=10)
    """How often the U-Net halves the image. Default: down to 1, 3 or 5 pixels, which is 8 times at 256."""
    patch_layers: int | None = Field(None, ge=1, le=6)
    """How often the discriminator halves it: 1, 2, 3 see patches of 16, 34, 70 pixels. Default: 3, of small images
    fewer."""
    norm: Norm = "batch"
    """batch, or instance: statistics of each image by itself, as BatchNorm has with a batch size of 1."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Of the first three layers of the decoder, also at test: the only noise."""
    discriminator_lr: float | None = Field(None, gt=0)
    """Learning rate of the discriminator (TTUR, Heusel et al. 2017). Default: optimizer.lr."""

    @model_validator(mode="after")
    def _sensible(self) -> Options:
        if not self.adversarial and not self.l1:
            raise ValueError("workload.l1: 0 leaves nothing to learn where workload.adversarial is 0 too: raise one")
        return self


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Pix2Pix:
    return Pix2Pix(options, data, optimizer)


class Pix2Pix(Workload):
    """A generator (B, C, H, W) -> (B, C, H, W) and a discriminator of patches that sees input and image together."""

    input_range = (-1.0, 1.0)
    generates = True
    directions = ("forward",)
    channels_last = True
    data: ImageDescription

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        super().__init__()
        check_pairs(options, data)
        self.options, self.data, self.criterion = options, data, CRITERIA["logistic"]
        scores = dict.fromkeys(("l1", "psnr", "ssim", "sharpness"), ScalarDisplay(True))
        self.scalars = {**scores, **displays(**self.criterion.losses)}
        self.generator = UNet(data.channels, options, levels(data.size, options.depth))
        making = Phase("generator", self.generator_loss, optim.build(optimizer, self.generator))
        self.phases: tuple[Phase, ...] = (making,)
        self.discriminator: PatchDiscriminator | None = None
        if options.adversarial:
            layers = patch_layers(data.size, options.patch_layers)
            self.discriminator = PatchDiscriminator(2 * data.channels, options.width, layers, options.norm)
            rate = options.discriminator_lr or optimizer.lr
            judging = optim.build(optimizer.model_copy(update={"lr": rate}), self.discriminator)
            keeps = (self.generator,)
            self.phases = (Phase("discriminator", self.discriminator_loss, judging, keeps_graph_of=keeps), making)
        self.newest: Newest[Tensor] = Newest()

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """An image to start from and the one to make of it."""
        return batch["input"] if self.options.pairs == "given" else self.input_of(batch["image"]), batch["image"]

    def input_of(self, images: Tensor) -> Tensor:
        options = self.options
        if options.pairs == "low_resolution":
            return F.interpolate(F.avg_pool2d(images, options.factor), scale_factor=float(options.factor))
        if options.pairs == "grey":
            return brightness(images).expand_as(images)
        return edges(images).expand_as(images) if options.pairs == "edges" else images

    def generate(self, inputs: Tensor, draws: Draws) -> Tensor:
        with drawing(self.generator, draws):
            outputs: Tensor = self.generator(inputs)
        return outputs

    def judge(self, discriminator: PatchDiscriminator, inputs: Tensor, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w) in full precision."""
        logits: Tensor = discriminator(torch.cat([inputs, images.to(inputs.dtype)], 1))
        return wide(logits)

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        assert self.discriminator is not None
        inputs, truths = self.pair(batch)
        outputs = self.newest.make(draws, lambda: self.generate(inputs, draws))
        # In two passes: BatchNorm must not see real and fake images mixed, which would tell them apart.
        real, fake = (self.judge(self.discriminator, inputs, images) for images in (truths, outputs.detach()))
        loss = self.criterion.discriminator(real, fake, 0.0) / 2
        right = ((real > 0).to(loss.dtype).mean() + (fake < 0).to(loss.dtype).mean()) / 2
        return loss, {"discriminator_loss": loss.detach(), "discriminator_accuracy": right}

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        """Of the outputs that the discriminator has just seen, or of new ones."""
        inputs, truths = self.pair(batch)
        outputs = self.newest.take(draws)
        if outputs is None:
            outputs = self.generate(inputs, draws)
        error = (outputs - truths).abs().mean()
        loss = self.options.l1 * error
        scalars = {"l1": error.detach() / 2}  # of pixels in [0, 1], as in evaluation
        if self.discriminator is not None:
            fooled = self.criterion.generator(self.judge(self.discriminator, inputs, outputs))
            loss = loss + self.options.adversarial * fooled
            scalars["generator_loss"] = fooled.detach()
        return loss, scalars

    # Use.

    def inference(self) -> nn.Module:
        return self.generator

    def example(self) -> dict[str, Tensor]:
        return {"images": torch.linspace(-1, 1, 2 * self.data.channels * self.data.size**2).view(2, *self.data.shape)}

    @torch.no_grad()
    def translate(self, inputs: Tensor, draws: Draws, direction: str = "forward") -> Tensor:
        return wide(self.generate(inputs, draws))

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return PairEvaluator(self, scores())

    def shown(self, held_out: HeldOut, draws: Draws) -> Figure:
        ids = shown_ids(draws.rows.stop, self.data.eval_size, self.data.size)
        inputs, truths = self.pair(held_out(ids))
        return strips({"input": inputs, "output": self.translate(inputs, draws.of(len(ids))), "truth": truths})


class PairEvaluator:
    """Compares outputs with the held-out images that they should be, one by one and as a set."""

    headline, maximise = "l1", False

    def __init__(self, workload: Pix2Pix, scores: Scores) -> None:
        self.workload, self.scores = workload, scores

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        inputs, truths = self.workload.pair(batch)
        outputs = self.workload.translate(inputs, draws)
        return {**self.scores.totals(outputs, batch["id"]), **pairs.totals(outputs, truths)}

    def report(self, totals: Totals) -> dict[str, float]:
        return {**pairs.report(totals), **self.scores.report(totals)}


def check_pairs(options: Options, data: ImageDescription) -> None:
    """Raises ValueError where the data set has no such pairs."""
    derived = "edges, grey or low_resolution"
    if options.pairs == "given" and not data.paired:
        raise ValueError(
            f"workload.pairs: {data.name} holds no pairs: derive an input from each image by {derived}, or use "
            f"data.name pairs"
        )
    if options.pairs != "given" and data.paired:
        raise ValueError(f"workload.pairs: {data.name} holds pairs, so nothing is left to derive: use given")
    if options.pairs == "grey" and data.channels == 1:
        raise ValueError(f"workload.pairs: grey needs colours to make, and {data.name} is grey: use edges")
    if options.pairs == "low_resolution" and data.size % options.factor:
        raise ValueError(f"workload.factor: {options.factor} is no divisor of data.size, {data.size}: use one")


def levels(size: int, depth: int | None) -> int:
    """How often a U-Net halves images of `size` pixels; raises ValueError where they do not halve so often."""
    most = (size & -size).bit_length() - 1  # the twos in its factors
    if depth is not None and depth > most:
        raise ValueError(
            f"workload.depth: images of {size} pixels cannot be halved {depth} times: use {most} or less, or a "
            f"data.size that is a multiple of {2**depth}"
        )
    if depth is None and (most < 2 or size >> most > 5):
        raise ValueError(
            f"data.size: a U-Net cannot make images of {size} pixels: use 1, 3 or 5 times a power of two, such as 32, "
            f"64, 96 or 256" + (f", or set workload.depth, to {most} at most" if most else "")
        )
    return depth or most


class UNet(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to others; every halving is bridged by what it halved.

    The innermost layer of the encoder has no norm: of one pixel there are no statistics.
    """

    def __init__(self, channels: int, options: Options, depth: int) -> None:
        super().__init__()
        widths = [options.width * min(2**level, 8) for level in range(depth)]
        self.encoder = nn.ModuleList([nn.Conv2d(channels, widths[0], 4, 2, 1)])
        for level, (before, after) in enumerate(itertools.pairwise(widths), 2):
            inner = level == depth
            layers = [nn.LeakyReLU(0.2), nn.Conv2d(before, after, 4, 2, 1, bias=inner)]
            self.encoder.append(nn.Sequential(*layers, *([] if inner else [normalisation(options.norm, after)])))
        self.decoder = nn.ModuleList()
        before = widths[-1]
        for index, after in enumerate(reversed(widths[:-1])):
            layers = [
                nn.ReLU(),
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                normalisation(options.norm, after),
            ]
            noise = [Dropout(options.dropout, f"dropout{index}", noise=True)] if index < 3 else []
            self.decoder.append(nn.Sequential(*layers, *noise))
            before = 2 * after
        self.last = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(before, channels, 4, 2, 1), nn.Tanh())
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for stage in self.decoder:
            x = torch.cat([stage(x), skips.pop()], 1)
        outputs: Tensor = self.last(x)
        return outputs


def brightness(images: Tensor) -> Tensor:
    """(B, 1, H, W): the luma of ITU-R BT.601, of grey images themselves."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def edges(images: Tensor) -> Tensor:
    """Thin black lines (-1) on white (1), (B, 1, H, W), where brightness has its steepest slopes (Canny 1986, without
    hysteresis). Sums of neighbours in a fixed order, so that no image depends on its batch."""
    x = F.pad(brightness(images), [2] * 4, mode="replicate") / 2
    down = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    across = x[:, :, :, :-2] + 2 * x[:, :, :, 1:-1] + x[:, :, :, 2:]
    horizontal = (down[:, :, :, 2:] - down[:, :, :, :-2]) / 8  # Sobel
    vertical = (across[:, :, 2:] - across[:, :, :-2]) / 8
    slope = (horizontal.square() + vertical.square()).sqrt()
    here = slope[:, :, 1:-1, 1:-1]
    left, right = slope[:, :, 1:-1, :-2], slope[:, :, 1:-1, 2:]
    above, below = slope[:, :, :-2, 1:-1], slope[:, :, 2:, 1:-1]
    steep = (horizontal.abs() >= vertical.abs())[:, :, 1:-1, 1:-1]
    crest = torch.where(steep, (here >= left) & (here > right), (here >= above) & (here > below))
    return 1 - 2 * (crest & (here > EDGE)).to(images.dtype)
