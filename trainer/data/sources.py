"""Data sets: where samples come from. Each becomes splits of `Memory` (a uint8 tensor) or of `Stored` (read by id)."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
import re
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from ..config import DataOptions, UserError
from ..workload import Description, Mixture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_PIXELS = 89_000_000  # PIL warns from here on: no photograph, probably a decompression bomb


class BadSample(Exception):
    """A sample cannot be read; the message names its file."""


@dataclass(frozen=True)
class Memory:
    """A split that is one tensor: images (N, C, H, W) uint8, or float in the same range; labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


Encoded = bytes | Exception  # an image as it is stored, or why it cannot be had


class Stored(Protocol):
    """A split whose images are read when they are needed, in loader workers, so it opens files late."""

    labels: Tensor
    channels: int

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...  # where an image is, for the user
    def fetch(self, indices: Sequence[int]) -> list[Encoded]: ...  # raises UserError where storage does not answer


class Part:
    """Some samples of a stored split."""

    def __init__(self, whole: Stored, ids: Tensor) -> None:
        self.whole, self.ids = whole, ids.tolist()
        self.labels, self.channels = whole.labels[ids], whole.channels

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return self.whole.name(self.ids[index])

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        return self.whole.fetch([self.ids[index] for index in indices])


@dataclass(frozen=True)
class DataSet:
    description: Description
    train: Memory | Stored
    held_out: Memory | Stored
    split: str  # which split is held out


def spread(data: DataSet, count: int) -> DataSet:
    """The data set with so many held-out samples, evenly spread, since many sets are sorted by class."""
    whole = data.held_out
    count = min(count, len(whole))
    ids = torch.arange(count) * len(whole) // count
    part = Memory(whole.images[ids], whole.labels[ids]) if isinstance(whole, Memory) else Part(whole, ids)
    return replace(data, held_out=part, description=replace(data.description, evaluated=count))


def open_data(options: DataOptions, root: str, split: str) -> DataSet:
    """The data set of a config; raises UserError. `split` is the one to evaluate: auto, val, test or train."""
    kind: Callable[[DataOptions, str, str], DataSet] = {
        "digits": _digits, "mnist": _idx, "fashion_mnist": _idx, "cifar10": _cifar, "cifar100": _cifar,
        "lsun": _lsun, "imagenet": _imagenet, "folder": _folder, "shards": _shards, "fake": _fake,
        "ring8": _points, "grid25": _points, "stacked_mnist": _stacked,
    }[options.name]  # fmt: skip
    try:
        data = kind(options, root, split)
    except UserError:
        raise
    except Exception as error:
        if "://" not in root:
            raise
        raise UserError(f"data.root: {root!r} cannot be read: {_reason(error)}") from error
    if options.size not in (None, data.description.size):
        data = _resized(data, options.size)
    for name, part in (("train", data.train), (data.split, data.held_out)):
        if not len(part):
            raise UserError(f"data.name: {options.name}: the {name} split in {root!r} is empty: check data.root")
    return data


def _resized(data: DataSet, size: int) -> DataSet:
    """The data set with images of another size, such as the 64 pixels that DCGAN was made for."""
    if data.description.mixture:
        raise UserError(f"data.size: {data.description.name} is points, which have no size: remove data.size")

    def part(split: Memory | Stored) -> Memory:
        assert isinstance(split, Memory), "stored images are given their size where they are read"
        pieces = split.images.split(1000)  # antialiased scaling works on 32-bit copies
        images = [nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True) for x in pieces]
        return replace(split, images=torch.cat(images))

    description = replace(data.description, size=size)
    return replace(data, description=description, train=part(data.train), held_out=part(data.held_out))


def _describe(name: str, classes: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float],
              train: Memory | Stored, held_out: Memory | Stored) -> Description:  # fmt: skip
    return Description(name, len(mean), size, tuple(classes), tuple(mean), tuple(std), len(train), len(held_out))


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _local(options: DataOptions, root: str) -> Path:
    """The root of a data set that only a local folder can hold."""
    if "://" in root:
        raise UserError(
            f"data.root: {options.name} is read from a local folder, not from {root!r}: "
            f"copy it and set data.root or TRAINER_DATA to the folder"
        )
    return Path(root).expanduser()


def _choose(wanted: str, available: Sequence[str], name: str) -> str:
    """The split to evaluate on."""
    if wanted == "auto":
        wanted = next((split for split in ("val", "test") if split in available), "val")
    if wanted not in available:
        raise UserError(
            f"evaluate.split: {name} has no {wanted!r} split; it has: {', '.join(available)}: "
            f"add one or set evaluate.split"
        )
    return wanted


