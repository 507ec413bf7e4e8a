"""Scores of generated images beside real ones: FID, KID, precision, recall, density, coverage, modes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.description import ImageDescription
from . import frechet, modes
from .evaluator import Totals
from .features import Features, PerChannel

PIECES = 4  # along a side, that the control shuffles


class SampleScores:
    """Scores generated images against real held-out ones, as many of each; `use` must come first.

    Beside the scores stand two controls, both of real images: the floor is the distance of as many training images,
    which no generator should beat by much; `shuffled` is that of held-out images whose pieces changed places.
    """

    def __init__(self, features: Features, data: ImageDescription, neighbours: int) -> None:
        self.features, self.data = features, data
        self.kept = min(neighbours, data.eval_size)  # rows of the tables for KID and the neighbour scores
        self.headline = f"fid@{features.label}"
        self.controls: dict[str, float] = {}

    @property
    def floor(self) -> float:
        """A FID below which differences are noise; that of one sample may be far below what is to be expected."""
        return max(self.controls["fid_floor"], self.noise)

    def totals(self, images: Tensor, ids: Tensor) -> Totals:
        with torch.autocast(images.device.type, enabled=False):
            if not self.data.mixture:
                images = ((images.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # as a file would hold them
            sums = self.sums(images, ids)
            if self.data.mixture:
                sums |= modes.mixture_totals(images.flatten(1), self.data.mixture)
            elif isinstance(self.features, PerChannel):
                counts = torch.bincount(self.features.mode_of(images), minlength=self.features.modes).double()
                sums |= {"modes": counts, "nearest": counts}
        return sums

    def classify(self, images: Tensor) -> Tensor | None:
        if self.features.classes != len(self.data.classes):
            return None
        with torch.autocast(images.device.type, enabled=False):
            probabilities = self.features(images)[1]
        return None if probabilities is None else probabilities.argmax(1)

    def report(self, totals: Totals) -> dict[str, float]:
        fake, table = _gaussian(totals), totals["table"]
        scores = {
            "fid": frechet.frechet_distance(self.real, fake),
            "kid": frechet.kernel_distance(self.table, table),
            **frechet.neighbours(self.table, table),
        }
        if "classes/sum" in totals:
            scores["is"] = frechet.inception_score(_part(totals, "classes"))
            fakes, reals = (t / t.sum() for t in (totals["classes/predicted"], self.predicted))
            scores["class_kl"] = float(torch.xlogy(fakes, fakes / reals.clamp(min=1e-9)).sum())
        scores |= self.controls
        metrics = {f"{name}@{self.features.label}": value for name, value in scores.items()}
        metrics["diversity"] = frechet.diversity(self.real, fake)
        metrics["spacing"] = frechet.spacing(self.table, table)
        return {**metrics, **modes.report(totals)} if "modes" in totals else metrics

    def sums(self, images: Tensor, ids: Tensor) -> Totals:
        """Moments, tables and class counts over a batch, of real images as of generated ones."""
        features, probabilities = self.features(images)
        sums = {f"moments/{name}": value for name, value in frechet.moments(features).items()}
        # A table of evenly spread samples, of which a batch fills its own rows.
        position = ids * self.kept // self.data.eval_size
        chosen = (ids * self.kept) % self.data.eval_size < self.kept
        table = torch.zeros(self.kept, features.shape[1], device=features.device)
        sums["table"] = table.index_add_(0, position[chosen], features[chosen])
        if probabilities is not None:
            sums |= {f"classes/{name}": value for name, value in frechet.class_sums(probabilities).items()}
            counts = torch.bincount(probabilities.argmax(1), minlength=self.features.classes)
            sums["classes/predicted"] = counts.double()
        return sums

    def use(self, reference: dict[str, Totals]) -> None:
        """Take over the sums over the real images: `held_out`, and `training` and `shuffled` for the controls."""
        self.real, self.table = _gaussian(reference["held_out"]), reference["held_out"]["table"]
        self.noise = frechet.expected_distance(self.real)
        self.predicted = reference["held_out"].get("classes/predicted", torch.zeros(0))
        for name, group in (("fid_floor", "training"), ("fid_shuffled", "shuffled")):
            if group == "training" or not self.data.mixture:
                self.controls[name] = frechet.frechet_distance(self.real, _gaussian(reference[group]))


def _part(totals: Totals, prefix: str) -> Totals:
    return {n.removeprefix(f"{prefix}/"): value for n, value in totals.items() if n.startswith(f"{prefix}/")}


def _gaussian(totals: Totals) -> frechet.Gaussian:
    return frechet.Gaussian.from_moments(_part(totals, "moments"))


def shuffled(images: Tensor) -> Tensor:
    """The images with their 16 pieces in another order, always the same: all of the colours, none of the shapes."""
    pieces = min(PIECES, images.shape[-1])
    side = images.shape[-1] // pieces
    whole = images[..., : side * pieces, : side * pieces].clone()
    split = whole.unflatten(3, (pieces, side)).unflatten(2, (pieces, side)).transpose(3, 4).flatten(2, 3)
    order = torch.arange(pieces**2, device=images.device) * 7 % pieces**2
    mixed = split[:, :, order].unflatten(2, (pieces, pieces)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    images = images.clone()
    images[..., : side * pieces, : side * pieces] = mixed
    return images
