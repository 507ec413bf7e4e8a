"""Data sets: what they hold, and the one line that a user gets where something is missing or corrupt."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import lmdb
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from trainer.config.options import DataOptions, UserError
from trainer.data.dataset import DataSet, Memory, subsample
from trainer.data.decoding import BadSample, decode
from trainer.data.sources import open_data
from trainer.data.stored import Files

from .. import pictures_on_disk as disk


def options(name: str, **settings: Any) -> DataOptions:
    return DataOptions(name=name, **{"download": False, **settings})


def complaint(name: str, root: object, split: str = "auto", **settings: Any) -> str:
    """The error that a user gets, which is one line."""
    with pytest.raises(UserError) as caught:
        open_data(options(name, **settings), str(root), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(data: DataSet, index: int, held_out: bool = False) -> np.ndarray:
    """An image of a stored split as it was written."""
    split = data.held_out if held_out else data.train
    assert not isinstance(split, Memory)
    return np.asarray(decode(split.fetch([index], "image")[0], split.name(index), split.channels))


@pytest.fixture
def in_memory() -> Iterator[str]:
    yield "memory://pictures"
    fs = fsspec.filesystem("memory")
    if fs.exists("/pictures"):
        fs.rm("/pictures", recursive=True)


@pytest.fixture
def on_s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://warm-up/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}/pictures"


@pytest.fixture(params=["file", "memory", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on disk, in memory or on a real S3 server."""
    if request.param == "file":
        return str(tmp_path / "pictures")
    return str(request.getfixturevalue({"memory": "in_memory", "s3": "on_s3"}[request.param]))


# The small sets.


def test_digits_are_split_two_to_one_and_fill_the_range_of_a_byte() -> None:
    data = open_data(options("digits"), "/nowhere", "auto")
    assert isinstance(data.train, Memory)
    assert isinstance(data.held_out, Memory)
    assert data.train["image"].shape == (1198, 1, 8, 8)
    assert data.held_out["image"].shape == (599, 1, 8, 8)
    assert data.train["image"].dtype == torch.uint8
    assert (data.train["image"].min(), data.train["image"].max()) == (0, 255)
    assert data.split == "test"
    assert data.description.classes == tuple("0123456789")
    assert (data.description.train_size, data.description.eval_size) == (1198, 599)
    every = torch.cat([data.train["image"], data.held_out["image"]]).double() / 255
    assert data.description.mean == pytest.approx([float(every.mean())], abs=1e-3)
    assert data.description.std == pytest.approx([float(every.std())], abs=1e-3)


def test_fake_data_is_the_same_every_time_and_can_be_learned() -> None:
    settings = {"size": 8, "samples": 400, "classes": 4, "channels": 1}
    data, again = (open_data(options("fake", **settings), "/nowhere", "auto") for _ in range(2))
    assert isinstance(data.train, Memory)
    assert isinstance(again.train, Memory)
    assert data.train["image"].equal(again.train["image"])
    assert data.train["label"].equal(again.train["label"])
    assert data.train["image"].shape == (400, 1, 8, 8)
    assert (len(data.held_out), data.description.classes) == (100, ("class 0", "class 1", "class 2", "class 3"))
    centres = torch.stack([data.train["image"][data.train["label"] == c].double().mean(0) for c in range(4)])
    distances = torch.cdist(data.held_out["image"].double().flatten(1), centres.flatten(1))  # type: ignore[union-attr]
    assert distances.argmin(1).equal(data.held_out["label"])


def test_the_split_to_evaluate_can_be_chosen_and_a_missing_one_is_named() -> None:
    trained = open_data(options("digits"), "", "train")
    assert (trained.split, len(trained.held_out)) == ("train", 1198)
    message = complaint("digits", "", split="val")
    assert message == "evaluate.split: digits has no 'val' split; it has: train, test: add one or set evaluate.split"


