"""Data sets whose images stay where they are and are read by id, in loader workers: folders, shards, LMDB."""

from __future__ import annotations

import contextlib
import itertools
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..config.options import DataOptions, UserError
from .dataset import DataSet, Encoded, Stored, choose_split, describe, filesystem, local_root, reason_of
from .decoding import SUFFIXES

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def names_in(fs: Any, path: str) -> list[str]:
    """What a folder holds, in order; nothing where there is none. Names that begin with a dot are ignored."""
    try:
        paths = sorted(str(p).rstrip("/") for p in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    # An object store may list the folder itself.
    return [p for p in paths if p != path and not p.rpartition("/")[2].startswith(".")]


Location = tuple[str, int | None, int | None]  # a file, or its bytes from a start up to an end
PAUSES = (0.5, 2.0, 8.0)  # seconds between attempts to read from a network, in addition to the backend's own retries
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)  # retries are useless


class Files:
    """Images in files of any fsspec URL, or in byte ranges of files."""

    image_fields: tuple[str, ...] = ("image",)

    def __init__(self, url: str, locations: Sequence[Location], labels: Sequence[int], channels: int) -> None:
        self.url, self.locations, self.channels = url, list(locations), channels
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.locations)

    def name(self, index: int) -> str:
        path, start, _ = self.locations[index]
        return path if start is None else f"{path} at byte {start}"

    def fetch(self, indices: Sequence[int], field: str = "image") -> list[Encoded]:
        locations = [self.locations[index] for index in indices]
        return (
            _read_remote(self.url, locations)
            if "://" in self.url
            else [_read_local(*location) for location in locations]
        )


def _read_local(path: str, start: int | None, end: int | None) -> Encoded:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a third of the time of a Path, and called for every image
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))
    except OSError as error:
        return error


def _read_remote(url: str, locations: Sequence[Location]) -> list[Encoded]:
    """All at once where the backend can. A network that fails must not look like a bad image, which is replaced."""
    # Not kept between calls: an asynchronous file system does not survive a fork, and fsspec caches one per process.
    fs, _ = filesystem(url)
    results: dict[int, Encoded] = {}
    pending = list(range(len(locations)))
    for pause in (*PAUSES, None):
        paths, starts, ends = (list(column) for column in zip(*(locations[i] for i in pending), strict=True))
        results.update(zip(pending, fs.cat_ranges(paths, starts, ends, on_error="return"), strict=True))
        pending = [i for i in pending if isinstance(results[i], Exception) and not isinstance(results[i], _PERMANENT)]
        if not pending:
            break
        if pause is None:
            reason = reason_of(results[pending[0]])
            raise UserError(f"data.root: {url!r} does not answer: {locations[pending[0]][0]}: {reason}")
        time.sleep(pause)
    return [results[i] for i in range(len(locations))]


def folder(options: DataOptions, root: str, split: str) -> DataSet:
    """train/CLASS/*.jpg and val/ or test/ in the same layout; names that begin with a dot are ignored.

    Also the layout in which two domains are published, trainA/*.jpg, trainB/*.jpg, testA/ and testB/: classes A and B.
    """
    fs, base = filesystem(root)
    fs.invalidate_cache()  # another process may have written since

    def class_folders(split: str) -> dict[str, str]:
        inside = {p.rpartition("/")[2]: p for p in names_in(fs, f"{base}/{split}") if fs.isdir(p)}
        return inside or {letter: f"{base}/{split}{letter}" for letter in "AB" if fs.isdir(f"{base}/{split}{letter}")}

    splits = [n for n in ("train", "val", "test") if fs.isdir(f"{base}/{n}") or fs.isdir(f"{base}/{n}A")]
    if "train" not in splits:
        raise UserError(
            f"data.root: no folder 'train' in {root!r}: an image folder is train/CLASS/*.jpg and val/ or test/, or "
            f"trainA/*.jpg, trainB/, testA/ and testB/"
        )
    held_out = choose_split(split, splits, f"the folder {root!r}")
    classes: list[str] = []
    parts: dict[str, Files] = {}
    for name in dict.fromkeys(("train", held_out)):
        paths, labels = [], []
        folders = class_folders(name)
        if name == "train":
            classes = list(folders)
        if not folders:
            raise UserError(f"data.root: {base}/{name} has no class folders: an image folder is {name}/CLASS/*.jpg")
        if unknown := sorted(set(folders) - set(classes)):
            raise UserError(f"data.root: {folders[unknown[0]]} is a class that train/ does not have")
        for label, path in folders.items():
            images = [p for p in names_in(fs, path) if p.lower().endswith(SUFFIXES)]
            if not images:
                raise UserError(f"data.root: the class folder {path} has no images ({', '.join(SUFFIXES)})")
            paths += images
            labels += [classes.index(label)] * len(images)
        parts[name] = Files(root, [(path, None, None) for path in paths], labels, options.channels)
    return _stored_data_set(options, classes, parts["train"], parts[held_out], held_out)


def _stored_data_set(
    options: DataOptions, classes: Sequence[str], train: Stored, held_out: Stored, split: str
) -> DataSet:
    mean, std = IMAGENET if options.channels == 3 else ((0.449,), (0.226,))
    description = describe(options.name, classes, options.size or 224, mean, std, train, held_out)
    return DataSet(replace(description, variable_size=True), train, held_out, split)


