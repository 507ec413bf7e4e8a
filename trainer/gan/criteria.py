"""Adversarial losses on logits, and what the values that they log mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..figures import ScalarDisplay

_QUALITY = {"fid": ScalarDisplay(True), "modes": ScalarDisplay(True), "high_quality": ScalarDisplay()}
_GENERATOR = ScalarDisplay(True, "G loss")
_VARIETY = dict.fromkeys(("precision", "recall", "coverage", "diversity"), ScalarDisplay())


def displays(**losses: ScalarDisplay) -> dict[str, ScalarDisplay]:
    """How the scalars of a GAN are shown: quality first, then its losses, then variety."""
    return {**_QUALITY, **losses, **_VARIETY}


@dataclass(frozen=True)
class Criterion:
    """An adversarial loss on logits, each a mean over its rows."""

    discriminator: Callable[[Tensor, Tensor, float], Tensor]  # of real and fake logits and the label smoothing
    generator: Callable[[Tensor], Tensor]  # of fake logits
    decides: bool  # whether the sign of a logit says real or fake
    losses: Mapping[str, ScalarDisplay]  # that it logs


def _logistic(real: Tensor, fake: Tensor, smoothing: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(real, torch.full_like(real, 1 - smoothing)) + F.softplus(fake).mean()


def _hinge(real: Tensor, fake: Tensor, _: float) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


CRITERIA = {
    # Goodfellow et al. 2014, with the non-saturating loss of the generator; a discriminator that guesses has ln 2. The
    # ranges are those of a stable DCGAN.
    "logistic": Criterion(
        _logistic,
        lambda fake: F.softplus(-fake).mean(),
        True,
        {
            "discriminator_loss": ScalarDisplay(True, "D loss", (0.5, 0.8)),
            "generator_loss": ScalarDisplay(True, "G loss", (0.5, 2.0)),
            "discriminator_accuracy": ScalarDisplay(True, "D accuracy", (0.7, 0.9)),
        },
    ),
    # Lim and Ye 2017
    "hinge": Criterion(
        _hinge,
        lambda fake: -fake.mean(),
        True,
        {
            "discriminator_loss": ScalarDisplay(True, "D loss"),
            "generator_loss": _GENERATOR,
            "discriminator_accuracy": ScalarDisplay(True, "D accuracy"),
        },
    ),
    # Arjovsky et al. 2017
    "wasserstein": Criterion(
        lambda real, fake, _: fake.mean() - real.mean(),
        lambda fake: -fake.mean(),
        False,
        {"critic_loss": ScalarDisplay(True, "C loss"), "generator_loss": _GENERATOR, "distance": ScalarDisplay()},
    ),
}
