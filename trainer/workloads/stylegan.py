"""StyleGAN2 (Karras et al. 2020): a style modulates every convolution of the generator. With the paper's lazy R1 and
path-length regularisation, and with ADA (Karras et al. 2020) for small sets, all in operations of torch alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ..config.options import OptimizerOptions
from ..data.description import Batch, ImageDescription
from ..figures import Animation, Figure, ImageGrid, ScalarDisplay
from ..gan.ada import augment
from ..gan.adversarial import Adversarial, AdversarialOptions, Fakes, Views, unit
from ..gan.criteria import displays
from ..metrics.evaluator import Totals
from ..nn.dropout import Drawn, drawing
from ..randomness import Draws
from ..workload import Scalars

PATH_DECAY = 0.01  # of the mean path length, each time that it is taken
MEAN_STYLE_LATENTS = 10_000
SHOWN_TRUNCATIONS = (1.0, 0.7, 0.5, 0.3)
FRAMES, WALKING = 32, 64  # of an animation: how many, and the largest size of an image in it


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = {
        "spectral_norm": "whose learning rates are equalised instead",
        "gradient_penalty": "whose penalty is r1",
        "packing": "which has workload.deviation_group for it",
        "augment": "which has workload.ada_target for it",
    }

    latent: int = Field(512, ge=1, le=8192)
    """Length of the latent vector z, and of the style w."""
    width: int = Field(64, ge=1)
    """Channels of the layers next to the image; each halving of the image doubles them."""
    max_width: int = Field(512, ge=1)
    """The most channels of a layer."""
    mapping_layers: int = Field(8, ge=1, le=64)
    """Layers of the network from z to w."""
    conditional: bool = False
    """Generate images of a class: its embedding joins z, and the discriminator has a logit for each class."""
    style_mixing: float = Field(0.9, ge=0, le=1)
    """Share of the fakes whose later layers have the style of another latent while training."""
    r1: float = Field(1.0, ge=0)
    """Gamma of the penalty gamma/2 |gradient|^2 at real images (Mescheder et al. 2018). 0 is off."""
    path_length: float = Field(2.0, ge=0)
    """Weight of the path-length regularisation: equal steps of w change the image equally. 0 is off."""
    path_length_every: int = Field(4, ge=1)
    """Apply it only every so many steps, and so many times as strongly."""
    deviation_group: int = Field(4, ge=1)
    """Consecutive samples whose deviation the discriminator sees; the batch is a multiple of it. 1 is off."""
    ada_target: float = Field(0.6, ge=0, lt=1)
    """The mean sign of the logits of real images that ADA's probability p aims at. 0 is off."""
    ada_steps: int = Field(8000, ge=1)
    """Steps in which p could rise from 0 to 1; 8000 batches of 64 are the paper's 500,000 images."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the moving average of the generator's weights, which then is what samples and is evaluated. 0 is off."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return StyleGan(options, data, optimizer)


class StyleGan(Adversarial):
    options: Options
    generator: Generator
    controller_inputs = ("real_sign", "path_length")
    ada_p: Tensor
    mean_path_length: Tensor

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        if options.conditional and len(data.classes) < 2:
            raise ValueError(f"workload.conditional: {data.name} has no classes: remove it")
        super().__init__(options, data, optimizer, Generator(options, data), Discriminator(options, data))
        self.conditional = options.conditional
        self.scalars = {**displays(**self.criterion.losses), "ada_p": ScalarDisplay(True, "ADA p")}
        self.group = options.deviation_group
        intervals = {"discriminator": options.r1_every if options.r1 else 0,
                     "generator": options.path_length_every if options.path_length else 0}  # fmt: skip
        for phase in self.phases:
            correct_for_lazy_penalty(phase.optimizer, intervals[phase.name])
        self.register_buffer("ada_p", torch.zeros(()))
        self.register_buffer("mean_path_length", torch.zeros(()))

    # Training.

    def _full_precision(self, due: bool) -> contextlib.AbstractContextManager[Any]:
        """For what is differentiated twice: the pass, and its first gradient."""
        return torch.autocast(self.ada_p.device.type, enabled=False) if due else contextlib.nullcontext()

    def r1_due(self, draws: Draws) -> bool:
        return bool(self.options.r1) and draws.due(self.options.r1_every)

    def path_length_due(self, draws: Draws) -> bool:
        return bool(self.options.path_length) and draws.due(self.options.path_length_every)

    def _new_fakes(self, batch: Batch, draws: Draws) -> Fakes:
        """Fakes made from styles (B, layers, latent), which the path length is measured from."""
        labels = batch["label"] if self.conditional else None
        with drawing(self.generator, draws), self._full_precision(self.path_length_due(draws)):
            styles = self.generator.styles(self.latents(draws), labels)
            return Fakes(self.generate(styles, labels), styles, labels)

    def generate(self, z: Tensor, labels: Tensor | None) -> Views:
        return (self.generator.synthesise(z),)

    def augment_inputs(self, views: Views, draws: Draws, name: str) -> Views:
        if self.options.ada_target:
            views = tuple(augment(view, self.ada_p, draws, name) for view in views)
        return super().augment_inputs(views, draws, name)

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        """The penalty is of the real images as they are, before their augmentation, and shares their forward pass."""
        options, due, penalty = self.options, self.r1_due(draws), None
        fakes = self.detached_fakes(batch, draws)
        images = batch["image"].detach().requires_grad_(due)
        with self._full_precision(due):
            real = self.discriminate(self.augment_inputs((images,), draws, "real"), fakes.labels, draws)
            if due:
                (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
                penalty = options.r1 / 2 * options.r1_every * gradient.square().sum((1, 2, 3)).mean()
        fake = self.discriminate(self.augment_inputs(fakes.views, draws, "fake"), fakes.labels, draws)
        loss = self.criterion.discriminator(real, fake, options.label_smoothing)
        scalars = self.signals(loss, real, fake)
        scalars |= {"real_sign": real.detach().sign().mean(), "ada_p": self.ada_p.clone()}
        if penalty is not None:
            loss = loss + penalty
            scalars["r1"] = penalty.detach()
        return loss, scalars

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        options, fakes = self.options, self.generate_fakes(batch, draws)
        logits = self.discriminate(self.augment_inputs(fakes.views, draws, "fake"), fakes.labels, draws)
        loss = self.criterion.generator(logits)
        scalars = {"generator_loss": loss.detach()}
        if self.path_length_due(draws):
            with self._full_precision(True):
                lengths = path_lengths(fakes.views[0], fakes.z, draws)
            penalty = (lengths - self.mean_path_length).square().mean()
            loss = loss + options.path_length * options.path_length_every * penalty
            scalars["path_length"] = lengths.detach().mean()
        return loss, scalars

    def after_step(self, step: int, means: Scalars) -> None:
        super().after_step(step, means)
        if "path_length" in means:
            every = self.options.path_length_every
            share = max(PATH_DECAY, every / (step + every))  # the mean of all at first, so that the initial 0 is gone
            self.mean_path_length.lerp_(means["path_length"].to(self.mean_path_length.dtype), share)
        if self.options.ada_target:
            # Rounded, since the mean of a batch may lie on the target, where the order of a sum would decide.
            direction = ((means["real_sign"] - self.options.ada_target) * 1e4).round().sign()
            self.ada_p.add_(direction.to(self.ada_p.dtype) / self.options.ada_steps).clamp_(0, 1)

    # Evaluation and samples.

    def mean_style(self) -> Tensor:
        """w (latent,) of the averaged generator, over fixed latents: no state, and the same at every world size."""
        rows = slice(0, MEAN_STYLE_LATENTS)
        draws = Draws(0, ("mean style",), rows, self.ada_p.device, self.dtype)
        return self._averaged.mapping(self.latents(draws), self.labels(draws)).mean(0)

    def styles(self, draws: Draws, label: int | None = None) -> Tensor:
        """(B, layers, latent) of the averaged generator."""
        return self._averaged.styles(self.latents(draws), self.labels(draws, label))

    @property
    def _averaged(self) -> Generator:
        network = self.inference()
        assert isinstance(network, Generator)
        return network

    def truncated(self, styles: Tensor, truncation: float) -> Tensor:
        """Images of styles that are pulled to their mean: 1 leaves them as they are, at 0 all are alike."""
        mean = self.mean_style()
        return self._averaged.synthesise(mean + truncation * (styles - mean))

    @torch.no_grad()
    def samples(self, draws: Draws, label: int | None = None, truncation: float | None = None) -> Tensor:
        if truncation is None:
            return super().samples(draws, label)
        return self.truncated(self.styles(draws, label), truncation)

    @torch.no_grad()
    def figures(self, totals: Totals, images: Callable[[Iterable[int]], Tensor], draws: Draws) -> dict[str, Figure]:
        figures = super().figures(totals, images, draws)
        styles = self.styles(draws.of(10))
        grids = [self.truncated(styles, psi) for psi in SHOWN_TRUNCATIONS]
        rows = tuple(f"psi {psi:g}" for psi in SHOWN_TRUNCATIONS)
        figures["truncation"] = ImageGrid(unit(torch.cat(grids)), (), "styles pulled to their mean", 10, rows)
        figures["style_mixing"] = self.mixed(draws, 6, 8)
        figures["latent_walk"] = self.walk(draws, 16)
        return figures

    def mixed(self, draws: Draws, rows: int, columns: int) -> ImageGrid:
        """The images of a column and a row of latents, and between them those with coarse styles of the column's."""
        network = self._averaged
        styles = self.styles(draws.of(rows + columns))
        fine, coarse = styles[:columns], styles[columns:]
        cut = network.coarse_layers
        crossed = torch.cat([
            coarse[:, None, :cut].expand(-1, columns, -1, -1), fine[None, :, cut:].expand(rows, -1, -1, -1)
        ], 2)  # fmt: skip
        left, above = unit(network.synthesise(coarse)), unit(network.synthesise(fine))
        inner = unit(network.synthesise(crossed.flatten(0, 1))).unflatten(0, (rows, columns))
        whole = torch.cat([
            torch.cat([torch.ones_like(left[:1]), above])[None], torch.cat([left[:, None], inner], 1)
        ])  # fmt: skip
        return ImageGrid(whole.flatten(0, 1), (), "coarse styles from the left, fine ones from above", columns + 1)

    def walk(self, draws: Draws, count: int) -> Animation:
        """Once around a great circle of the latents, for each of some images."""
        first, second = self.latents(draws.of(2 * count)).split(count)
        angles = torch.linspace(0, 2 * math.pi, FRAMES + 1, device=first.device, dtype=first.dtype)[:-1, None, None]
        path = first * angles.cos() + second * angles.sin()
        labels = self.labels(draws.of(count))
        frames = [F.avg_pool2d(unit(self.images(z, labels)), max(1, self.data.size // WALKING)) for z in path]
        return Animation(torch.stack(frames), columns=math.isqrt(count))


def correct_for_lazy_penalty(optimizer: torch.optim.Optimizer, every: int) -> None:
    """Adam's settings for a step with a penalty every so many: as k steps with the loss and one with the penalty alone
    were k + 1, each of the k is shorter and remembers less (Karras et al. 2020, appendix B). 0: no penalty."""
    share = every / (every + 1) if every else 1.0
    for group in optimizer.param_groups:
        group["lr"] *= share
        if "betas" in group:
            group["betas"] = tuple(beta**share for beta in group["betas"])


def path_lengths(images: Tensor, styles: Tensor, draws: Draws) -> Tensor:
    """|J^T y| (B,): how far an image moves in a random direction y with its style w; the root mean square of layers."""
    noise = draws.normal("path_length", images.shape[1:]) / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


# Networks.


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
ROOT2 = math.sqrt(2)  # makes up for what a leaky ReLU takes from the variance


def equalised(layer: Layer, gain: float = ROOT2, rate: float = 1.0) -> Layer:
    """Weights from N(0, 1) that are scaled when used, so that Adam moves all layers equally (Karras et al. 2018).

    `rate` is the layer's learning rate relative to that of others.
    """
    nn.init.normal_(layer.weight, 0, 1 / rate)
    register_parametrization(layer, "weight", Times(gain * rate / math.sqrt(layer.weight[0].numel())))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
        if rate != 1:
            register_parametrization(layer, "bias", Times(rate))
    return layer


def activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def normalised(x: Tensor) -> Tensor:
    """Rows (B, N) with a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Blur(nn.Module):
    """The filter [1, 3, 3, 1] along both axes, with a stride that may halve the image."""

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", gain * taps.outer(taps)[None, None] / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, 4, 4), None, self.stride, self.padding, 1, channels)


class Noise(Drawn):
    """Adds noise of a learned strength to every pixel: drawn while training, else always the same."""

    constant: Tensor

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("constant", nn.init.normal_(torch.empty(size, size)))

    def forward(self, x: Tensor) -> Tensor:
        noise = self.constant if self.draws is None else self.draws.normal(self.name, (1, *x.shape[2:]))
        return x + (noise * self.strength).to(x.dtype)


class ModulatedConv(nn.Module):
    """A convolution of (B, before, H, W) whose input channels are scaled by a style, without a weight per sample: what
    goes in is scaled, and what comes out is divided by the deviation that it then has (demodulation)."""

    def __init__(self, latent: int, before: int, after: int, kernel: int, up: bool = False, demodulate: bool = True,
                 gain: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        self.style = equalised(nn.Linear(latent, before), 1.0)
        nn.init.ones_(self.style.bias)
        self.conv = equalised(nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), 1.0)
        self.blur = Blur(1, gain=4.0) if up else None
        self.demodulate, self.gain = demodulate, gain

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """(B, after, H, W), or of twice the size."""
        style, weight = self.style(w), self.conv.weight
        x = x * style[:, :, None, None]
        if self.blur is None:
            x = F.conv2d(x, weight, None, 1, self.conv.padding)
        else:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), None, 2))
        if self.demodulate:
            variance = style.square() @ weight.square().sum((2, 3)).t()
            x = x * (self.gain * torch.rsqrt(variance + 1e-8))[:, :, None, None]
        return x


class StyledLayer(nn.Module):
    """A modulated 3x3 convolution, noise, a bias and a leaky ReLU."""

    def __init__(self, latent: int, before: int, after: int, size: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(latent, before, after, 3, up, gain=ROOT2)
        self.noise = Noise(size, f"noise/{size}/{'up' if up else 'same'}")
        self.bias = nn.Parameter(torch.zeros(after, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return activate(self.noise(self.conv(x, w)) + self.bias)


class ToImage(nn.Module):
    def __init__(self, latent: int, before: int, channels: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(latent, before, channels, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        image: Tensor = self.conv(x, w) + self.bias
        return image


class Level(nn.Module):
    """From features and image of half the size to those of `size`, with three styles."""

    def __init__(self, latent: int, before: int, after: int, size: int, channels: int) -> None:
        super().__init__()
        self.up = StyledLayer(latent, before, after, size, up=True)
        self.same = StyledLayer(latent, after, after, size)
        self.to_image = ToImage(latent, after, channels)

    def forward(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
        x = self.same(self.up(x, first), second)
        # Bilinear interpolation to twice the size is the filter [1, 3, 3, 1].
        larger = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
        return x, larger + self.to_image(x, third)


def widths(options: Options, data: ImageDescription) -> list[int]:
    """Channels from 4 pixels to the image's size. Raises ValueError for sizes that do not halve to 4."""
    size = data.size
    if not 8 <= size <= 1024 or size & (size - 1):
        raise ValueError(
            f"data.size: stylegan cannot make images of {size} pixels: use a power of two from 8 to 1024, such as 32, "
            f"64 or 256"
        )
    times = int(math.log2(size)) - 2
    return [min(options.width * 2**stage, options.max_width) for stage in reversed(range(times + 1))]


class Generator(Drawn):
    """z (B, latent), and labels (B,) where it is conditional, to images (B, C, H, W) of no fixed range: `mapping` gives
    w, `styles` those of each layer, `synthesise` the images."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        self.latent, self.style_mixing = options.latent, options.style_mixing
        self.embed = nn.Embedding(len(data.classes), self.latent) if options.conditional else None
        inputs = [self.latent * (2 if options.conditional else 1)] + [self.latent] * (options.mapping_layers - 1)
        self.layers = nn.ModuleList(equalised(nn.Linear(before, self.latent), rate=0.01) for before in inputs)
        channels = widths(options, data)
        self.constant = nn.Parameter(nn.init.normal_(torch.empty(1, channels[0], 4, 4)))
        self.first = StyledLayer(self.latent, channels[0], channels[0], 4)
        self.to_image = ToImage(self.latent, channels[0], data.channels)
        self.levels = nn.ModuleList(
            Level(self.latent, before, after, 8 * 2**index, data.channels)
            for index, (before, after) in enumerate(itertools.pairwise(channels))
        )
        self.style_count = 2 * len(channels)  # a layer that makes an image shares its style with the layer after it
        self.coarse_layers = min(4, self.style_count // 2)  # those up to 8 pixels

    def mapping(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """w (B, latent)."""
        w = normalised(z)
        if self.embed is not None:
            w = torch.cat([w, normalised(self.embed(labels))], 1)
        for layer in self.layers:
            w = activate(layer(w))
        return w

    def styles(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, layers, latent): w for every layer; while training the later ones may have another latent's."""
        count = self.style_count
        styles = self.mapping(z, labels)[:, None].expand(-1, count, -1)
        if self.draws is None or not self.style_mixing:
            return styles
        others = self.mapping(self.draws.normal("mixing/z", (self.latent,)), labels)[:, None]
        crossover = 1 + self.draws.integers("mixing/crossover", count - 1, (1,))
        mixed = self.draws.uniform("mixing", (1,)) < self.style_mixing
        later = mixed & (torch.arange(count, device=z.device) >= crossover)
        return torch.where(later[:, :, None], others, styles)

    def synthesise(self, styles: Tensor) -> Tensor:
        w = styles.unbind(1)
        x = self.first(self.constant, w[0])
        image: Tensor = self.to_image(x, w[1])
        for index, level in enumerate(self.levels):
            x, image = level(x, image, *w[2 * index + 1 : 2 * index + 4])
        return image

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesise(self.styles(z, labels))


class Down(nn.Module):
    """A residual block that halves the image."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = equalised(nn.Conv2d(before, before, 3, padding=1))
        # The sum of the two branches is divided by the root of 2: by their gains, which costs nothing.
        self.blur, self.conv2 = Blur(2), equalised(nn.Conv2d(before, after, 3, 2), 1.0)
        self.halve, self.skip = Blur(1, 2), equalised(nn.Conv2d(before, after, 1, bias=False), 1 / ROOT2)

    def forward(self, x: Tensor) -> Tensor:
        h = activate(self.conv2(self.blur(activate(self.conv1(x)))))
        result: Tensor = h + self.skip(self.halve(x))
        return result


def with_deviation(x: Tensor, group: int) -> Tensor:
    """One more channel: the deviation within each group of consecutive samples, averaged over all else (Karras et al.
    2018), by which a discriminator sees that fakes are alike."""
    groups = x.unflatten(0, (-1, group))
    variance = (
        (groups - groups.mean(1, keepdim=True)).square().mean(1)
    )  # torch.var is slow where memory is not in order
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(group)
    return torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


class Discriminator(nn.Module):
    """Images, and labels (B,) where it is conditional, to logits (B,)."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        channels = list(reversed(widths(options, data)))
        self.group = options.deviation_group
        self.from_image = equalised(nn.Conv2d(data.channels, channels[0], 1))
        self.blocks = nn.Sequential(*(Down(before, after) for before, after in itertools.pairwise(channels)))
        last = channels[-1]
        self.conv = equalised(nn.Conv2d(last + (self.group > 1), last, 3, padding=1))
        self.hidden = equalised(nn.Linear(16 * last, last))
        self.logits = equalised(nn.Linear(last, len(data.classes) if options.conditional else 1), 1.0)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.blocks(activate(self.from_image(images)))
        if self.group > 1:
            x = with_deviation(x, self.group)
        logits: Tensor = self.logits(activate(self.hidden(activate(self.conv(x)).flatten(1))))
        return logits[:, 0] if labels is None else logits.gather(1, labels[:, None])[:, 0]