def _in_memory(options: DataOptions, split: str, splits: Mapping[str, Memory], classes: Sequence[str],
               mean: Sequence[float], std: Sequence[float]) -> DataSet:  # fmt: skip
    held_out = _choose(split, list(splits), options.name)
    train, other = splits["train"], splits[held_out]
    size = train.images.shape[-1]
    return DataSet(_describe(options.name, classes, size, mean, std, train, other), train, other, held_out)


def _digits(options: DataOptions, root: str, split: str) -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; every third one is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = torch.arange(len(labels)) % 3 == 2
    splits = {"train": Memory(images[~test], labels[~test]), "test": Memory(images[test], labels[test])}
    return _in_memory(options, split, splits, [str(i) for i in range(10)], [0.3055], [0.3763])


def _idx(options: DataOptions, root: str, split: str) -> DataSet:
    """MNIST and Fashion-MNIST in their own format, read here: importing torchvision would double the start-up time."""
    folder, classes, mean, std = {
        "mnist": ("MNIST", [str(i) for i in range(10)], 0.1307, 0.3081),
        "fashion_mnist": (
            "FashionMNIST",
            ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
            0.2860, 0.3530,
        ),
    }[options.name]  # fmt: skip
    raw = _local(options, root) / folder / "raw"
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
        splits[name] = Memory(images, labels)
    return _in_memory(options, split, splits, classes, [mean], [std])


def _points(options: DataOptions, root: str, split: str) -> DataSet:
    """Eight Gaussians on the unit circle, or 25 on a grid: 100,000 points, 2,500 held out (Lin et al. 2018)."""
    if options.name == "ring8":
        angles = [2 * math.pi * i / 8 for i in range(8)]
        mixture = Mixture(tuple((math.cos(a), math.sin(a)) for a in angles), 0.01)
    else:
        side = (-4.0, -2.0, 0.0, 2.0, 4.0)
        mixture = Mixture(tuple((x, y) for x in side for y in side), 0.05)
    centres = torch.tensor(mixture.centres)
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Memory:
        # At random: as many points for each mode would be more alike than samples are, and a floor that none can reach.
        labels = torch.randint(len(centres), (count,), generator=generator)
        points = centres[labels] + mixture.deviation * torch.randn((count, 2), generator=generator)
        return Memory((points + 1)[:, :, None, None] * 127.5, labels)  # which come to the networks as they are

    splits = {"train": part(100_000), "test": part(2500)}
    names = [f"mode {i}" for i in range(len(centres))]
    data = _in_memory(options, split, splits, names, [0.5, 0.5], [0.5, 0.5])
    return replace(data, description=replace(data.description, mixture=mixture))


def _stacked(options: DataOptions, root: str, split: str) -> DataSet:
    """Three random digits of MNIST as the colours of an image: 1,000 modes (Metz et al. 2017).

    60,000 images to train on; 26,000 of other digits are held out, as many as Srivastava et al. 2017 generate.
    """
    digits = _idx(options.model_copy(update={"name": "mnist"}), root, "test")
    generator = torch.Generator().manual_seed(0)

    def part(source: Memory, count: int) -> Memory:
        picks = torch.randint(len(source), (count, 3), generator=generator)
        labels = (source.labels[picks] * torch.tensor([100, 10, 1])).sum(1)
        return Memory(source.images[picks, 0], labels)

    assert isinstance(digits.train, Memory)
    assert isinstance(digits.held_out, Memory)
    splits = {"train": part(digits.train, 60_000), "test": part(digits.held_out, 26_000)}
    names = [f"{i:03d}" for i in range(1000)]
    return _in_memory(options, split, splits, names, [0.1307] * 3, [0.3081] * 3)


def _read_idx(path: Path, axes: int) -> Tensor:
    """The unsigned bytes of an IDX file, packed or not."""
    packed = not path.exists()
    path = path.with_name(path.name + ".gz") if packed else path
    try:
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        magic, *shape = struct.unpack(f">{axes + 1}I", data[: 4 * axes + 4])
        if magic != 0x0800 + axes or len(data) != 4 * axes + 4 + int(np.prod(shape)):
            raise ValueError("not an IDX file of this kind, or cut short")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"data.root: {path}: {error}: delete it and fetch it again") from None
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 * axes + 4).reshape(shape).copy())


