"""InfoGAN (Chen et al. 2016): codes that the discriminator can read back from the image come to mean something."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..config.options import OptimizerOptions
from ..data.description import Batch, ImageDescription
from ..figures import Figure, ImageGrid, ScalarDisplay
from ..gan.adversarial import Adversarial, AdversarialOptions, GeneratorEvaluator, unit
from ..gan.criteria import displays
from ..gan.dcgan import halvings, initialise
from ..metrics.evaluator import Evaluator, Scores, Totals
from ..randomness import Draws
from ..workload import Scalars


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = {"packing": "which reads the codes of single images"}

    latent: int = Field(62, ge=1, le=8192)
    """Length of the part of the latent vector that is noise."""
    categories: int = Field(10, ge=2, le=1000)
    """Values of the categorical code."""
    codes: int = Field(2, ge=0, le=100)
    """Continuous codes, uniform in [-1, 1]."""
    information: float = Field(1.0, gt=0)
    """Weight of the mutual information between the categorical code and the image."""
    continuous_information: float = Field(0.1, ge=0)
    """Weight of that of the continuous codes, which are read as Gaussians of deviation 1."""
    hidden: int = Field(1024, ge=1)
    """Width of the linear layers."""
    norm: Literal["all", "convolutions"] = "all"
    """Where the discriminator has BatchNorm: in its last hidden layer too, as in the paper, or not. There it levels
    the means by which real and fake batches differ, which slows the learning of richer images down.
    Without meaning where a constraint or penalty already rules BatchNorm out."""
    width: int = Field(64, ge=1)
    """Channels of the layers next to the image; each halving of the image doubles them."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return InfoGan(options, data, optimizer)