def test_images_are_scaled_to_the_size_that_is_asked_for() -> None:
    plain, large = (open_data(options("digits", size=size), "", "auto") for size in (8, 32))
    assert (plain.description.size, large.description.size) == (8, 32)
    assert isinstance(large.train, Memory)
    assert isinstance(plain.train, Memory)
    assert (large.train["image"].shape, large.train["image"].dtype) == ((1198, 1, 32, 32), torch.uint8)
    assert large.train["label"].equal(plain.train["label"])
    for small, image in zip(plain.train["image"][:20, 0], large.train["image"][:20, 0], strict=True):
        expected = Image.fromarray(small.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.abs(image.numpy().astype(int) - np.asarray(expected)).max() <= 1
    assert large.held_out["image"].shape == (599, 1, 32, 32)  # type: ignore[union-attr]


def test_points_have_no_size() -> None:
    assert complaint("ring8", "", size=8) == "data.size: ring8 is points, which have no size: remove data.size"


# MNIST and Fashion-MNIST.


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def idx_files(folder: str = "MNIST", train: int = 7, test: int = 3) -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        files[f"{folder}/raw/{part}-images-idx3-ubyte"] = idx(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{folder}/raw/{part}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8))
    return files


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_and_unpacked(tmp_path: Path, name: str, folder: str, packed: bool) -> None:
    files = idx_files(folder)
    stored = {f"{n}.gz": gzip.compress(b) for n, b in files.items()} if packed else files
    data = open_data(options(name), disk.write(str(tmp_path), stored), "auto")
    assert isinstance(data.train, Memory)
    written = np.frombuffer(files[f"{folder}/raw/train-images-idx3-ubyte"][16:], np.uint8).reshape(7, 1, 28, 28)
    assert data.train["image"].tolist() == written.tolist()
    assert data.train["label"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert data.train["label"].dtype == torch.int64
    assert (len(data.held_out), data.split, data.description.shape) == (3, "test", (1, 28, 28))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_files_have_the_sizes_and_the_moments_that_are_published(real_data: str, name: str) -> None:
    data = open_data(options(name), real_data, "auto")
    assert isinstance(data.train, Memory)
    assert data.train["image"].shape == (60000, 1, 28, 28)
    assert len(data.held_out) == 10000
    assert torch.bincount(data.held_out["label"]).tolist() == (
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if name == "mnist" else [1000] * 10
    )
    values = data.train["image"][:, 0].float() / 255
    assert data.description.mean == pytest.approx([float(values.mean())], abs=5e-4)
    assert data.description.std == pytest.approx([float(values.std())], abs=5e-4)


IMAGES = "MNIST/raw/train-images-idx3-ubyte"
LABELS = "MNIST/raw/train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("damage", "named", "reason"),
    [
        (lambda f: {IMAGES: f[IMAGES][:-1]}, IMAGES, "not an IDX file of this kind, or cut short"),
        (lambda f: {IMAGES: f[IMAGES][:9]}, IMAGES, "unpack requires"),
        (lambda f: {IMAGES: b""}, IMAGES, "unpack requires"),
        (lambda f: {IMAGES: f[LABELS]}, IMAGES, "unpack requires"),
        (lambda f: {LABELS: f[IMAGES]}, LABELS, "not an IDX file of this kind"),
        (lambda f: {IMAGES: None, f"{IMAGES}.gz": gzip.compress(f[IMAGES])[:-20]}, f"{IMAGES}.gz", "end-of-stream"),
        (lambda f: {IMAGES: None, f"{IMAGES}.gz": b"no gzip at all"}, f"{IMAGES}.gz", "Not a gzipped file"),
        (lambda f: {IMAGES: None, f"{IMAGES}.gz": _scratched(f[IMAGES])}, f"{IMAGES}.gz", "invalid block type"),
        (lambda f: {LABELS: idx(np.arange(6, dtype=np.uint8))}, "MNIST/raw", "7 train images but 6 labels"),
        (lambda f: {LABELS: idx(np.arange(4, 11, dtype=np.uint8))}, "MNIST/raw", "train has label 10"),
    ],
    ids=["cut", "cut header", "empty", "labels as images", "images as labels", "cut gzip", "text", "scratched gzip",
         "fewer labels", "label 10"],
)  # fmt: skip
def test_corrupt_idx_files_are_named(
    tmp_path: Path, damage: Callable[[dict[str, bytes]], dict[str, bytes | None]], named: str, reason: str
) -> None:
    files = idx_files()
    changed = {**files, **damage(files)}
    message = complaint("mnist", disk.write(str(tmp_path), {n: b for n, b in changed.items() if b is not None}))
    assert message.startswith(f"data.root: {tmp_path / named}: ")
    assert reason in message


