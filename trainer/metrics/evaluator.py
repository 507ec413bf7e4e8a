"""The judge of generated images: real ones beside them, the extractor of a config, the scores of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import safetensors.torch
import torch
from torch import Tensor

from ..config.options import UserError
from ..data.description import Description
from ..data.loader import BatchLoader
from ..distributed.runtime import Runtime
from ..storage.objects import Storage, StorageError
from ..workload import Totals
from . import frechet, modes
from .features import Features, PerChannel

PIECES = 4  # along a side, that the control shuffles


class Judge:
    """Scores fakes against real held-out samples, as many of each; `prepare` must come first.

    Beside the scores stand two controls, both of real images: the floor is the distance of as many training images,
    which no generator should beat by much; `shuffled` is that of held-out images whose pieces changed places.
    """

    def __init__(self, features: Features, data: Description, neighbours: int, cache: Storage | None = None) -> None:
        self.features, self.data, self.cache = features, data, cache
        self.kept = min(neighbours, data.eval_size)  # rows of the tables for KID and the neighbour scores
        self.headline = f"fid@{features.label}"
        self.controls: dict[str, float] = {}

    def totals(self, images: Tensor, ids: Tensor) -> Totals:
        with torch.autocast(images.device.type, enabled=False):
            if not self.data.mixture:
                images = ((images.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # as a file would hold them
            found = self._sums(images, ids)
            if self.data.mixture:
                found |= modes.mixture_totals(images.flatten(1), self.data.mixture)
            elif isinstance(self.features, PerChannel):
                counts = torch.bincount(self.features.mode_of(images), minlength=self.features.modes).double()
                found |= {"modes": counts, "nearest": counts}
        return found

    def classify(self, images: Tensor) -> Tensor | None:
        if self.features.classes != len(self.data.classes):
            return None
        with torch.autocast(images.device.type, enabled=False):
            probabilities = self.features(images)[1]
        return None if probabilities is None else probabilities.argmax(1)

    def _sums(self, images: Tensor, ids: Tensor) -> Totals:
        features, probabilities = self.features(images)
        found = {f"moments/{name}": value for name, value in frechet.moments(features).items()}
        # A table of evenly spread samples, of which a batch fills its own rows.
        position = ids * self.kept // self.data.eval_size
        chosen = (ids * self.kept) % self.data.eval_size < self.kept
        table = torch.zeros(self.kept, features.shape[1], device=features.device)
        found["table"] = table.index_add_(0, position[chosen], features[chosen])
        if probabilities is not None:
            found |= {f"classes/{name}": value for name, value in frechet.class_sums(probabilities).items()}
            counts = torch.bincount(probabilities.argmax(1), minlength=self.features.classes)
            found["classes/predicted"] = counts.double()
        return found

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
        found = {f"{name}@{self.features.label}": value for name, value in scores.items()}
        found["diversity"] = frechet.diversity(self.real, fake)
        found["spacing"] = frechet.spacing(self.table, table)
        return {**found, **modes.report(totals)} if "modes" in totals else found

    def prepare(self, loader: BatchLoader, runtime: Runtime) -> None:
        """Take the statistics of the real images, from the cache where it has them; every rank does its share."""
        file = self._name(loader) if runtime.main and self.cache else ""
        groups = runtime.broadcast_groups(self._cached(file) if runtime.main else None)
        if not groups:
            sources: dict[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]] = {
                "held_out": lambda: loader.real(held_out=True),
                "training": lambda: loader.real(held_out=False),
                "shuffled": lambda: ((_shuffled(images), ids) for images, ids in loader.real(held_out=True)),
            }
            for name, batches in sources.items():
                sums: Totals = {}
                for images, ids in batches():
                    for key, value in self._sums(images, ids).items():
                        sums[key] = sums[key] + value if key in sums else value
                groups[name] = runtime.total(sums)
            if problem := runtime.broadcast(self._keep(file, groups) if runtime.main else ""):
                raise UserError(problem)
        self.real, self.table = _gaussian(groups["held_out"]), groups["held_out"]["table"]
        self.noise = frechet.expected_distance(self.real)
        self.predicted = groups["held_out"].get("classes/predicted", torch.zeros(0))
        for name, group in (("fid_floor", "training"), ("fid_shuffled", "shuffled")):
            if group == "training" or not self.data.mixture:
                self.controls[name] = frechet.frechet_distance(self.real, _gaussian(groups[group]))

    def _name(self, loader: BatchLoader) -> str:
        """Of the statistics in the cache. Sets of one name, such as folders, are told apart by some of their images."""
        d = self.data
        shown = loader.pixels(i * d.eval_size // 16 for i in range(16))
        text = f"{d.name} {d.shape} {d.train_size} {d.eval_size} {self.kept} {self.features.label} 2"
        found = hashlib.sha256(text.encode())
        for part in (shown, loader.data.held_out.labels, loader.data.train.labels):
            found.update(part.numpy().tobytes())
        return f"reference-{found.hexdigest()[:16]}.safetensors"

    def _cached(self, name: str) -> dict[str, Totals]:
        """The statistics as they were kept, below the sha256 of their file; nothing where they are damaged."""
        if self.cache is None:
            return {}
        try:
            stored = self.cache.read(name)
        except StorageError:
            return {}
        if hashlib.sha256(stored[32:]).digest() != stored[:32]:
            return {}
        found: dict[str, Totals] = {}
        for key, value in safetensors.torch.load(stored[32:]).items():
            group, _, rest = key.partition("/")
            found.setdefault(group, {})[rest] = value
        return found

    def _keep(self, name: str, groups: dict[str, Totals]) -> str:
        """Returns what went wrong, for the user."""
        if self.cache is None:
            return ""
        flat = {f"{group}/{key}": value.contiguous() for group, totals in groups.items()
                for key, value in totals.items()}  # fmt: skip
        data = safetensors.torch.save(flat)
        try:
            self.cache.write(name, hashlib.sha256(data).digest() + data)
        except StorageError as error:
            return f"metrics.cache: {error}"
        return ""


def _part(totals: Totals, prefix: str) -> Totals:
    return {n.removeprefix(f"{prefix}/"): value for n, value in totals.items() if n.startswith(f"{prefix}/")}


def _gaussian(totals: Totals) -> frechet.Gaussian:
    return frechet.Gaussian.from_moments(_part(totals, "moments"))


def _shuffled(images: Tensor) -> Tensor:
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
