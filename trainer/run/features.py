"""The judge of a config: opens the features that generated images are compared by."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torch import nn

from ..config.options import RunConfig, UserError
from ..data.description import Description
from ..metrics.evaluator import Judge
from ..metrics.features import Features, Inception, Penultimate, PerChannel, Pixels
from ..storage.objects import Storage, StorageError
from .opened import open_run


def open_judge(config: RunConfig, data: Description) -> Judge:
    """The judge of a config; raises UserError."""
    wanted, d = config.metrics.features, data
    if d.eval_size < 6:
        raise UserError(
            f"metrics.features: {d.eval_size} held-out samples are too few for scores: evaluate 6 or more, "
            f"better thousands"
        )
    features: Features
    if wanted == "pixels" or d.mixture:
        features = Pixels(d)
    elif wanted.startswith("inception:"):
        features = _inception(wanted.partition(":")[2])
    else:
        features = _classifier(wanted, d)
    try:
        cache = None if config.metrics.cache is None else Storage(config.metrics.cache)
    except StorageError as error:
        raise UserError(f"metrics.cache: {error}") from None
    return Judge(features, d, config.metrics.neighbours, cache)


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


def _classifier(url: str, data: Description) -> Features:
    try:
        trained = open_run(url, best=True)
    except (UserError, StorageError) as error:
        raise UserError(f"metrics.features: {error}; train it first, or use metrics.features pixels") from None
    known = trained.data
    if trained.workload.generates:
        raise UserError(f"metrics.features: {url} is no classifier: give the URL of a run that trained one")
    network = trained.workload.inference()
    if not any(isinstance(module, nn.Linear) for module in network.modules()):
        raise UserError(f"metrics.features: {url} has no linear layer, whose inputs are the features: use another run")
    name = str(trained.storage).rstrip("/").rpartition("/")[2]
    extractor = Penultimate(network, known, f"{name}-{trained.digest[:8]}")
    if known.channels == data.channels:
        return extractor
    if known.channels == 1 and data.name == "stacked_mnist":
        return PerChannel(extractor, data.channels)
    raise UserError(
        f"metrics.features: {url} was trained on {known.name}, images of {known.channels} channel(s); {data.name} has "
        f"{data.channels}: use features of such images, or metrics.features pixels"
    )
