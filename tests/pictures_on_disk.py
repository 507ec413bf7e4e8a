"""Small image folders and image files for the tests of the data sets and the loader."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from PIL import Image


def picture(seed: int, width: int = 12, height: int = 10, channels: int = 3) -> Image.Image:
    shape = (height, width, 3) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png(seed: int, width: int = 12, height: int = 10, channels: int = 3) -> bytes:
    return encoded(picture(seed, width, height, channels))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_images() -> dict[str, bytes]:
    """What may lie in a folder in place of an image."""
    whole = png(0, 64, 64)
    return {
        "corrupt.png": whole[:60] + bytes(40) + whole[100:],
        "truncated.jpg": encoded(picture(0, 64, 64), "jpeg")[:900],
        "zero.png": b"",
        "text.jpg": b"this is no image",
        "bomb.png": bomb(),
    }


def write(root: str, files: Mapping[str, bytes]) -> str:
    """Put files below a folder or URL; returns it."""
    fs, base = fsspec.core.url_to_fs(root)
    for name, data in files.items():
        path = f"{base}/{name}"
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, data)
    return root


def folder(root: str, per_class: Mapping[str, int], classes: Sequence[str] = ("cat", "dog"), channels: int = 3) -> str:
    """An image folder: `per_class` says how many images each split has of each class."""
    names = [f"{split}/{c}/{i:03}.png" for split, count in per_class.items() for c in classes for i in range(count)]
    sizes = [(9 + seed % 5, 8 + seed % 7) for seed in range(len(names))]
    files = {
        name: png(seed, *size, channels) for seed, (name, size) in enumerate(zip(names, sizes, strict=True))
    }  # fmt: skip
    return write(root, files)


def tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def shard(seeds: Sequence[int], classes: int = 2, prefix: str = "") -> dict[str, bytes]:
    """The files of a shard in the WebDataset layout."""
    files = {}
    for seed in seeds:
        files |= {f"{prefix}{seed:04}.png": png(seed), f"{prefix}{seed:04}.cls": str(seed % classes).encode()}
    return files


def index(archive: bytes) -> bytes:
    """The index of a shard, by hand: offset, length and label of every image."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        members: dict[str, Any] = {member.name: member for member in opened}
        images = [m for name, m in members.items() if name.endswith(".png")]
        labels = [opened.extractfile(members[m.name[:-3] + "cls"]).read() for m in images]  # type: ignore[union-attr]
    return json.dumps([[m.offset_data, m.size, int(label)] for m, label in zip(images, labels, strict=True)]).encode()