def _download(options: DataOptions, root: str, kind: str, done: Callable[[], bool], files: Sequence[str]) -> None:
    """Fetch through torchvision, once per node, under a lock; else say which files to put where."""
    where = _local(options, root)
    needs = f"data.root: {options.name} is not in {str(where)!r}"
    way_out = f"put {', '.join(files)} there, or set data.root or TRAINER_DATA to where they are"
    if not options.download:
        raise UserError(f"{needs} and data.download is off: {way_out}")
    try:
        where.mkdir(parents=True, exist_ok=True)
        with FileLock(where / f".{kind}.lock"):
            if not done():
                import torchvision

                for train in (True, False):
                    getattr(torchvision.datasets, kind)(str(where), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{needs} and cannot be downloaded ({_reason(error)}): {way_out}") from None


def _cifar(options: DataOptions, root: str, split: str) -> DataSet:
    import torchvision

    kind, folder = {
        "cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python"),
    }[options.name]  # fmt: skip
    dataset = getattr(torchvision.datasets, kind)
    where = _local(options, root)
    found: dict[str, Any] = {}

    def read() -> bool:
        """Checks the MD5 of every file before unpickling it; False where one is missing or is not the original."""
        try:
            found.update((name, dataset(str(where), train=name == "train")) for name in ("train", "test"))
        except RuntimeError:
            return False
        return True

    if not read():
        _download(options, root, kind, read, [f"the original {folder}/"])
        if not found and not read():
            raise UserError(f"data.root: {where / folder} is damaged: delete it and fetch it again")
    splits = {
        name: Memory(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for name, part in found.items()
    }
    classes = found["train"].classes
    mean, std = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    }[options.name]
    return _in_memory(options, split, splits, classes, mean, std)


def _fake(options: DataOptions, root: str, split: str) -> DataSet:
    """Noise around a pattern per class, so that there is something to learn and nothing to download."""
    size, channels, classes = options.size or 32, options.channels, options.classes
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand((classes, channels, 4, 4), generator=generator)
    patterns = nn.functional.interpolate(patterns, size=(size, size)) * 160

    def part(count: int) -> Memory:
        labels = torch.randint(classes, (count,), generator=generator)
        images = torch.randint(96, (count, channels, size, size), generator=generator, dtype=torch.uint8)
        return Memory(images + patterns[labels].to(torch.uint8), labels)

    splits = {"train": part(options.samples), "test": part(max(1, options.samples // 4))}
    names = [f"class {i}" for i in range(classes)]
    return _in_memory(options, split, splits, names, [0.5] * channels, [0.25] * channels)


def decode(data: Encoded, name: str, channels: int) -> Any:
    """A PIL image in grey or colour; raises BadSample with the same words each time, so that it is counted once."""
    from PIL import Image

    if isinstance(data, Exception):
        raise BadSample(f"{name}: {_reason(data)}")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        if image.mode.startswith("I;16"):  # PIL would cut all that is above 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # PIL raises whatever its many formats raise
        raise BadSample(f"{name}: {re.sub('<_io.BytesIO object at .*>', 'of it', _reason(error))}") from None


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"data.root: {url!r}: {error}") from None
    return fs, str(path).rstrip("/")


Place = tuple[str, int | None, int | None]  # a file, or its bytes from a start up to an end
PAUSES = (0.5, 2.0, 8.0)  # seconds between attempts to read from a network, on top of what the backend tries itself
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # no attempt would change these


class Files:
    """Images in files of any fsspec URL, or in byte ranges of files."""

    def __init__(self, url: str, places: Sequence[Place], labels: Sequence[int], channels: int) -> None:
        self.url, self.places, self.channels = url, list(places), channels
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        path, start, _ = self.places[index]
        return path if start is None else f"{path} at byte {start}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        places = [self.places[index] for index in indices]
        return _read_remote(self.url, places) if "://" in self.url else [_read_local(*place) for place in places]


def _read_local(path: str, start: int | None, end: int | None) -> Encoded:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a third of the time of a Path, and called for every image
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))
    except OSError as error:
        return error


def _read_remote(url: str, places: Sequence[Place]) -> list[Encoded]:
    """All at once where the backend can. A network that fails must not look like a bad image, which is replaced."""
    # Asked for anew each time: an asynchronous file system does not survive a fork, and fsspec keeps one per process.
    fs, _ = _filesystem(url)
    found: dict[int, Encoded] = {}
    wanted = list(range(len(places)))
    for pause in (*PAUSES, None):
        paths, starts, ends = (list(column) for column in zip(*(places[i] for i in wanted), strict=True))
        found.update(zip(wanted, fs.cat_ranges(paths, starts, ends, on_error="return"), strict=True))
        wanted = [i for i in wanted if isinstance(found[i], Exception) and not isinstance(found[i], _FINAL)]
        if not wanted:
            break
        if pause is None:
            reason = _reason(found[wanted[0]])  # type: ignore[arg-type]
            raise UserError(f"data.root: {url!r} does not answer: {places[wanted[0]][0]}: {reason}")
        time.sleep(pause)
    return [found[i] for i in range(len(places))]