def _scratched(data: bytes) -> bytes:
    packed = bytearray(gzip.compress(data))
    packed[10:20] = b"\xff" * 10
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "file"),
    [("mnist", "MNIST/raw/t10k-labels-idx1-ubyte[.gz]"),
     ("fashion_mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte[.gz]"),
     ("cifar10", "cifar-10-batches-py/"), ("cifar100", "cifar-100-python/")],
)  # fmt: skip
@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_named_with_the_place_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, download: bool
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: no network
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    message = complaint(name, tmp_path / "data", download=download)
    assert message.startswith(f"data.root: {name} is not in '{tmp_path}/data' and ")
    assert ("cannot be downloaded (" if download else "data.download is off: ") in message
    assert file in message
    assert message.endswith(" there, or set data.root or TRAINER_DATA to where they are")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "lsun", "imagenet"])
def test_a_url_is_refused_where_only_a_folder_will_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = complaint(name, "s3://bucket/data", download=True)
    assert message.startswith(f"data.root: {name} is read from a local folder, not from 's3://bucket/data'")
    assert list(tmp_path.iterdir()) == []


# CIFAR.


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> np.ndarray:
    """The original layout with made-up images and, as torchvision checks them, made-up sums; returns the images."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    images = []

    def dump(file: str, content: object) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(kind, attribute):
            rows = random.integers(0, 256, (2, 3072), dtype=np.uint8)
            images.append(rows.reshape(2, 3, 32, 32))
            sums.append([file, dump(file, {"data": rows, "labels" if name == "cifar10" else "fine_labels": [3, 1]})])
        monkeypatch.setattr(kind, attribute, sums)
    classes = [f"name {i}" for i in range(10 if name == "cifar10" else 100)]
    meta = {**kind.meta, "md5": dump(kind.meta["filename"], {kind.meta["key"]: classes})}
    monkeypatch.setattr(kind, "meta", meta)
    return np.concatenate(images)


@pytest.mark.parametrize(("name", "training"), [("cifar10", 10), ("cifar100", 2)])
def test_cifar_is_read_in_its_original_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, training: int
) -> None:
    written = cifar(tmp_path, monkeypatch, name)
    data = open_data(options(name), str(tmp_path), "auto")
    assert isinstance(data.train, Memory)
    assert isinstance(data.held_out, Memory)
    assert torch.cat([data.train["image"], data.held_out["image"]]).numpy().tolist() == written.tolist()
    assert data.train["label"].tolist() == [3, 1] * (training // 2)
    assert (len(data.train), len(data.held_out), data.split) == (training, 2, "test")
    assert data.description.classes[1] == "name 1"


def test_a_cifar_file_that_is_not_the_original_is_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar(tmp_path, monkeypatch, "cifar10")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "was here",)

    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Evil()))
    assert complaint("cifar10", tmp_path).startswith("data.root: cifar10 is not in")
    assert not (tmp_path / "was here").exists()


# Image folders.


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_folder_is_read_from_anywhere(anywhere: str, channels: int) -> None:
    disk.folder(anywhere, {"train": 3, "val": 2, "test": 1}, channels=channels)
    data = open_data(options("folder", channels=channels, size=8), anywhere, "auto")
    assert (len(data.train), len(data.held_out), data.split) == (6, 4, "val")
    assert data.description.classes == ("cat", "dog")
    assert data.description.shape == (channels, 8, 8)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.held_out.labels.tolist() == [0, 0, 1, 1]
    names = [data.train.name(i).partition("pictures/")[2] for i in range(6)]  # type: ignore[union-attr]
    assert names == [f"train/{c}/{i:03}.png" for c in ("cat", "dog") for i in range(3)]
    for index in range(6):
        width, height = 9 + index % 5, 8 + index % 7
        assert pixels(data, index).tolist() == np.asarray(disk.picture(index, width, height, channels)).tolist()


@pytest.mark.parametrize(
    ("per_class", "split", "chosen"),
    [({"train": 2, "test": 1}, "auto", "test"), ({"train": 2, "val": 1, "test": 1}, "test", "test"),
     ({"train": 2, "val": 1}, "train", "train")],
)  # fmt: skip
def test_the_split_of_a_folder_can_be_chosen(
    tmp_path: Path, per_class: dict[str, int], split: str, chosen: str
) -> None:
    data = open_data(options("folder"), disk.folder(str(tmp_path), per_class), split)
    assert (data.split, len(data.held_out)) == (chosen, 2 * per_class[chosen])


def test_a_split_that_a_folder_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    root = disk.folder(str(tmp_path), {"train": 1, "test": 1})
    assert "has no 'val' split; it has: train, test: add one" in complaint("folder", root, split="val")
    only = disk.folder(str(tmp_path / "only"), {"train": 1})
    assert "has no 'val' split; it has: train: add one or set evaluate.split" in complaint("folder", only)


def test_a_folder_that_cannot_be_used_is_described(anywhere: str) -> None:
    assert f"no folder 'train' in {anywhere!r}" in complaint("folder", anywhere)
    disk.write(anywhere, {"val/cat/0.png": disk.png(0)})
    assert f"no folder 'train' in {anywhere!r}" in complaint("folder", anywhere)
    disk.write(anywhere, {"train/loose.png": disk.png(0)})
    assert "pictures/train has no class folders" in complaint("folder", anywhere)
    disk.write(anywhere, {"train/cat/0.png": disk.png(0), "train/dog/notes.txt": b"no image"})
    assert "the class folder" in complaint("folder", anywhere)
    assert "pictures/train/dog has no images (.jpg, .jpeg, .jfif" in complaint("folder", anywhere)
    disk.write(anywhere, {"train/dog/0.JPG": disk.png(1), "val/fox/0.png": disk.png(2)})
    assert "pictures/val/fox is a class that train/ does not have" in complaint("folder", anywhere)
    disk.write(anywhere, {"train/fox/0.png": disk.png(3)})  # what is written later is read
    assert open_data(options("folder"), anywhere, "auto").description.classes == ("cat", "dog", "fox")


def test_hidden_files_and_folders_are_no_part_of_the_data(tmp_path: Path) -> None:
    root = disk.folder(str(tmp_path), {"train": 1, "val": 1})
    disk.write(root, {"train/.ipynb_checkpoints/x.png": b"", "train/cat/._000.png": b""})
    data = open_data(options("folder"), root, "auto")
    assert (data.description.classes, len(data.train)) == (("cat", "dog"), 2)


def test_storage_that_does_not_answer_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint("folder", "nonsense://x") == "data.root: 'nonsense://x': Protocol not known: nonsense"

    def unplugged(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "isdir", unplugged)
    assert complaint("folder", "memory://x") == "data.root: 'memory://x' cannot be read: no route"


def test_a_network_that_comes_back_is_waited_for_and_one_that_does_not_stops_the_run(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(options("folder"), disk.folder(in_memory, {"train": 2, "val": 1}), "auto")
    assert isinstance(data.train, Files)
    waits: list[float] = []
    monkeypatch.setattr("trainer.data.stored.time.sleep", waits.append)
    read, failures = type(fsspec.filesystem("memory")).cat_file, [2]

    def flaky(self: Any, path: str, *rest: Any, **settings: Any) -> bytes:
        if "dog/001" in path and failures[0]:
            failures[0] -= 1
            raise ConnectionResetError("reset by peer")
        return bytes(read(self, path, *rest, **settings))

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", flaky)
    assert all(isinstance(answer, bytes) for answer in data.train.fetch([0, 3, 1], "image"))
    assert waits == [0.5, 2.0]
    failures[0] = 100
    with pytest.raises(
        UserError, match=r"^data.root: 'memory://pictures' does not answer: .*dog/001.png: reset by peer$"
    ):
        data.train.fetch([0, 3, 1], "image")
    fsspec.filesystem("memory").rm("/pictures/train/dog/001.png")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", read)
    assert isinstance(data.train.fetch([3], "image")[0], FileNotFoundError)


# What an image file may be.


@pytest.mark.parametrize("kind", sorted(disk.bad_images()))
def test_a_bad_image_has_the_same_message_every_time(kind: str) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(BadSample) as caught:
            decode(disk.bad_images()[kind], f"folder/{kind}", 3)
        messages.add(str(caught.value))
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith(f"folder/{kind}: ")
    assert "0x" not in message
    if kind == "bomb.png":
        assert "pixels" in message


def test_images_of_any_mode_become_grey_or_colour() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LA"):
        data = disk.encoded(disk.picture(0).convert(mode), "tiff")
        assert decode(data, mode, 1).mode == "L"
        assert decode(data, mode, 3).mode == "RGB"


def test_sixteen_bits_a_pixel_keep_their_upper_eight() -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    image = decode(disk.encoded(Image.fromarray(values)), "deep.png", 1)
    assert np.asarray(image).tolist() == (values >> 8).tolist()


# Tar shards.


def write_shards(root: str, indexed: bool = False) -> str:
    archives = {f"train/{i}.tar": disk.tar(disk.shard(range(3 * i, 3 * i + 3), prefix="./")) for i in range(2)}
    archives["val/0.tar"] = disk.tar(disk.shard(range(6, 8)))
    if indexed:
        archives |= {f"{name}.index.json": disk.index(data) for name, data in archives.items()}
    return disk.write(root, archives)


@pytest.mark.parametrize("indexed", [False, True])
def test_shards_are_read_by_byte_range_from_anywhere(anywhere: str, indexed: bool) -> None:
    data = open_data(options("shards"), write_shards(anywhere, indexed), "auto")
    assert (len(data.train), len(data.held_out), data.split) == (6, 2, "val")
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.description.classes == ("0", "1")
    for seed in range(8):
        actual = pixels(data, seed % 6, held_out=seed >= 6)
        assert actual.tolist() == np.asarray(disk.picture(seed)).tolist()


def test_an_index_is_believed_and_a_broken_one_is_named(tmp_path: Path) -> None:
    root = write_shards(str(tmp_path))
    whole = disk.index((tmp_path / "train/0.tar").read_bytes())
    disk.write(root, {"train/0.tar.index.json": whole.replace(b", 0]", b", 1]")})
    assert open_data(options("shards"), root, "auto").train.labels.tolist() == [1, 1, 1, 1, 0, 1]
    for broken in (b"[[1, 2]]", b"{", b"7"):
        disk.write(root, {"train/0.tar.index.json": broken})
        assert f"{tmp_path}/train/0.tar.index.json: no list of [offset, length, label]" in complaint("shards", root)


def test_class_names_come_from_a_file(tmp_path: Path) -> None:
    root = disk.write(write_shards(str(tmp_path)), {"classes.txt": b"cat\ndog\nfox\n"})
    assert open_data(options("shards"), root, "auto").description.classes == ("cat", "dog", "fox")
    disk.write(root, {"classes.txt": b"cat\n"})
    assert complaint("shards", root) == "data.root: classes.txt names 1 classes but labels go up to 1"


WHOLE = disk.tar(disk.shard(range(3)))


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"", "empty file"),
        (b"no tar" * 500, "not a shard"),
        (WHOLE[:700], "unexpected end of data"),
        (WHOLE[:-9216], "cut short at byte"),
        (disk.tar(disk.shard([0]))[:2048] + b"x" * 512 + WHOLE, "corrupt at byte 2048"),
        (disk.tar({"a.png": disk.png(0), "a.cls": b"dog"}), "invalid literal for int()"),
        (disk.tar({"a/b.png": disk.png(0)}), "a/b has an image and no .cls"),
        (disk.tar({"a.png": disk.png(0), "a.cls": b"-1"}), "has a label below 0"),
    ],
    ids=["empty", "no tar", "cut", "cut between files", "corrupt header", "label", "unlabelled", "negative"],
)
def test_a_broken_shard_is_named(tmp_path: Path, archive: bytes, reason: str) -> None:
    root = disk.write(str(tmp_path), {"train/0.tar": WHOLE, "train/1.tar": archive, "val/0.tar": WHOLE})
    message = complaint("shards", root)
    assert message.startswith(f"data.root: {tmp_path}/train/1.tar: ")
    assert reason in message


def test_missing_shards_are_named(tmp_path: Path) -> None:
    assert complaint("shards", tmp_path).startswith(f"data.root: no train/*.tar in '{tmp_path}'")
    root = disk.write(str(tmp_path), {"train/0.tar": WHOLE})
    assert "has no 'val' split; it has: train" in complaint("shards", root)
    disk.write(root, {"val/0.tar": disk.tar({})})
    assert "the val split" in complaint("shards", root)


# LSUN and ImageNet.


def database(folder: Path, seeds: range) -> None:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for seed in seeds:
            transaction.put(f"{seed:04}".encode(), disk.encoded(disk.picture(seed), "webp" if seed % 2 else "png"))


def write_lsun(root: Path) -> str:
    for number, name in enumerate(("bedroom", "tower")):
        database(root / "lsun" / f"{name}_train_lmdb", range(10 * number, 10 * number + 3))
        database(root / "lsun" / f"{name}_val_lmdb", range(10 * number + 5, 10 * number + 6))
    return str(root)


def test_lsun_is_a_database_per_class_and_split(tmp_path: Path) -> None:
    data = open_data(options("lsun", size=8), write_lsun(tmp_path), "auto")
    assert data.description.classes == ("bedroom", "tower")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.held_out.labels.tolist() == [0, 1]
    assert pixels(data, 4 - 1).tolist() == np.asarray(disk.picture(10)).tolist()
    assert pixels(data, 2).tolist() == np.asarray(disk.picture(2)).tolist()
    assert data.train.name(3) == f"{tmp_path}/lsun/tower_train_lmdb:0010"  # type: ignore[union-attr]


def test_what_lsun_lacks_is_named(tmp_path: Path) -> None:
    assert "unpack CATEGORY_train_lmdb.zip and CATEGORY_val_lmdb.zip there" in complaint("lsun", tmp_path)
    database(tmp_path / "lsun" / "bedroom_train_lmdb", range(2))
    where = tmp_path / "lsun" / "bedroom_val_lmdb"
    assert complaint("lsun", tmp_path) == f"data.root: lsun: {where} is missing: unpack it there"
    where.mkdir()
    assert complaint("lsun", tmp_path).startswith(f"data.root: lsun: {where} is not a database: ")
    (where / "data.mdb").write_bytes(b"no database" * 1000)
    assert complaint("lsun", tmp_path).startswith(f"data.root: lsun: {where} is not a database: ")


def test_imagenet_is_a_folder_per_class(tmp_path: Path) -> None:
    disk.folder(str(tmp_path / "imagenet"), {"train": 2, "val": 1}, classes=("n01440764", "n01443537"))
    data = open_data(options("imagenet"), str(tmp_path), "auto")
    assert (data.description.classes, data.split) == (("n01440764", "n01443537"), "val")
    assert (len(data.train), len(data.held_out), data.description.size) == (4, 2, 224)
    assert data.description.variable_size


def test_what_imagenet_needs_is_named(tmp_path: Path) -> None:
    message = complaint("imagenet", tmp_path)
    assert message.startswith(f"data.root: imagenet is not in '{tmp_path}/imagenet': put train/ and val/")
    assert "ILSVRC2012_img_train.tar" in message
    archives = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    disk.write(str(tmp_path), {f"imagenet/{name}": b"not the real thing" for name in archives})
    assert complaint("imagenet", tmp_path).startswith(
        f"data.root: imagenet in '{tmp_path}/imagenet' cannot be unpacked"
    )


def test_a_part_of_a_split_is_spread_over_it(tmp_path: Path) -> None:
    """Image folders are sorted by class: their first samples would all be of one."""
    whole = open_data(DataOptions(name="folder"), disk.folder(str(tmp_path), {"train": 1, "val": 5}), "auto")
    part = subsample(whole, 4)
    assert part.held_out.labels.tolist() == [0, 0, 1, 1]
    assert (part.description.eval_size, len(part.train)) == (4, 2)
    stored, some = cast(Any, whole.held_out), cast(Any, part.held_out)
    assert [some.name(i) for i in range(4)] == [stored.name(i) for i in (0, 2, 5, 7)]
    assert some.fetch([3, 1], "image") == stored.fetch([7, 2], "image")
    digits = open_data(DataOptions(name="digits"), "", "auto")
    few = cast(Any, subsample(digits, 3).held_out)
    assert few["image"].equal(cast(Any, digits.held_out)["image"][[0, 199, 399]])
    assert subsample(digits, 10_000).description.eval_size == 599
