"""CycleGAN (Zhu et al. 2017): translation between two domains without pairs, by generators there and back.

What a generator makes has to look like the other domain, and has to lead back to where it came from. With a map that is
known, which then makes the second domain, the true translation is known too, and so the error of the learned one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config.options import OptimizerOptions, WorkloadOptions
from ..data.description import Batch, ImageDescription
from ..figures import Figure, ImageGrid, Panels, ScalarDisplay
from ..gan.adversarial import unit, wide
from ..gan.dcgan import initialise
from ..gan.newest import Newest
from ..gan.patch import PatchDiscriminator, patch_layers
from ..gan.pool import ImagePool
from ..gan.strips import shown_ids
from ..metrics.evaluator import Evaluator, Scores, Totals
from ..nn import optim
from ..nn.norm import normalisation
from ..randomness import Draws
from ..workload import HeldOut, Phase, Scalars, Workload

SHOWN = 10  # images of each domain in a picture
SMALLEST = 12  # pixels: in the middle of 8 there are 2x2, whose reflected borders leave some weights without effect
LARGE = 256  # pixels from which on the paper's generators have nine blocks
KNOWN = "known map"

Pair = tuple[Tensor, Tensor]  # of the first domain, and of the second

# What makes the images of the second domain, in [-1, 1].
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "invert": lambda images: -images,
    "hue": lambda images: images.roll(1, 1),  # red, green, blue to green, blue, red: every hue a third of the circle on
}

DISPLAYS = {
    "true_error": ScalarDisplay(True, "true error"),
    "fid": ScalarDisplay(True),
    "identity_map_error": ScalarDisplay(),
    "cycle_error": ScalarDisplay(True, "cycle error"),
    "discriminator_loss": ScalarDisplay(True, "D loss"),
    "generator_loss": ScalarDisplay(True, "G loss"),
    "cycle_loss": ScalarDisplay(True, "cycle loss"),
    "identity_loss": ScalarDisplay(),
    "real_score": ScalarDisplay(),
    "fake_score": ScalarDisplay(),
}


class Options(WorkloadOptions):
    width: int = Field(64, ge=1)
    """Channels of all networks next to the image; each halving doubles them."""
    blocks: int | None = Field(None, ge=1, le=64)
    """Residual blocks in the middle of a generator. Default: 6, for images of 256 pixels and more 9."""
    patch_layers: int | None = Field(None, ge=1, le=8)
    """How often the discriminators halve the image: with 3, the paper's, each output judges a patch of 70 pixels, with
    2 of 34, with 1 of 16. Default: as many as see about the whole image, 3 at most."""
    cycle: float = Field(10.0, gt=0)
    """Weight of the error of images that were translated there and back."""
    identity: float = Field(0.5, ge=0)
    """Weight, as a share of `cycle`, of what a generator changes about images of the domain that it makes. Keeps
    colours; set it to 0 where the colours are what has to change."""
    pool: int = Field(50, ge=0)
    """How many earlier fakes each discriminator also trains on (Shrivastava et al. 2017). 0 is off."""
    known_map: Literal["none", "invert", "hue"] = "none"
    """Makes the second domain by a known map of its images, for which the error of the translation is then measured:
    invert, or hue, which turns every hue by a third of the circle."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Workload:
    return CycleGan(options, data, optimizer)