class Generator(nn.Module):
    """The latent vector (B, L) to images (B, C, H, W) in [-1, 1]: two linear layers, then one per doubling."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        times, size = halvings(data)
        widths = [options.width * 2**stage for stage in reversed(range(times))]
        inputs, middle = options.latent + options.categories + options.codes, widths[0] * size**2
        layers: list[nn.Module] = [
            nn.Linear(inputs, options.hidden, bias=False), nn.BatchNorm1d(options.hidden), nn.ReLU(),
            nn.Linear(options.hidden, middle, bias=False), nn.BatchNorm1d(middle), nn.ReLU(),
            nn.Unflatten(1, (widths[0], size, size)),
        ]  # fmt: skip
        for before, after in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], data.channels, 4, 2, 1), nn.Tanh())
        initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.network(z)
        return images


class Reader(nn.Module):
    """A discriminator whose trunk also reads the codes: images to logits (B,), category logits, continuous means."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        times, size = halvings(data)
        widths = [data.channels, *(options.width * 2**stage for stage in range(times))]
        plain = options.plain_norm
        norm: list[nn.Module] = [nn.BatchNorm1d(options.hidden)] if plain and options.norm == "all" else []
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(itertools.pairwise(widths)):
            # Without any bias, a BatchNorm behind the first layer takes the contrast of a whole batch away.
            biased = not plain or (not norm and not stage)
            layers.append(nn.Conv2d(before, after, 4, 2, 1, bias=biased))
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2)] if plain and stage else [nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), nn.Linear(widths[-1] * size**2, options.hidden, bias=not norm), *norm]
        self.trunk = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.last = nn.Linear(options.hidden, 1)
        self.head = nn.Sequential(
            nn.Linear(options.hidden, 128, bias=False), nn.BatchNorm1d(128), nn.LeakyReLU(0.2),
            nn.Linear(128, options.categories + options.codes),
        )  # fmt: skip
        initialise(self)
        if options.spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    spectral_norm(module)
        self.categories = options.categories

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.trunk(images))
        return logits.flatten()

    def read(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(images)
        logits, codes = self.last(features).flatten(), self.head(features)
        if features.dtype != torch.float64:
            logits, codes = logits.float(), codes.float()
        return logits, codes[:, : self.categories], codes[:, self.categories :]


class InfoGan(Adversarial):
    options: Options
    discriminator: Reader

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        super().__init__(options, data, optimizer, Generator(options, data), Reader(options, data))
        code_accuracy = ScalarDisplay(True, "code accuracy")
        self.scalars = displays(**self.criterion.losses, code_generated_accuracy=code_accuracy)

    def latents(self, draws: Draws, truncation: float | None = None) -> Tensor:
        """Noise, the category as one of `categories`, the continuous codes."""
        o = self.options
        category = F.one_hot(draws.integers("category", o.categories), o.categories)
        noise = super().latents(draws, truncation)
        return torch.cat([noise, category.to(noise.dtype), 2 * draws.uniform("codes", (o.codes,)) - 1], 1)

    def missing(self, z: Tensor, category: Tensor, codes: Tensor) -> tuple[Tensor, Scalars]:
        """The information about the codes that the image does not show, in nats, and how well they are read."""
        o = self.options
        hidden = z[:, o.latent : o.latent + o.categories].argmax(1)
        entropy = F.cross_entropy(category, hidden)
        error = (codes - z[:, o.latent + o.categories :]).square().sum(1).mean() / 2
        right = (category.detach().argmax(1) == hidden).to(entropy.dtype).mean()
        loss = o.information * entropy + o.continuous_information * error
        return loss, {"code_loss": loss.detach(), "code_accuracy": right}

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        reals, fakes, made = self.discriminator_inputs(batch, draws)
        real, _, _ = self.discriminator.read(reals[0])
        fake, category, codes = self.discriminator.read(fakes[0])
        loss = self.criterion.discriminator(real, fake, self.options.label_smoothing)
        missing, metrics = self.missing(made.z, category, codes)
        scalars = {**self.signals(loss, real, fake), **metrics}
        loss = loss + missing
        for name, penalty in self.penalties(reals, fakes, None, draws):
            loss = loss + penalty
            scalars[name] = penalty.detach()
        return loss, scalars

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        fakes = self.generate_fakes(batch, draws)
        fake, category, codes = self.discriminator.read(self.augment_inputs(fakes.views, draws, "fake")[0])
        loss = self.criterion.generator(fake)
        return loss + self.missing(fakes.z, category, codes)[0], {"generator_loss": loss.detach()}

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return CodeEvaluator(self, scores())

    @torch.no_grad()
    def figures(self, totals: Totals, images: Callable[[Iterable[int]], Tensor], draws: Draws) -> dict[str, Figure]:
        figures = super().figures(totals, images, draws)
        o, columns = self.options, 10
        z = self.latents(draws.of(10))
        rows = torch.eye(o.categories, device=z.device, dtype=z.dtype)[:10]
        path = z[:, None].repeat(1, len(rows), 1)
        path[:, :, o.latent : o.latent + o.categories] = rows
        grids = [ImageGrid(unit(self.images(path.flatten(0, 1), None)), columns=len(rows), title="category")]
        for code in range(min(o.codes, 3)):
            path = z[:, None].repeat(1, columns, 1)
            path[:, :, o.latent + o.categories + code] = torch.linspace(-2, 2, columns, device=z.device).to(z.dtype)
            title = f"code {code + 1} from -2 to 2"
            grids.append(ImageGrid(unit(self.images(path.flatten(0, 1), None)), columns=columns, title=title))
        return {**figures, **{f"traversal_{i}" if i else "traversal_category": grid for i, grid in enumerate(grids)}}


class CodeEvaluator(GeneratorEvaluator):
    """Also measures whether the category tells the classes apart."""

    workload: InfoGan

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        """Adds counts by (class, category): as read from real images, and of generated ones, whose classes the
        features' classifier tells."""
        workload, o = self.workload, self.workload.options
        z = workload.latents(draws)
        images = workload.images(z, None)
        totals = self.scores.totals(images, batch["id"])
        read = workload.discriminator.read(batch["image"])[1].argmax(1)
        totals["codes/read"] = self.table(batch["label"], read)
        if (classes := self.scores.classify(images)) is not None:
            totals["codes/generated"] = self.table(classes, z[:, o.latent : o.latent + o.categories].argmax(1))
        return totals

    def table(self, classes: Tensor, categories: Tensor) -> Tensor:
        shape = (len(self.workload.data.classes), self.workload.options.categories)
        counts = torch.bincount(classes * shape[1] + categories, minlength=shape[0] * shape[1])
        return counts.double().view(shape)

    def report(self, totals: Totals) -> dict[str, float]:
        tables = {name.partition("/")[2]: table for name, table in totals.items() if name.startswith("codes/")}
        accuracies = {f"code_{name}_accuracy": assigned(table) for name, table in tables.items()}
        return {**super().report(totals), **accuracies}


def assigned(table: Tensor) -> float:
    """The share of samples (classes, categories) that the best assignment of categories to classes gets right."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table.numpy()[rows, columns].sum() / max(float(table.sum()), 1.0))
