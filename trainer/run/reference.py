"""What generated images are compared with: the features that a config names, and the statistics of the real images.

The statistics are taken once, by all ranks together, and may be kept in a cache that runs share.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..config.options import RunConfig, UserError
from ..data.dataset import Memory, Split
from ..data.description import Description, ImageDescription
from ..data.loader import BatchLoader
from ..distributed.runtime import Runtime
from ..metrics.evaluator import Totals
from ..metrics.features import Features, Inception, Penultimate, PerChannel, Pixels
from ..metrics.scores import SampleScores, shuffled
from ..storage.objects import Storage, StorageError
from .feature_classifier import Untrained, feature_classifier
from .opened import open_run


class Reference:
    """The scores of a run, and where they take the statistics of the real images from."""

    def __init__(self, scores: SampleScores, cache: Storage | None) -> None:
        self.scores, self.cache = scores, cache

    def prepare(self, loader: BatchLoader, runtime: Runtime) -> None:
        """Take the statistics of the real images, from the cache where it has them; every rank does its share.

        Raises UserError on all ranks, also where they do not have the same features.
        """
        labels = runtime.gather(self.scores.features.label)
        if other := next((rank for rank, label in enumerate(labels) if label != labels[0]), 0):
            raise UserError(
                f"metrics.features: rank 0 has {labels[0]}, rank {other} has {labels[other]}: use one run for "
                f"all, in a shared folder or copied to every machine"
            )
        file = problem = ""
        if runtime.main and self.cache:
            try:
                file = self._name(loader)
            except UserError as error:  # storage does not answer
                problem = str(error)
        if problem := runtime.broadcast(problem):
            raise UserError(problem)
        groups = runtime.broadcast_groups(self._cached(file) if runtime.main else None)
        if not groups:
            sources: dict[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]] = {
                "held_out": lambda: loader.real(held_out=True),
                "training": lambda: loader.real(held_out=False),
                "shuffled": lambda: ((shuffled(images), ids) for images, ids in loader.real(held_out=True)),
            }
            for name, batches in sources.items():
                sums: Totals = {}
                for images, ids in batches():
                    for key, value in self.scores.sums(images, ids).items():
                        sums[key] = sums[key] + value if key in sums else value
                groups[name] = runtime.total(sums)
            if problem := runtime.broadcast(self._keep(file, groups) if runtime.main else ""):
                raise UserError(problem)
        self.scores.use(groups)

    def _name(self, loader: BatchLoader) -> str:
        """Of the statistics in the cache, after all that they depend on: features, sizes, and every image as stored."""
        d, held_out, train = self.scores.data, loader.data.held_out, loader.data.train
        count = min(len(held_out), len(train))
        text = f"{d.name} {d.shape} {d.train_size} {d.eval_size} {self.scores.kept} {self.scores.features.label} 3"
        digest = hashlib.sha256(text.encode())
        for split, ids in ((held_out, range(len(held_out))), (train, [i * len(train) // count for i in range(count)])):
            for part in _content(split, ids):
                digest.update(part)
        return f"reference-{digest.hexdigest()[:16]}.safetensors"

    def _cached(self, name: str) -> dict[str, Totals]:
        """The statistics as they were kept, below the sha256 of their file; nothing where they are corrupt."""
        if self.cache is None:
            return {}
        try:
            stored = self.cache.read(name)
        except StorageError:
            return {}
        if hashlib.sha256(stored[32:]).digest() != stored[:32]:
            return {}
        groups: dict[str, Totals] = {}
        for key, value in safetensors.torch.load(stored[32:]).items():
            group, _, rest = key.partition("/")
            groups.setdefault(group, {})[rest] = value
        return groups

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


READ_TOGETHER = 256  # stored images, for the name in the cache


def _content(split: Split, ids: Sequence[int]) -> Iterator[bytes]:
    """The images and labels of some samples, as they are stored."""
    rows = torch.as_tensor(ids, dtype=torch.int64)
    yield (split["label"] if isinstance(split, Memory) else split.labels)[rows].numpy().tobytes()
    for field in split.image_fields:
        if isinstance(split, Memory):
            yield split[field][rows].numpy().tobytes()
            continue
        for start in range(0, len(ids), READ_TOGETHER):
            for image in split.fetch(ids[start : start + READ_TOGETHER], field):
                if isinstance(image, bytes):
                    yield image
                else:  # half of a file is an image of PIL's; what cannot be read, an exception
                    yield repr(image).encode() if isinstance(image, Exception) else image.tobytes()


def open_reference(config: RunConfig, data: Description) -> Reference:
    """What a config compares generated images with; raises UserError, Untrained where a classifier can be trained."""
    wanted = config.metrics.features
    assert isinstance(data, ImageDescription), "only images are compared"
    if data.eval_size < 6:
        raise UserError(
            f"metrics.features: {data.eval_size} held-out samples are too few for scores: evaluate 6 or more, "
            f"better thousands"
        )
    features: Features
    if wanted == "pixels" or data.mixture:
        features = Pixels(data)
    elif wanted.startswith("inception:"):
        features = _inception(wanted.partition(":")[2])
    elif (trained := feature_classifier(config)) is not None:
        if not trained.finished():
            raise Untrained(trained)
        features = _classifier(trained.url, data)
    else:
        features = _classifier(wanted, data)
    try:
        cache = None if config.metrics.cache is None else Storage(config.metrics.cache)
    except StorageError as error:
        raise UserError(f"metrics.cache: {error}") from None
    return Reference(SampleScores(features, data, config.metrics.neighbours), cache)


def _inception(path: str) -> Inception:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"metrics.features: {path!r} cannot be read ({error.strerror}): give the path of the Inception weights of "
            f"torch-fidelity, pt_inception-2015-12-05"
        ) from None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run whatever the pickle says
        return Inception(path, hashlib.sha256(data).hexdigest()[:8])
    except ImportError:
        raise UserError("metrics.features: inception needs another package: pip install 'trainer[inception]'") from None
    except pickle.UnpicklingError:
        raise UserError(f"metrics.features: {path!r} holds no Inception weights: it is no file of tensors") from None
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"metrics.features: {path!r} holds no Inception weights: {reason}") from None


def _classifier(url: str, data: ImageDescription) -> Features:
    try:
        trained = open_run(url, best=True)
    except (UserError, StorageError) as error:
        raise UserError(f"metrics.features: {error}; train it first, or use metrics.features pixels") from None
    known = trained.images
    if trained.workload.generates:
        raise UserError(f"metrics.features: {url} is no classifier: give the URL of a run that trained one")
    network = trained.workload.inference()
    if not any(isinstance(module, nn.Linear) for module in network.modules()):
        raise UserError(f"metrics.features: {url} has no linear layer, whose inputs are the features: use another run")
    name = str(trained.storage).rstrip("/").rpartition("/")[2]
    extractor = Penultimate(network, known.normalised_to(trained.workload.input_range), f"{name}-{trained.digest[:8]}")
    if known.channels == data.channels:
        return extractor
    if known.channels == 1 and data.name == "stacked_mnist":
        return PerChannel(extractor, data.channels)
    raise UserError(
        f"metrics.features: {url} was trained on {known.name}, images of {known.channels} channel(s); {data.name} has "
        f"{data.channels}: use features of such images, or metrics.features pixels"
    )