def imagenet(options: DataOptions, root: str, split: str) -> DataSet:
    """An image folder; torchvision unpacks the original archives where only those are there."""
    path = local_root(options, root) / "imagenet"
    archives = ["ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]
    if not (path / "train").is_dir() or not (path / "val").is_dir():
        if not all((path / archive).exists() for archive in archives):
            raise UserError(
                f"data.root: imagenet is not in {str(path)!r}: put train/ and val/ with a folder per class there, or "
                f"the archives {', '.join(archives)}, which need an account at image-net.org"
            )
        import torchvision

        try:
            with FileLock(path / ".lock"):
                for part in ("train", "val"):
                    torchvision.datasets.ImageNet(str(path), split=part)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(f"data.root: imagenet in {str(path)!r} cannot be unpacked: {reason_of(error)}") from None
    return folder(options, str(path), split)


class Lmdb:
    """LSUN's databases: images by key, one database per class.

    None is kept open: LMDB's handles do not survive a fork, and a process may open a database only once.
    """

    image_fields: tuple[str, ...] = ("image",)

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

    def fetch(self, indices: Sequence[int], field: str = "image") -> list[Encoded]:
        images: dict[int, Encoded] = {}
        by_label = sorted(set(indices), key=lambda index: self.entries[index][0])
        for label, group in itertools.groupby(by_label, key=lambda index: self.entries[index][0]):
            with self._database(label) as transaction:
                images.update((index, transaction.get(self.entries[index][1])) for index in group)
        return [images[index] for index in indices]


def lsun(options: DataOptions, root: str, split: str) -> DataSet:
    """Every CATEGORY_train_lmdb in <root>/lsun is a class; CATEGORY_val_lmdb is held out."""
    path = local_root(options, root) / "lsun"
    classes = sorted(p.name.removesuffix("_train_lmdb") for p in path.glob("*_train_lmdb")) if path.is_dir() else []
    if not classes:
        raise UserError(
            f"data.root: no lsun in {str(path)!r}: unpack CATEGORY_train_lmdb.zip and CATEGORY_val_lmdb.zip there"
        )
    held_out = choose_split(split, ["train", "val"], "lsun")
    parts = {}
    for name in dict.fromkeys(("train", held_out)):
        folders = [path / f"{c}_{name}_lmdb" for c in classes]
        if missing := [str(f) for f in folders if not f.is_dir()]:
            raise UserError(f"data.root: lsun: {missing[0]} is missing: unpack it there")
        parts[name] = Lmdb(folders, options.channels)
    return _stored_data_set(options, classes, parts["train"], parts[held_out], held_out)


def _index_shard(fs: Any, path: str) -> list[tuple[int, int, int]]:
    """(offset, length, label) of the images of a shard, from `PATH.index.json` or by reading the tar headers."""
    try:
        entries = json.loads(fs.cat_file(f"{path}.index.json"))
        return [(int(offset), int(length), int(label)) for offset, length, label in entries]
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        raise UserError(
            f"data.root: {path}.index.json: no list of [offset, length, label]: {reason_of(error)}: repair or delete it"
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
            file.seek(tar.offset)  # tarfile takes a corrupt header, and a cut between two files, for the end
            if (end := file.read(512)) != bytes(512):
                raise ValueError(f"{'corrupt' if end else 'cut short'} at byte {tar.offset}")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"data.root: {path}: not a shard of KEY.jpg and KEY.cls: {error}") from None
    if unlabelled := sorted(set(images) - set(labels)):
        raise UserError(f"data.root: {path}: {unlabelled[0].strip('/')} has an image and no .cls")
    return [(*images[key], labels[key]) for key in images]


def shards(options: DataOptions, root: str, split: str) -> DataSet:
    """Tar files in the WebDataset layout (KEY.jpg and KEY.cls next to each other) in <root>/train and val/ or test/.

    An index of offsets makes the samples addressable, so that they are shuffled and resumed exactly. Class names come
    from <root>/classes.txt where there is one.
    """
    fs, base = filesystem(root)
    fs.invalidate_cache()
    tars: dict[str, list[str]] = {}
    for name in ("train", "val", "test"):
        tars[name] = sorted(str(p) for p in fs.glob(f"{base}/{name}/*.tar"))
    if not tars["train"]:
        raise UserError(f"data.root: no train/*.tar in {root!r}: shards are train/*.tar and val/*.tar or test/*.tar")
    held_out = choose_split(split, [n for n, paths in tars.items() if paths], f"the shards in {root!r}")
    parts = {}
    for name in dict.fromkeys(("train", held_out)):
        entries = [(path, *entry) for path in tars[name] for entry in _index_shard(fs, path)]
        if invalid := [path for path, _, _, label in entries if label < 0]:
            raise UserError(f"data.root: {invalid[0]}: has a label below 0")
        locations = [(path, offset, offset + length) for path, offset, length, _ in entries]
        parts[name] = Files(root, locations, [label for *_, label in entries], options.channels)
    count = max((int(part.labels.max()) + 1 for part in parts.values() if len(part)), default=0)
    classes = [str(i) for i in range(count)]
    if fs.exists(f"{base}/classes.txt"):
        classes = fs.cat_file(f"{base}/classes.txt").decode().split("\n")
        classes = [c.strip() for c in classes if c.strip()]
        if len(classes) < count:
            raise UserError(f"data.root: classes.txt names {len(classes)} classes but labels go up to {count - 1}")
    return _stored_data_set(options, classes, parts["train"], parts[held_out], held_out)
