"""What every pair of generator and discriminator shares: losses, the stability kit, samples, evaluation.

A workload of the GAN family is an `Adversarial` with its own networks; it overrides a method where its paper differs.
The discriminator's phase comes first and trains on fakes without a graph into the generator; in the generator's phase
the discriminator is frozen. That phase takes the newest fakes of the one before, whose graph was kept: a tenth of
a step less than new ones would cost. Each phase is one loss and one backward pass, penalties included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from ..config.options import OptimizerOptions, WorkloadOptions
from ..data.description import Batch, ImageDescription
from ..figures import Figure, ImageGrid, Panels, Points
from ..metrics.evaluator import Evaluator, Scores, Totals
from ..nn import optim
from ..nn.average import WeightAverage
from ..nn.dropout import drawing
from ..randomness import Draws
from ..workload import Phase, Scalars, Workload
from .criteria import CRITERIA, displays
from .diff_augment import diff_augment
from .newest import Newest

Views = tuple[Tensor, ...]  # what a discriminator sees: the images, and with multi-scale gradients smaller ones too
SHOWN = 64  # samples in a picture


def _words(value: object) -> object:
    """'color,translation' on the command line, a list in YAML."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


class AdversarialOptions(WorkloadOptions):
    refuses: ClassVar[dict[str, str]] = {}  # settings that make no sense for a workload, and why

    latent: int = Field(100, ge=1, le=8192)
    """Length of the latent vector z."""
    discriminator_steps: int = Field(1, ge=1, le=1000)
    """Updates of the discriminator or critic per update of the generator, each on a batch of its own."""
    discriminator_lr: float | None = Field(None, gt=0)
    """Learning rate of the discriminator: two time scales (TTUR, Heusel et al. 2017). Default: optimizer.lr."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The target of real images is 1 minus this (one-sided, Salimans et al. 2016); logistic loss only. 0 is off."""
    spectral_norm: bool = False
    """Divide every weight of the discriminator by its largest singular value (Miyato et al. 2018)."""
    gradient_penalty: float = Field(0.0, ge=0)
    """Weight of (|gradient| - 1)^2 between real and fake images (Gulrajani et al. 2017). 0 is off."""
    r1: float = Field(0.0, ge=0)
    """Gamma of the penalty gamma/2 |gradient|^2 at real images (Mescheder et al. 2018). 0 is off."""
    r1_every: int = Field(16, ge=1)
    """Apply r1 only every so many steps, and so many times as strongly (Karras et al. 2020)."""
    augment: Annotated[tuple[Literal["color", "translation", "cutout"], ...], BeforeValidator(_words)] = ()
    """DiffAugment of all that the discriminator sees: color, translation, cutout (Zhao et al. 2020). Default: none."""
    instance_noise: float = Field(0.0, ge=0)
    """Deviation of the noise on all that the discriminator sees (Sønderby et al. 2017), at the first step. 0 is off."""
    instance_noise_steps: int = Field(2000, ge=1)
    """Steps in which the instance noise falls to nothing, linearly."""
    packing: int = Field(1, ge=1, le=16)
    """Samples that the discriminator judges together (PacGAN, Lin et al. 2018)."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of the generator's weights, which then is what samples and is evaluated. 0 is off."""

    @model_validator(mode="after")
    def _sensible(self) -> AdversarialOptions:
        for name, reason in self.refuses.items():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"workload.{name}: {value!r} is no setting of {self.name}, {reason}: remove it")
        if self.label_smoothing and getattr(self, "loss", "logistic") != "logistic":
            raise ValueError("workload.label_smoothing: only the logistic loss has targets: remove it or set loss")
        return self

    @property
    def plain_norm(self) -> bool:
        """Whether the discriminator may have BatchNorm: with a Lipschitz constraint or a penalty it must not."""
        return not (self.spectral_norm or self.gradient_penalty or self.r1)


@dataclass(frozen=True)
class Fakes:
    """Generated images, and what they were made from."""

    views: Views
    z: Tensor
    labels: Tensor | None


