"""Data sets that fit into memory: each becomes tensors once, when a run starts."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from ..config.options import DataOptions, UserError
from .dataset import DataSet, Memory, Split, choose_split, describe, local_root, reason_of
from .description import ImageDescription, Mixture


def _images(images: Tensor, labels: Tensor) -> Memory:
    return Memory({"image": images, "label": labels})


def _data_set(options: DataOptions, split: str, splits: Mapping[str, Memory], classes: Sequence[str],
              mean: Sequence[float], std: Sequence[float]) -> DataSet:  # fmt: skip
    held_out = choose_split(split, list(splits), options.name)
    train, other = splits["train"], splits[held_out]
    size = train["image"].shape[-1]
    return DataSet(describe(options.name, classes, size, mean, std, train, other), train, other, held_out)


def digits(options: DataOptions, root: str, split: str) -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; every third one is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    test = torch.arange(len(labels)) % 3 == 2
    splits = {"train": _images(images[~test], labels[~test]), "test": _images(images[test], labels[test])}
    return _data_set(options, split, splits, [str(i) for i in range(10)], [0.3055], [0.3763])


def mnist(options: DataOptions, root: str, split: str) -> DataSet:
    return _idx(options, root, split, "MNIST", [str(i) for i in range(10)], 0.1307, 0.3081)


def fashion_mnist(options: DataOptions, root: str, split: str) -> DataSet:
    classes = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
    return _idx(options, root, split, "FashionMNIST", classes, 0.2860, 0.3530)


def _idx(
    options: DataOptions, root: str, split: str, folder: str, classes: Sequence[str], mean: float, std: float
) -> DataSet:  # fmt: skip
    """A set in IDX files, read here and not through torchvision, whose import doubles the start-up time."""
    raw = local_root(options, root) / folder / "raw"
    stems = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]

    def missing() -> list[str]:
        return [s for s in stems if not (raw / s).exists() and not (raw / f"{s}.gz").exists()]

    if missing():
        _download(options, root, folder, lambda: not missing(), [f"{folder}/raw/{s}[.gz]" for s in missing()])
    splits = {}
    for name, part in (("train", "train"), ("test", "t10k")):
        images = _read_idx(raw / f"{part}-images-idx3-ubyte", 3)[:, None]
        labels = _read_idx(raw / f"{part}-labels-idx1-ubyte", 1).long()
        if len(images) != len(labels):
            raise UserError(f"data.root: {raw}: {len(images)} {part} images but {len(labels)} labels: unpack it again")
        if len(labels) and int(labels.max()) >= len(classes):
            raise UserError(f"data.root: {raw}: {part} has label {int(labels.max())}, but labels end at 9")
        splits[name] = _images(images, labels)
    return _data_set(options, split, splits, classes, [mean], [std])


def ring8(options: DataOptions, root: str, split: str) -> DataSet:
    """Eight Gaussians on the unit circle (Lin et al. 2018)."""
    angles = [2 * math.pi * i / 8 for i in range(8)]
    return _points(options, split, Mixture(tuple((math.cos(a), math.sin(a)) for a in angles), 0.01))


def grid25(options: DataOptions, root: str, split: str) -> DataSet:
    """25 Gaussians on a grid (Lin et al. 2018)."""
    side = (-4.0, -2.0, 0.0, 2.0, 4.0)
    return _points(options, split, Mixture(tuple((x, y) for x in side for y in side), 0.05))


def _points(options: DataOptions, split: str, mixture: Mixture) -> DataSet:
    """100,000 points, 2,500 held out."""
    centres = torch.tensor(mixture.centres)
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Memory:
        # Random labels: equal counts per mode would vary less than samples do, a floor that no generator can reach.
        labels = torch.randint(len(centres), (count,), generator=generator)
        points = centres[labels] + mixture.deviation * torch.randn((count, 2), generator=generator)
        return _images((points + 1)[:, :, None, None] * 127.5, labels)  # the networks receive the points unchanged

    splits = {"train": part(100_000), "test": part(2500)}
    names = [f"mode {i}" for i in range(len(centres))]
    data = _data_set(options, split, splits, names, [0.5, 0.5], [0.5, 0.5])
    assert isinstance(data.description, ImageDescription)
    return replace(data, description=replace(data.description, mixture=mixture))


def stacked_mnist(options: DataOptions, root: str, split: str) -> DataSet:
    """Three random digits of MNIST as the colours of an image: 1,000 modes (Metz et al. 2017).

    60,000 images to train on; 26,000 of other digits are held out, as many as Srivastava et al. 2017 generate.
    """
    digits = mnist(options.model_copy(update={"name": "mnist"}), root, "test")
    generator = torch.Generator().manual_seed(0)

    def part(source: Memory, count: int) -> Memory:
        picks = torch.randint(len(source), (count, 3), generator=generator)
        labels = (source["label"][picks] * torch.tensor([100, 10, 1])).sum(1)
        return _images(source["image"][picks, 0], labels)

    assert isinstance(digits.train, Memory)
    assert isinstance(digits.held_out, Memory)
    splits = {"train": part(digits.train, 60_000), "test": part(digits.held_out, 26_000)}
    names = [f"{i:03d}" for i in range(1000)]
    return _data_set(options, split, splits, names, [0.1307] * 3, [0.3081] * 3)


def _read_idx(path: Path, axes: int) -> Tensor:
    """The unsigned bytes of an IDX file, gzipped or not."""
    gzipped = not path.exists()
    path = path.with_name(path.name + ".gz") if gzipped else path
    try:
        data = gzip.decompress(path.read_bytes()) if gzipped else path.read_bytes()
        magic, *shape = struct.unpack(f">{axes + 1}I", data[: 4 * axes + 4])
        if magic != 0x0800 + axes or len(data) != 4 * axes + 4 + int(np.prod(shape)):
            raise ValueError("not an IDX file of this kind, or cut short")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"data.root: {path}: {error}: delete it and fetch it again") from None
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 * axes + 4).reshape(shape).copy())


def _download(options: DataOptions, root: str, kind: str, done: Callable[[], bool], files: Sequence[str]) -> None:
    """Download through torchvision, once per node, under a lock; raises UserError that names the files to put there."""
    folder = local_root(options, root)
    problem = f"data.root: {options.name} is not in {str(folder)!r}"
    hint = f"put {', '.join(files)} there, or set data.root or TRAINER_DATA to where they are"
    if not options.download:
        raise UserError(f"{problem} and data.download is off: {hint}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{kind}.lock"):
            if not done():
                import torchvision

                for train in (True, False):
                    getattr(torchvision.datasets, kind)(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{problem} and cannot be downloaded ({reason_of(error)}): {hint}") from None


def cifar10(options: DataOptions, root: str, split: str) -> DataSet:
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    return _cifar(options, root, split, "CIFAR10", "cifar-10-batches-py", mean, std)


def cifar100(options: DataOptions, root: str, split: str) -> DataSet:
    mean, std = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
    return _cifar(options, root, split, "CIFAR100", "cifar-100-python", mean, std)


def _cifar(
    options: DataOptions, root: str, split: str, kind: str, folder: str, mean: Sequence[float], std: Sequence[float]
) -> DataSet:  # fmt: skip
    import torchvision

    dataset = getattr(torchvision.datasets, kind)
    data_folder = local_root(options, root)
    datasets: dict[str, Any] = {}

    def read() -> bool:
        """Checks the MD5 of every file before unpickling it; False where one is missing or is not the original."""
        try:
            datasets.update((name, dataset(str(data_folder), train=name == "train")) for name in ("train", "test"))
        except RuntimeError:
            return False
        return True

    if not read():
        _download(options, root, kind, read, [f"the original {folder}/"])
        if not datasets and not read():
            raise UserError(f"data.root: {data_folder / folder} is corrupt: delete it and fetch it again")
    splits = {
        name: _images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for name, part in datasets.items()
    }
    classes = datasets["train"].classes
    return _data_set(options, split, splits, classes, mean, std)


def fake(options: DataOptions, root: str, split: str) -> DataSet:
    """Noise around a pattern per class, so that there is something to learn and nothing to download."""
    size, channels, classes = options.size or 32, options.channels, options.classes
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand((classes, channels, 4, 4), generator=generator)
    patterns = nn.functional.interpolate(patterns, size=(size, size)) * 160

    def part(count: int) -> Memory:
        labels = torch.randint(classes, (count,), generator=generator)
        images = torch.randint(96, (count, channels, size, size), generator=generator, dtype=torch.uint8)
        return _images(images + patterns[labels].to(torch.uint8), labels)

    splits = {"train": part(options.samples), "test": part(max(1, options.samples // 4))}
    names = [f"class {i}" for i in range(classes)]
    return _data_set(options, split, splits, names, [0.5] * channels, [0.25] * channels)


def resized(data: DataSet, size: int) -> DataSet:
    """The data set with images of another size, such as the 64 pixels that DCGAN was made for."""
    assert isinstance(data.description, ImageDescription)
    if data.description.mixture:
        raise UserError(f"data.size: {data.description.name} is points, which have no size: remove data.size")

    def part(split: Split) -> Memory:
        if not isinstance(split, Memory):
            raise UserError(
                f"data.size: {data.description.name} reads its images in a size of its own: remove data.size"
            )
        return Memory(
            {**split.fields, **{name: scaled(split[name]) for name in split.image_fields}}, split.image_fields
        )

    def scaled(images: Tensor) -> Tensor:
        pieces = images.split(1000)  # antialiased scaling works on 32-bit copies
        return torch.cat(
            [nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True) for x in pieces]
        )

    description = replace(data.description, size=size)
    return replace(data, description=description, train=part(data.train), held_out=part(data.held_out))
