"""Opening a trained network whose layers pictures are made with: a classifier's run, or torchvision's with weights."""

from __future__ import annotations

import difflib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..config.options import UserError
from ..data.stored import IMAGENET
from ..pixels.layers import LayeredNetwork
from .opened import open_run

SIZE = 224  # pixels that torchvision's networks are made for


def open_layered(source: str, device: torch.device) -> LayeredNetwork:
    """The network of a run's best checkpoint, or of torchvision:NAME:FILE; raises UserError."""
    if source.startswith("torchvision:"):
        return _torchvision(source, device)
    trained = open_run(source, best=True)
    data, name = trained.images, trained.config.workload.name
    if trained.workload.generates:
        raise UserError(f"{source}: {name} generates images and recognises nothing: give the run of a classifier")
    if data.mixture or data.channels not in (1, 3):
        raise UserError(f"{source}: {data.name} is no set of grey or coloured images: give another run")
    data = data.normalised_to(trained.workload.input_range)
    return LayeredNetwork(trained.workload.inference(), data.shape, data.mean, data.std, device)


def _torchvision(source: str, device: torch.device) -> LayeredNetwork:
    from torchvision import models

    _, name, path = (*source.split(":", 2), "")[:3]
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or known
        raise UserError(f"{source}: torchvision has no classification model {name!r}; it has: {', '.join(near)}")
    if not path:
        raise UserError(f"{source}: no weights: give torchvision:{name}:FILE, a state dict as .pth or .safetensors")
    weights = _weights(path)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):  # nothing is initialised, for all is in the file
        network = models.get_model(name, weights=None, **extra)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: not the weights of torchvision's {name}: {reason[:120]}") from None
    return LayeredNetwork(network, (3, SIZE, SIZE), *IMAGENET, device)


def _weights(path: str) -> dict[str, Tensor]:
    """A state dict from a file; nothing that a pickle may do besides is done."""
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load(Path(path).read_bytes())
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: the weights cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a file that is something else makes of the parsers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: no file of weights: {reason[:120]}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: no state dict, which maps names to tensors")
    return weights