class Adversarial(Workload):
    """A generator `(z, [labels]) -> images in [-1, 1]` and a discriminator `(images, ..., [labels]) -> logits (B,)`."""

    input_range = (-1.0, 1.0)
    generates = True
    whole_groups = True
    channels_last = True
    options: AdversarialOptions
    data: ImageDescription

    def __init__(self, options: AdversarialOptions, data: ImageDescription, optimizer: OptimizerOptions,
                 generator: nn.Module, discriminator: nn.Module, loss: str = "logistic") -> None:  # fmt: skip
        super().__init__()
        self.options, self.data, self.criterion = options, data, CRITERIA[loss]
        self.scalars = displays(**self.criterion.losses)
        self.generator, self.discriminator = generator, discriminator
        self.average = WeightAverage(generator, options.ema) if options.ema else None
        self.group = options.packing
        if options.augment and data.size < 8:
            raise ValueError(f"workload.augment: {data.name} has no images to augment: remove it")
        rate = options.discriminator_lr or optimizer.lr
        discriminators = optim.build(optimizer.model_copy(update={"lr": rate}), discriminator)
        self.phases = (
            Phase(
                "discriminator",
                self.discriminator_loss,
                discriminators,
                times=options.discriminator_steps,
                keeps_graph_of=(generator,),
            ),
            Phase("generator", self.generator_loss, optim.build(optimizer, generator)),
        )
        self.newest: Newest[Fakes] = Newest()

    # What a workload may override.

    def latents(self, draws: Draws, truncation: float | None = None) -> Tensor:
        """z (B, latent) from N(0, 1); with `truncation`, from its part within plus and minus that many deviations."""
        if truncation is None:
            return draws.normal("z", (self.options.latent,))
        share = min(math.erf(truncation / math.sqrt(2)), 1 - 1e-7)
        return torch.erfinv((2 * draws.uniform("z", (self.options.latent,)) - 1) * share) * math.sqrt(2)

    def generate(self, z: Tensor, labels: Tensor | None) -> Views:
        return (self.generator(z, labels) if self.conditional else self.generator(z),)

    def reals(self, batch: Batch) -> Views:
        return (batch["image"],)

    # Training.

    def augment_inputs(self, views: Views, draws: Draws, name: str) -> Views:
        """What the discriminator gets to see of images: augmented, noisy, packed (B/packing, packing C, H, W)."""
        options = self.options
        if options.augment:
            views = tuple(diff_augment(view, options.augment, draws, name) for view in views)
        noise = options.instance_noise
        if noise and (noise := noise * max(0.0, 1 - draws.step / options.instance_noise_steps)):
            views = tuple(
                view + noise * draws.normal(f"{name}/noise{i}", view.shape[1:]) for i, view in enumerate(views)
            )
        return tuple(view.reshape(-1, options.packing * view.shape[1], *view.shape[2:]) for view in views)

    def discriminate(self, views: Views, labels: Tensor | None, draws: Draws) -> Tensor:
        """Logits (B,) in full precision."""
        with drawing(self.discriminator, draws):
            logits = self.discriminator(*views, labels) if self.conditional else self.discriminator(*views)
        return wide(logits)

    def generate_fakes(self, batch: Batch, draws: Draws) -> Fakes:
        """Fakes to train the generator on: those that the discriminator has just seen, else new ones."""
        return self.newest.take(draws) or self._new_fakes(batch, draws)

    def detached_fakes(self, batch: Batch, draws: Draws) -> Fakes:
        """Fakes to train the discriminator on, without a graph. The newest keep theirs for the generator's phase."""
        fakes = self.newest.make(draws, lambda: self._new_fakes(batch, draws))
        return replace(fakes, views=tuple(view.detach() for view in fakes.views))

    def _new_fakes(self, batch: Batch, draws: Draws) -> Fakes:
        labels = batch["label"] if self.conditional else None
        with drawing(self.generator, draws):
            z = self.latents(draws)
            return Fakes(self.generate(z, labels), z, labels)

    def discriminator_inputs(self, batch: Batch, draws: Draws) -> tuple[Views, Views, Fakes]:
        """What the discriminator trains on: what it sees of real images and of fakes, and those fakes."""
        fakes = self.detached_fakes(batch, draws)
        with torch.no_grad():
            seen_reals = self.augment_inputs(self.reals(batch), draws, "real")
            return seen_reals, self.augment_inputs(fakes.views, draws, "fake"), fakes

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        reals, fakes, made = self.discriminator_inputs(batch, draws)
        # In two passes: BatchNorm must not see real and fake images mixed, which would tell them apart.
        real, fake = self.discriminate(reals, made.labels, draws), self.discriminate(fakes, made.labels, draws)
        loss = self.criterion.discriminator(real, fake, self.options.label_smoothing)
        scalars = self.signals(loss, real, fake)
        for name, penalty in self.penalties(reals, fakes, made.labels, draws):
            loss = loss + penalty
            scalars[name] = penalty.detach()
        return loss, scalars

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        fakes = self.generate_fakes(batch, draws)
        logits = self.discriminate(self.augment_inputs(fakes.views, draws, "fake"), fakes.labels, draws)
        loss = self.criterion.generator(logits)
        return loss, {"generator_loss": loss.detach()}

    def signals(self, loss: Tensor, real: Tensor, fake: Tensor) -> Scalars:
        """What tells how the game stands. The loss is the mean of its real and its fake half: ln 2 is a guess."""
        if not self.criterion.decides:
            return {"critic_loss": loss.detach(), "distance": (real.mean() - fake.mean()).detach()}
        right = (real > 0).to(loss.dtype).mean() + (fake < 0).to(loss.dtype).mean()
        return {
            "discriminator_loss": loss.detach() / 2,
            "discriminator_accuracy": right / 2,
            "real_score": real.detach().sigmoid().mean(),
            "fake_score": fake.detach().sigmoid().mean(),
        }

    def penalties(
        self, reals: Views, fakes: Views, labels: Tensor | None, draws: Draws
    ) -> Iterable[tuple[str, Tensor]]:
        options = self.options
        if options.gradient_penalty:
            share = draws.uniform("between", (1,))[:: options.packing, :, None, None]
            pairs = zip(reals, fakes, strict=True)
            between = tuple(torch.lerp(fake.to(real.dtype), real, share) for real, fake in pairs)
            norm = self.squared_gradient_norm(between, labels, draws).add(1e-12).sqrt()
            yield "gradient_penalty", options.gradient_penalty * (norm - 1).square().mean()
        if options.r1 and draws.due(options.r1_every):
            yield "r1", options.r1 / 2 * options.r1_every * self.squared_gradient_norm(reals, labels, draws).mean()

    def squared_gradient_norm(self, views: Views, labels: Tensor | None, draws: Draws) -> Tensor:
        """The squared norm (B,) of the discriminator's gradient with respect to what it sees, in full precision."""
        with torch.autocast(views[0].device.type, enabled=False), torch.enable_grad():
            leaves = tuple(view.detach().to(self.dtype).requires_grad_(True) for view in views)
            logits = self.discriminate(leaves, labels, draws)
            gradients = torch.autograd.grad(logits.sum(), leaves, create_graph=True)
        return torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.generator.parameters()).dtype

    def after_step(self, step: int, means: Scalars) -> None:
        if self.average is not None:
            self.average.update(self.generator, step)

    # Evaluation and samples.

    def inference(self) -> nn.Module:
        return self.generator if self.average is None else self.average.module

    def example(self) -> dict[str, Tensor]:
        draws = Draws(0, ("example",), slice(0, 2), torch.device("cpu"))
        latents = {"latents": self.latents(draws)}
        return {**latents, "labels": self.labels(draws)} if self.conditional else latents

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of the averaged generator, where there is one."""
        network = self.inference()
        images: Tensor = network(z, labels) if self.conditional else network(z)
        return wide(images)

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return GeneratorEvaluator(self, scores())

    def labels(self, draws: Draws, label: int | None = None) -> Tensor:
        """One class for all rows, or all classes in turn."""
        rows = torch.arange(draws.rows.start, draws.rows.stop, device=draws.device)
        return torch.full_like(rows, label) if label is not None else rows % len(self.data.classes)

    @torch.no_grad()
    def samples(self, draws: Draws, label: int | None = None, truncation: float | None = None) -> Tensor:
        return self.images(self.latents(draws, truncation), self.labels(draws, label))

    @torch.no_grad()
    def figures(self, totals: Totals, images: Callable[[Iterable[int]], Tensor], draws: Draws) -> dict[str, Figure]:
        name = self.data.name
        if self.data.size == 1:
            many = self.samples(draws.of(min(2500, self.data.eval_size)))
            real = images(range(len(many)))
            return {"real_and_fake": Points(real.flatten(1), many.cpu().flatten(1) / 2 + 0.5, name)}
        fakes = self.samples(draws.of(SHOWN))
        reals = images([i * self.data.eval_size // SHOWN for i in range(SHOWN)])
        figures: dict[str, Figure] = {
            "real_and_fake": Panels(
                (
                    ImageGrid(reals, columns=8, title=f"{name}: real"),
                    ImageGrid(unit(fakes), columns=8, title="generated"),
                )
            ),
            "interpolation": ImageGrid(unit(self.between(draws, 8, 10)), columns=10, title="from latent to latent"),
        }
        if self.conditional:
            classes = min(len(self.data.classes), 20)
            columns = draws.of(classes * 10)
            wanted = torch.arange(classes, device=draws.device).repeat_interleave(10)
            grid = self.images(self.latents(columns), wanted)
            figures["classes"] = ImageGrid(unit(grid), (), f"{name}: generated", 10, self.data.classes[:classes])
        return figures

    def between(self, draws: Draws, rows: int, columns: int) -> Tensor:
        """Images on great circles from latent to latent, a row each (White 2016)."""
        z = self.latents(draws.of(2 * rows))
        start, end = z[:rows], z[rows:]
        cosine = F.cosine_similarity(start, end, dim=1).clamp(-0.9999, 0.9999)
        angle = cosine.acos()[:, None, None]
        t = torch.linspace(0, 1, columns, device=z.device, dtype=z.dtype)[None, :, None]
        path = (torch.sin((1 - t) * angle) * start[:, None] + torch.sin(t * angle) * end[:, None]) / torch.sin(angle)
        labels = torch.arange(rows, device=z.device).repeat_interleave(columns) % len(self.data.classes)
        return self.images(path.flatten(0, 1), labels)


class GeneratorEvaluator:
    """Scores as many generated images as there are held-out ones, and watches the discriminator's weights."""

    maximise = False

    def __init__(self, workload: Adversarial, scores: Scores) -> None:
        self.workload, self.scores, self.headline = workload, scores, scores.headline

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        images = self.workload.images(self.workload.latents(draws), batch["label"])
        return self.scores.totals(images, batch["id"])

    def report(self, totals: Totals) -> dict[str, float]:
        metrics, workload = self.scores.report(totals), self.workload
        if not workload.options.spectral_norm:
            metrics["discriminator_sigma"] = max_singular_value(workload.discriminator)
        return metrics


@torch.no_grad()
def max_singular_value(network: nn.Module) -> float:
    """The largest singular value of a weight: it grows before a discriminator without a constraint breaks down."""
    values = [0.0]
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            rows = module.weight.flatten(1).double()
            gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
            values.append(float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()))
    return max(values)


def wide(x: Tensor) -> Tensor:
    """In full precision, also under autocast."""
    return x if x.dtype == torch.float64 else x.float()


def unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], on the CPU."""
    return images.float().cpu() / 2 + 0.5