class CycleGan(Workload):
    """The images of the first domain are `a`, those of the second `b`, (B, C, H, W) in [-1, 1]."""

    input_range = (-1.0, 1.0)
    generates = True
    directions = ("AtoB", "BtoA")
    data: ImageDescription

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        super().__init__()
        _check(options, data)
        self.options, self.data, self.map, self.scalars = options, data, MAPS[options.known_map], DISPLAYS
        blocks = options.blocks or (9 if data.size >= LARGE else 6)
        self.to_a, self.to_b = (Generator(data.channels, options.width, blocks) for _ in range(2))
        layers = patch_layers(data.size, options.patch_layers)
        self.judge_a, self.judge_b = (
            PatchDiscriminator(data.channels, options.width, layers, "instance") for _ in range(2)
        )
        if options.pool:
            self.pool_a, self.pool_b = (ImagePool(options.pool, data.shape) for _ in range(2))
        generators = (self.to_a, self.to_b)
        discriminators = optim.build(optimizer, self.judge_a, self.judge_b)
        self.phases = (
            Phase("discriminators", self.discriminator_loss, discriminators, keeps_graph_of=generators),
            Phase("generators", self.generator_loss, optim.build(optimizer, *generators)),
        )
        self.newest: Newest[Pair] = Newest()

    def domains(self, batch: Batch) -> Pair:
        """The images `a` and `b` of a batch, which have nothing to do with each other."""
        return batch["image"], self.map(batch["partner_image"])

    def fakes(self, a: Tensor, b: Tensor) -> Pair:
        """Images of `a`, made from `b`, and of `b`, made from `a`, in full precision."""
        return wide(self.to_a(b)), wide(self.to_b(a))

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """What the discriminators say of images of their domains, patch by patch: 1 is real, 0 is fake."""
        return wide(torch.cat([self.judge_a(a), self.judge_b(b)]))

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        """Least squares (Mao et al. 2017): the mean over both is the sum of their halved losses."""
        a, b = self.domains(batch)
        fake_a, fake_b = (fake.detach() for fake in self.newest.make(draws, lambda: self.fakes(a, b)))
        if self.options.pool:
            fake_a, fake_b = self.pool_a.exchange(fake_a, draws, "a"), self.pool_b.exchange(fake_b, draws, "b")
        real, fake = self.scores(a, b), self.scores(fake_a, fake_b)
        loss = (real - 1).square().mean() + fake.square().mean()
        return loss, {
            "discriminator_loss": loss.detach() / 2,
            "real_score": real.detach().mean(),
            "fake_score": fake.detach().mean(),
        }

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        a, b = self.domains(batch)
        fake_a, fake_b = self.newest.take(draws) or self.fakes(a, b)
        adversarial = 2 * (self.scores(fake_a, fake_b) - 1).square().mean()
        cycle = difference(self.fakes(fake_a, fake_b), (a, b))
        loss = adversarial + self.options.cycle * cycle
        scalars = {"generator_loss": adversarial.detach() / 2, "cycle_loss": cycle.detach() / 2}
        if self.options.identity:
            identity = difference(self.fakes(b, a), (a, b))  # images of a domain, translated to that domain
            loss = loss + self.options.cycle * self.options.identity * identity
            scalars["identity_loss"] = identity.detach() / 2
        return loss, scalars

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return TranslationEvaluator(self, None if self.options.known_map != "none" else scores())

    def inference(self) -> nn.Module:
        """The generator from the first domain to the second."""
        return self.to_b

    def example(self) -> dict[str, Tensor]:
        draws = Draws(0, ("example",), slice(0, 2), torch.device("cpu"))
        return {"images": 2 * draws.uniform("images", self.data.shape) - 1}

    def translate(self, inputs: Tensor, draws: Draws, direction: str) -> Tensor:
        return wide(self.to_b(inputs) if direction == "AtoB" else self.to_a(inputs))

    def shown(self, held_out: HeldOut, draws: Draws) -> Figure:
        """Images of each domain, what becomes of them, what should where that is known, and what leads back."""
        batch = held_out(shown_ids(min(draws.rows.stop, SHOWN), self.data.eval_size, self.data.size))
        a, b = self.domains(batch)
        fake_a, fake_b = self.fakes(a, b)
        back_a, back_b = self.fakes(fake_a, fake_b)
        first, second = self.data.domains
        strips = {
            f"{first} to {second}": {first: a, "translated": fake_b, KNOWN: self.map(a), "and back": back_a},
            f"{second} to {first}": {
                second: b,
                "translated": fake_a,
                KNOWN: batch["partner_image"],
                "and back": back_b,
            },
        }
        if self.options.known_map == "none":
            for strip in strips.values():
                del strip[KNOWN]
        grids = [
            ImageGrid(unit(torch.cat([*strip.values()])), (), title, len(a), tuple(strip))
            for title, strip in strips.items()
        ]
        return Panels(tuple(grids))