def _folder(options: DataOptions, root: str, split: str) -> DataSet:
    """train/CLASS/*.jpg and val/ or test/ likewise; names that begin with a dot are no part of it."""
    fs, base = _filesystem(root)
    fs.invalidate_cache()  # what another process has written since

    def names(path: str) -> list[str]:
        try:
            found = sorted(str(p).rstrip("/") for p in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may list the folder itself.
        return [p for p in found if p != path and not p.rpartition("/")[2].startswith(".")]

    splits = [n for n in ("train", "val", "test") if fs.isdir(f"{base}/{n}")]
    if "train" not in splits:
        raise UserError(
            f"data.root: no folder 'train' in {root!r}: an image folder is train/CLASS/*.jpg and val/ or test/"
        )
    held_out = _choose(split, splits, f"the folder {root!r}")
    classes: list[str] = []
    found: dict[str, Files] = {}
    for name in dict.fromkeys(("train", held_out)):
        paths, labels = [], []
        folders = {p.rpartition("/")[2]: p for p in names(f"{base}/{name}") if fs.isdir(p)}
        if name == "train":
            classes = list(folders)
        if not folders:
            raise UserError(f"data.root: {base}/{name} has no class folders: an image folder is {name}/CLASS/*.jpg")
        if unknown := sorted(set(folders) - set(classes)):
            raise UserError(f"data.root: {base}/{name}/{unknown[0]} is a class that train/ does not have")
        for label, path in folders.items():
            images = [p for p in names(path) if p.lower().endswith(SUFFIXES)]
            if not images:
                raise UserError(f"data.root: the class folder {path} has no images ({', '.join(SUFFIXES)})")
            paths += images
            labels += [classes.index(label)] * len(images)
        found[name] = Files(root, [(path, None, None) for path in paths], labels, options.channels)
    return _photographs(options, classes, found["train"], found[held_out], held_out)


def _photographs(options: DataOptions, classes: Sequence[str], train: Stored, held_out: Stored, split: str) -> DataSet:
    mean, std = IMAGENET if options.channels == 3 else ((0.449,), (0.226,))
    description = _describe(options.name, classes, options.size or 224, mean, std, train, held_out)
    return DataSet(replace(description, photographs=True), train, held_out, split)


def _imagenet(options: DataOptions, root: str, split: str) -> DataSet:
    """An image folder; torchvision unpacks the original archives where only those are there."""
    where = _local(options, root) / "imagenet"
    archives = ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]
    if not (where / "train").is_dir() or not (where / "val").is_dir():
        if not all((where / archive).exists() for archive in archives):
            raise UserError(
                f"data.root: imagenet is not in {str(where)!r}: put train/ and val/ with a folder per class there, or "
                f"the archives {', '.join(archives)}, which need an account at image-net.org"
            )
        import torchvision

        try:
            with FileLock(where / ".lock"):
                for part in ("train", "val"):
                    torchvision.datasets.ImageNet(str(where), split=part)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(f"data.root: imagenet in {str(where)!r} cannot be unpacked: {_reason(error)}") from None
    return _folder(options, str(where), split)


class Lmdb:
    """LSUN's databases: images by key, one database per class.

    None is kept open: LMDB's handles do not survive a fork, and a process may open a database only once.
    """

    def __init__(self, folders: Sequence[Path], channels: int) -> None:
        self.folders, self.channels = list(folders), channels
        self.entries: list[tuple[int, bytes]] = []
        for label in range(len(folders)):
            with self._database(label) as transaction:
                self.entries += [(label, key) for key in transaction.cursor().iternext(keys=True, values=False)]
        self.labels = torch.tensor([label for label, _ in self.entries], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.entries)

    @contextlib.contextmanager
    def _database(self, label: int) -> Iterator[Any]:
        try:
            import lmdb
        except ImportError:
            raise UserError("data.name: lsun needs another package: pip install 'trainer[lsun]'") from None
        folder = str(self.folders[label])
        try:
            environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise UserError(f"data.root: lsun: {folder} is not a database: {error}: unpack it again") from None
        with environment, environment.begin() as transaction:
            yield transaction

    def name(self, index: int) -> str:
        label, key = self.entries[index]
        return f"{self.folders[label]}:{key.decode(errors='replace')}"

    def fetch(self, indices: Sequence[int]) -> list[Encoded]:
        found: dict[int, Encoded] = {}
        by_label = sorted(set(indices), key=lambda index: self.entries[index][0])
        for label, group in itertools.groupby(by_label, key=lambda index: self.entries[index][0]):
            with self._database(label) as transaction:
                found.update((index, transaction.get(self.entries[index][1])) for index in group)
        return [found[index] for index in indices]


