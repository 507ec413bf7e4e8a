"""Pairs of images in files: side by side in one, or in two folders under equal names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config.options import DataOptions, UserError
from .dataset import DataSet, Encoded, Stored, choose_split, describe, filesystem
from .decoding import SUFFIXES, BadSample, decode
from .stored import Files, names_in

FIELDS = ("image", "input")  # what is to be made, and what it is made of
SIZE = 256  # pixels, as in the paper


class SideBySide(Files):
    """Files that hold two images beside each other: A on the left, B on the right."""

    image_fields: tuple[str, ...] = FIELDS

    def __init__(self, url: str, paths: Sequence[str], options: DataOptions) -> None:
        super().__init__(url, [(path, None, None) for path in paths], [0] * len(paths), options.channels)
        self.left = "input" if options.direction == "AtoB" else "image"
        self.background = options.background
        self._kept: dict[tuple[int, str], Encoded] = {}  # halves whose other half alone was asked for so far

    def fetch(self, indices: Sequence[int], field: str = "image") -> list[Encoded]:
        halves = {i: self._kept.pop((i, field), None) for i in set(indices)}
        missing = [i for i, half in halves.items() if half is None]
        for i, data in zip(missing, super().fetch(missing) if missing else [], strict=True):
            left, right = self._cut(data, self.name(i))
            own, other = (left, right) if field == self.left else (right, left)
            halves[i] = own
            self._kept[i, FIELDS[field == "image"]] = other
        return [halves[i] for i in indices]

    def _cut(self, data: Encoded, name: str) -> tuple[Encoded, Encoded]:
        try:
            image = decode(data, name, self.channels, self.background)
            width, height = image.size
            if width % 2:
                raise BadSample(f"{name}: its width of {width} pixels is odd, so it is no two images side by side")
            if width <= height:
                raise BadSample(f"{name}: of {width}x{height} pixels is no two images side by side")
        except BadSample as error:
            return error, error
        return image.crop((0, 0, width // 2, height)), image.crop((width // 2, 0, width, height))


class TwoFolders:
    """Images of two folders, in one order."""

    image_fields: tuple[str, ...] = FIELDS

    def __init__(self, files: dict[str, Files]) -> None:
        self.files, self.channels = files, files["image"].channels
        self.labels = files["image"].labels

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return " or ".join(files.name(index) for files in self.files.values())

    def fetch(self, indices: Sequence[int], field: str) -> list[Encoded]:
        return self.files[field].fetch(indices)


def pairs(options: DataOptions, root: str, split: str) -> DataSet:
    """Pairs in <root>, A and B, in one of the layouts in which such sets are published:

    train/*.jpg and val/ or test/: A and B side by side in each image;
    train/A/NAME.jpg and train/B/NAME.png, or A/train/NAME.jpg and B/train/NAME.png: in two folders.
    """
    fs, base = filesystem(root)
    fs.invalidate_cache()
    by_side = all(fs.isdir(f"{base}/{side}") for side in "AB")
    outer = f"{base}/A" if by_side else base
    splits = [name for name in ("train", "val", "test") if fs.isdir(f"{outer}/{name}")]
    if "train" not in splits:
        raise UserError(
            f"data.root: no folder 'train' in {root!r}: pairs are train/*.jpg, each with two images side by side, "
            f"train/A/NAME.jpg and train/B/NAME.jpg, or A/train/NAME.jpg and B/train/NAME.jpg; and val/ or test/ alike"
        )
    held_out = choose_split(split, splits, f"the pairs in {root!r}")
    parts: dict[str, Stored] = {}
    for name in dict.fromkeys(("train", held_out)):
        sides = {side: f"{base}/{side}/{name}" if by_side else f"{base}/{name}/{side}" for side in "AB"}
        two = by_side or any(fs.isdir(path) for path in sides.values())
        parts[name] = _two_folders(fs, options, root, sides) if two else _side_by_side(fs, options, root, name)
    size, grey = options.size or SIZE, [0.5] * options.channels
    description = describe(options.name, ["pair"], size, grey, grey, parts["train"], parts[held_out], paired=True)
    return DataSet(description, parts["train"], parts[held_out], held_out)


def _images(fs: Any, path: str) -> list[str]:
    return [p for p in names_in(fs, path) if p.lower().endswith(SUFFIXES)]


def _side_by_side(fs: Any, options: DataOptions, root: str, split: str) -> SideBySide:
    folder = f"{filesystem(root)[1]}/{split}"
    paths = _images(fs, folder)
    if not paths:
        inside = [p.rpartition("/")[2] for p in names_in(fs, folder)]
        there = f"; it has {', '.join(inside[:3])}" if inside else ""
        raise UserError(
            f"data.root: {folder} has neither images of two side by side nor folders A and B{there}: for a set "
            f"without pairs use data.name folder and workload.pairs edges, grey or low_resolution"
        )
    files = SideBySide(root, paths, options)
    first = files.fetch([0])[0]  # a whole set of other images shall not be found out at the first step
    if isinstance(first, BadSample) and not options.bad_images:
        raise UserError(f"data.root: {first}")
    return files


def _two_folders(fs: Any, options: DataOptions, root: str, sides: dict[str, str]) -> TwoFolders:
    found: dict[str, dict[str, str]] = {}
    for side, folder in sides.items():
        found[side] = {}
        for path in _images(fs, folder):
            stem = path.rpartition("/")[2].rpartition(".")[0]
            if stem in found[side]:
                raise UserError(f"data.root: {found[side][stem]} and {path} have one name: which is of the pair?")
            found[side][stem] = path
        if not found[side]:
            raise UserError(
                f"data.root: {folder} has no images ({', '.join(SUFFIXES)}): A and B need one each per pair"
            )
    a, b = found["A"], found["B"]
    if alone := sorted(a.keys() ^ b.keys()):
        path = a.get(alone[0]) or b[alone[0]]
        more = f" and {len(alone) - 1} more have none" if len(alone) > 1 else ""
        other = sides["B" if alone[0] in a else "A"]
        raise UserError(
            f"data.root: {path} has no partner of its name in {other}{more} ({len(a)} in A, {len(b)} in B): add "
            "or remove images until the names are the same"
        )
    stems = sorted(a)
    images, inputs = (b, a) if options.direction == "AtoB" else (a, b)
    return TwoFolders(
        {
            field: Files(root, [(paths[stem], None, None) for stem in stems], [0] * len(stems), options.channels)
            for field, paths in zip(FIELDS, (images, inputs), strict=True)
        }
    )