def _check(options: Options, data: ImageDescription) -> None:
    """Raises ValueError for what cannot be translated."""
    if len(data.domains) != 2:
        classes = (
            f"two of its classes, such as [{', '.join(data.classes[:2])}], or to " if len(data.classes) > 1 else ""
        )
        raise ValueError(
            f"data.domains: cyclegan translates between two domains, and {data.name} is one: set data.domains to "
            f"{classes}halves"
        )
    if data.size % 4 or data.size < SMALLEST:
        raise ValueError(
            f"data.size: cyclegan cannot make images of {data.size} pixels: use a multiple of 4, from {SMALLEST} on"
        )
    if options.known_map == "hue" and data.channels != 3:
        raise ValueError(f"workload.known_map: hue is of colours, and the images of {data.name} have none: use invert")


def difference(images: Pair, targets: Pair) -> Tensor:
    """The sum of the mean absolute errors of both domains."""
    (a, b), (target_a, target_b) = images, targets
    return (a - target_a).abs().mean() + (b - target_b).abs().mean()


class Generator(nn.Module):
    """Images (B, C, H, W) to images in [-1, 1]: two halvings, residual blocks, two doublings (Johnson et al. 2016).

    For the paper's c7s1-64, d128, d256, R256 x blocks, u128, u64, c7s1-3 the width is 64.
    """

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        layers = convolution(channels, width, 7)
        for before in (width, 2 * width):
            layers += convolution(before, 2 * before, stride=2)
        layers += [Residual(4 * width) for _ in range(blocks)]
        for before in (4 * width, 2 * width):
            layers += [
                nn.ConvTranspose2d(before, before // 2, 3, 2, 1, output_padding=1, bias=False),
                normalisation("instance", before // 2),
                nn.ReLU(inplace=True),
            ]
        last = nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect")
        self.network = nn.Sequential(*layers, last, nn.Tanh())
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        translations: Tensor = self.network(images)
        return translations


def convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """With reflected borders, norm and ReLU; without a bias, which the norm would take out again."""
    padding = kernel // 2
    return [
        nn.Conv2d(before, after, kernel, stride, padding, padding_mode="reflect", bias=False),
        normalisation("instance", after),
        nn.ReLU(inplace=True),
    ]


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*convolution(channels, channels), *convolution(channels, channels)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


class TranslationEvaluator:
    """Translates the held-out images of both domains, there and back. Errors are absolute ones of pixels in [0, 1].

    What the first domain becomes is compared with what it should be, where the map is known, and else with the second
    domain, by `scores`.
    """

    maximise = False

    def __init__(self, workload: CycleGan, scores: Scores | None) -> None:
        self.workload, self.scores = workload, scores
        self.headline = scores.headline if scores else "true_error"

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        workload = self.workload
        a, b = workload.domains(batch)
        fake_a, fake_b = workload.fakes(a, b)
        back_a, back_b = workload.fakes(fake_a, fake_b)
        sums = {"cycle": (errors(back_a, a) + errors(back_b, b)) / 2, "count": torch.ones(len(a), device=a.device)}
        if self.scores is None:
            truth = workload.map(a)
            sums |= {"true": errors(fake_b, truth), "identity_map": errors(a, truth)}
        totals = {f"errors/{name}": values.sum() for name, values in sums.items()}
        return totals if self.scores is None else {**self.scores.totals(fake_b, batch["id"]), **totals}

    def report(self, totals: Totals) -> dict[str, float]:
        """`true_error` has to be compared with `identity_map_error`, that of images which are left as they are."""
        names = ("cycle", "true", "identity_map") if self.scores is None else ("cycle",)
        means = {f"{name}_error": float(totals[f"errors/{name}"] / totals["errors/count"]) for name in names}
        return means if self.scores is None else {**self.scores.report(totals), **means}


def errors(images: Tensor, targets: Tensor) -> Tensor:
    """The mean absolute error (B,) of pixels in [0, 1], of images in [-1, 1]."""
    return (images - targets).abs().mean((1, 2, 3)).double() / 2