def _lsun(options: DataOptions, root: str, split: str) -> DataSet:
    """Every CATEGORY_train_lmdb in <root>/lsun is a class; CATEGORY_val_lmdb is held out."""
    where = _local(options, root) / "lsun"
    classes = sorted(p.name.removesuffix("_train_lmdb") for p in where.glob("*_train_lmdb")) if where.is_dir() else []
    if not classes:
        raise UserError(
            f"data.root: no lsun in {str(where)!r}: unpack CATEGORY_train_lmdb.zip and CATEGORY_val_lmdb.zip there"
        )
    held_out = _choose(split, ["train", "val"], "lsun")
    parts = {}
    for name in dict.fromkeys(("train", held_out)):
        folders = [where / f"{c}_{name}_lmdb" for c in classes]
        if absent := [str(f) for f in folders if not f.is_dir()]:
            raise UserError(f"data.root: lsun: {absent[0]} is missing: unpack it there")
        parts[name] = Lmdb(folders, options.channels)
    return _photographs(options, classes, parts["train"], parts[held_out], held_out)


def _index_shard(fs: Any, path: str) -> list[tuple[int, int, int]]:
    """(offset, length, label) of the images of a shard, from `PATH.index.json` or by reading the tar headers."""
    try:
        entries = json.loads(fs.cat_file(f"{path}.index.json"))
        return [(int(offset), int(length), int(label)) for offset, length, label in entries]
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        raise UserError(
            f"data.root: {path}.index.json: no list of [offset, length, label]: {_reason(error)}: repair or delete it"
        ) from None
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if f".{suffix.lower()}" in SUFFIXES:
                    images[f"{folder}/{key}"] = (member.offset_data, member.size)
                elif suffix == "cls":
                    content = tar.extractfile(member)
                    labels[f"{folder}/{key}"] = int(content.read()) if content else -1
            file.seek(tar.offset)  # tarfile takes a damaged header, and a cut between two files, for the end
            if (end := file.read(512)) != bytes(512):
                raise ValueError(f"{'damaged' if end else 'cut short'} at byte {tar.offset}")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"data.root: {path}: not a shard of KEY.jpg and KEY.cls: {error}") from None
    if unlabelled := sorted(set(images) - set(labels)):
        raise UserError(f"data.root: {path}: {unlabelled[0].strip('/')} has an image and no .cls")
    return [(*images[key], labels[key]) for key in images]


def _shards(options: DataOptions, root: str, split: str) -> DataSet:
    """Tar files in the WebDataset layout (KEY.jpg and KEY.cls next to each other) in <root>/train and val/ or test/.

    An index of offsets makes the samples addressable, so that they are shuffled and resumed exactly. Class names come
    from <root>/classes.txt where there is one.
    """
    fs, base = _filesystem(root)
    fs.invalidate_cache()
    tars: dict[str, list[str]] = {}
    for name in ("train", "val", "test"):
        tars[name] = sorted(str(p) for p in fs.glob(f"{base}/{name}/*.tar"))
    if not tars["train"]:
        raise UserError(f"data.root: no train/*.tar in {root!r}: shards are train/*.tar and val/*.tar or test/*.tar")
    held_out = _choose(split, [n for n, paths in tars.items() if paths], f"the shards in {root!r}")
    parts = {}
    for name in dict.fromkeys(("train", held_out)):
        entries = [(path, *entry) for path in tars[name] for entry in _index_shard(fs, path)]
        if wrong := [path for path, _, _, label in entries if label < 0]:
            raise UserError(f"data.root: {wrong[0]}: has a label below 0")
        places = [(path, offset, offset + length) for path, offset, length, _ in entries]
        parts[name] = Files(root, places, [label for *_, label in entries], options.channels)
    count = max((int(part.labels.max()) + 1 for part in parts.values() if len(part)), default=0)
    classes = [str(i) for i in range(count)]
    if fs.exists(f"{base}/classes.txt"):
        classes = fs.cat_file(f"{base}/classes.txt").decode().split("\n")
        classes = [c.strip() for c in classes if c.strip()]
        if len(classes) < count:
            raise UserError(f"data.root: classes.txt names {len(classes)} classes but labels go up to {count - 1}")
    return _photographs(options, classes, parts["train"], parts[held_out], held_out)
