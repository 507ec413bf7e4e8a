"""A user's own image files, prepared as the held-out data of a run is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config.options import DataOptions, UserError
from .decoding import SUFFIXES, BadSample, decode
from .description import ImageDescription
from .transforms import Augment, Crop


def image_paths(names: Sequence[str]) -> list[Path]:
    """The files, and those in the folders; raises UserError where there is none."""
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            images = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not images:
                raise UserError(f"{name}: no images in this folder ({', '.join(SUFFIXES)})")
            paths += images
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{name}: no such file or folder")
    return paths


def read_images(paths: Sequence[Path], data: ImageDescription, background: str) -> Tensor:
    """(N, C, size, size) float32, normalised as `data` says; raises UserError that names a file that is no image."""
    options = DataOptions()
    crop = Crop(options, data.size, 0, train=False, variable_size=data.variable_size)
    normalise = Augment(options, data, 0, False, torch.device("cpu"), torch.float32, False).normalise
    images = []
    for path in paths:
        try:
            images.append(crop(decode(path.read_bytes(), str(path), data.channels, background), 0, 0))
        except (BadSample, OSError) as error:
            raise UserError(f"{error}: repair or remove it") from None
    return normalise(torch.stack(images))
