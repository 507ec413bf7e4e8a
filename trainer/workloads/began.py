"""BEGAN (Berthelot et al. 2017): the discriminator is an autoencoder; a controller balances how well it rebuilds
real and fake images."""

from __future__ import annotations

from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config.options import OptimizerOptions
from ..data.description import Batch, ImageDescription
from ..figures import ScalarDisplay
from ..gan.adversarial import Adversarial, AdversarialOptions
from ..gan.criteria import displays
from ..gan.dcgan import halvings
from ..metrics.health import RECENT, Answer, Past, Rule, Rules, Values
from ..randomness import Draws
from ..workload import Scalars

_REBUILDS = "whose discriminator rebuilds images"


class Options(AdversarialOptions):
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(
        ("label_smoothing", "spectral_norm", "gradient_penalty", "r1", "packing"), _REBUILDS
    )

    latent: int = Field(64, ge=1, le=8192)
    """Length of the latent vector z, and of the autoencoder's code."""
    width: int = Field(64, ge=1)
    """Channels n of every layer; the encoder's grow by n with every halving."""
    balance: float = Field(0.5, gt=0, le=1)
    """Gamma: the loss of fakes over that of real images that the controller aims at. Lower is sharper, less varied."""
    gain: float = Field(0.001, gt=0)
    """How far the controller k moves a step. Shorter runs need more than the paper's 0.001."""
    norm: Literal["none", "batch"] = "none"
    """batch: BatchNorm of the autoencoder's code, which then tells fakes that are all alike. The paper has none."""


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Adversarial:
    return Began(options, data, optimizer)


# k starts at 0, but its mean over a log interval is 0 only where it was clipped at every step.
PINNED_RECORDS, PINNED_MARGIN = 20, 1e-4
# M_global falls to a plateau, so the mean of the last records is held against the first one.
FLAT = 0.9


def _pinned(now: Values, past: Past, rules: Rules) -> Answer:
    pinned = min(now["k"], 1 - now["k"]) <= PINNED_MARGIN
    return pinned, f"BEGAN's k is pinned at {round(now['k'])} and balances nothing"


def _flat(now: Values, past: Past, rules: Rules) -> Answer:
    first = past.first["convergence"]
    mean = fmean(record["convergence"] for record in past.recent if "convergence" in record)
    return mean > FLAT * first, f"BEGAN's convergence is {mean:.3g}, still above {FLAT:g} times {first:.3g}"


class Began(Adversarial):
    options: Options
    controller_inputs = ("real_loss", "fake_loss")
    health_rules = (
        Rule("convergence_failure", "train", ("k",), 0, PINNED_RECORDS, _pinned),
        Rule("convergence_failure", "train", ("convergence",), RECENT, 1, _flat),
    )
    k: Tensor
    convergence: Tensor  # M_global of the step before

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        generator = Decoder(options, data)
        super().__init__(options, data, optimizer, generator, Autoencoder(options, data))
        self.scalars = displays(convergence=ScalarDisplay(True), k=ScalarDisplay())
        self.register_buffer("k", torch.zeros(()))
        self.register_buffer("convergence", torch.zeros(()))

    def latents(self, draws: Draws, truncation: float | None = None) -> Tensor:
        """z (B, latent), uniform in [-1, 1], or within plus and minus `truncation`."""
        return (2 * draws.uniform("z", (self.options.latent,)) - 1) * min(truncation or 1.0, 1.0)

    def reconstruction_error(self, images: Tensor) -> Tensor:
        """The mean absolute error (B,) of the autoencoder."""
        return (images - self.discriminator(images)).abs().mean((1, 2, 3))

    def discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        reals, fakes, _ = self.discriminator_inputs(batch, draws)
        real, fake = self.reconstruction_error(reals[0]).mean(), self.reconstruction_error(fakes[0]).mean()
        loss = real - self.k * fake
        return loss, {"real_loss": real.detach(), "k": self.k.clone(), "convergence": self.convergence.clone()}

    def generator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        (images,) = self.augment_inputs(self.generate_fakes(batch, draws).views, draws, "fake")
        loss = self.reconstruction_error(images).mean()
        return loss, {"fake_loss": loss.detach()}

    def after_step(self, step: int, means: Scalars) -> None:
        super().after_step(step, means)
        gap = self.options.balance * means["real_loss"] - means["fake_loss"]
        self.convergence.copy_(means["real_loss"] + gap.abs())
        self.k.add_((self.options.gain * gap).to(self.k.dtype)).clamp_(0, 1)


class _Elu(torch.autograd.Function):
    """Keeps its result alone for the way back, in as few passes over the memory as torch's operators allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(max=0).exp_().sub_(1)
        torch.maximum(y, x, out=y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope: Tensor = torch.ops.aten.elu_backward(gradient, 1, 1, 1, True, *ctx.saved_tensors)
        return slope


class Elu(nn.Module):
    """x above zero, exp(x) - 1 below (Clevert et al. 2016). torch's own computes expm1 one element at a time on a CPU,
    which was two thirds of a step."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = F.elu(x) if x.device.type != "cpu" else _Elu.apply(x)
        return result


def _pair(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), Elu(), nn.Conv2d(after, after, 3, padding=1), Elu()]


class Decoder(nn.Module):
    """(B, latent) to images (B, C, H, W): nearest upsampling and pairs of convolutions; the output is linear."""

    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        times, size = halvings(data)
        times, size = (times - 1, 2 * size) if times > 1 else (times, size)  # the paper stops at 8 pixels
        n = options.width
        layers: list[nn.Module] = [nn.Linear(options.latent, n * size**2), nn.Unflatten(1, (n, size, size))]
        for _ in range(times):
            layers += [*_pair(n, n), nn.Upsample(scale_factor=2)]
        self.network = nn.Sequential(*layers, *_pair(n, n), nn.Conv2d(n, data.channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.network(z)
        return images


class Autoencoder(nn.Module):
    def __init__(self, options: Options, data: ImageDescription) -> None:
        super().__init__()
        times, size = halvings(data)
        times, size = (times - 1, 2 * size) if times > 1 else (times, size)
        n = options.width
        layers: list[nn.Module] = [nn.Conv2d(data.channels, n, 3, padding=1), Elu()]
        for stage in range(1, times + 1):
            layers += [
                *_pair(n * stage, n * stage),
                nn.Conv2d(n * stage, n * (stage + 1), 3, 2, 1),
                Elu(),
            ]
        layers += [*_pair(n * (times + 1), n * (times + 1)), nn.Flatten()]
        if options.norm == "batch":
            layers += [nn.Linear(n * (times + 1) * size**2, options.latent, bias=False), nn.BatchNorm1d(options.latent)]
        else:
            layers.append(nn.Linear(n * (times + 1) * size**2, options.latent))
        self.encoder = nn.Sequential(*layers)
        self.decoder = Decoder(options, data)

    def forward(self, images: Tensor) -> Tensor:
        reconstructions: Tensor = self.decoder(self.encoder(images))
        return reconstructions
