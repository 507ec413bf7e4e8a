"""Pairs of images in the layouts in which such sets are published, and what may be wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.config.options import DataOptions, UserError
from trainer.data.dataset import DataSet, subsample
from trainer.data.decoding import SUFFIXES
from trainer.data.loader import BatchLoader
from trainer.data.plan import BatchPlan
from trainer.data.sources import open_data

from .. import pictures_on_disk as disk

SIZE = 8


def pair(seed: int) -> tuple[Image.Image, Image.Image]:
    """B is A, upside down."""
    a = disk.picture(seed, SIZE, SIZE)
    return a, a.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def beside(seed: int) -> bytes:
    whole = Image.new("RGB", (2 * SIZE, SIZE))
    for column, image in enumerate(pair(seed)):
        whole.paste(image, (column * SIZE, 0))
    return disk.encoded(whole)


SPLITS = {"train": 5, "val": 3}
NUMBERED = [(split, i) for split, count in SPLITS.items() for i in range(count)]


def seed_of(split: str, i: int) -> int:
    return i + 100 * (split == "val")


def layout(name: str) -> dict[str, bytes]:
    if name == "beside":
        return {f"{split}/{i}.png": beside(seed_of(split, i)) for split, i in NUMBERED}
    inside = {"A inside": "{split}/{side}/{i}.png", "A outside": "{side}/{split}/{i}.png"}[name]
    return {
        inside.format(split=split, side=side, i=i): disk.encoded(image)
        for split, i in NUMBERED
        for side, image in zip("AB", pair(seed_of(split, i)), strict=True)
    }


LAYOUTS = ["beside", "A inside", "A outside"]


def opened(root: Path | str, files: Mapping[str, bytes], **options: object) -> DataSet:
    disk.write(str(root), files)
    given = DataOptions.model_validate({"name": "pairs", "size": SIZE, "workers": 0, **options})
    return open_data(given, str(root), "auto")


def loader_of(data: DataSet, **options: object) -> BatchLoader:
    size = len(data.train)
    return BatchLoader(
        data, BatchPlan(0, size, size), DataOptions.model_validate({"name": "pairs", "workers": 0, **options}), rank=0,
        world=1, device=torch.device("cpu"), dtype=torch.float64, channels_last=False, evaluation_batch=4,
        input_range=(-1, 1),
    )  # fmt: skip


def bytes_of(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().long()


def expected(image: Image.Image) -> list[list[list[int]]]:
    return np.asarray(image).transpose(2, 0, 1).tolist()


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_images_of_a_pair_are_in_one_batch_whatever_the_layout(name: str, direction: str, tmp_path: Path) -> None:
    data = opened(tmp_path, layout(name), direction=direction)
    assert data.description.paired  # type: ignore[attr-defined]
    assert (data.description.train_size, data.description.eval_size, data.split) == (5, 3, "val")
    batch = loader_of(data).held_out([2, 0])
    for row, i in enumerate((2, 0)):
        a, b = (expected(image) for image in pair(seed_of("val", i)))
        made = {field: bytes_of(batch[field])[row].tolist() for field in ("image", "input")}
        assert made == ({"image": b, "input": a} if direction == "AtoB" else {"image": a, "input": b})


def negatives(count: int, width: int, height: int) -> dict[str, bytes]:
    """B is the negative of A, so whatever is done to both alike leaves a sum that is known."""
    files = {}
    for i in range(count):
        image = disk.picture(i, 6, 5).resize((width, height), Image.Resampling.BICUBIC)
        for side, shown in (("A", image), ("B", image.point(lambda value: 255 - value))):
            files |= {f"{split}/{side}/{i}.png": disk.encoded(shown) for split in ("train", "val")}
    return files


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_pairs_are_moved_and_mirrored_alike(resident: str, tmp_path: Path) -> None:
    data = opened(tmp_path, negatives(5, SIZE, SIZE))
    batches = [
        next(loader_of(data, resident=resident, **options).train(k))[0][1]
        for options, k in (({}, 0), ({"flip": True, "pad_crop": 2}, 0), ({"flip": True, "pad_crop": 2}, 1))
    ]
    for batch in batches:
        both = bytes_of(batch["image"]) + bytes_of(batch["input"])
        assert set(both.unique().tolist()) <= {0, 255}  # 0 where both are padded
        assert (both == 255).float().mean() > 0.5
    assert not any(torch.equal(batches[0]["image"], batch["image"]) for batch in batches[1:])
    assert not torch.equal(batches[1]["image"], batches[2]["image"])


def test_pairs_of_photographs_are_resized_and_cropped_alike(tmp_path: Path) -> None:
    data = opened(tmp_path, negatives(4, 48, 40), size=16)
    plain, cropped = (next(loader_of(data, resized_crop=crop).train(0))[0][1] for crop in (None, True))
    for batch in (plain, cropped):
        assert (batch["image"] + batch["input"]).abs().max() < 2 / 255 + 1e-9
    assert not torch.equal(plain["image"], cropped["image"])


def test_large_pairs_are_shown_whole_in_evaluation(tmp_path: Path) -> None:
    """Where photographs of 128 pixels and more would lose an eighth."""
    a, b = (disk.picture(seed, 128, 128) for seed in (0, 1))
    files = {f"{split}/{side}/0.png": disk.encoded(image)
             for split in ("train", "val") for side, image in (("A", a), ("B", b))}  # fmt: skip
    batch = loader_of(opened(tmp_path, files, size=128)).held_out([0])
    assert bytes_of(batch["image"])[0].tolist() == expected(b)


def test_a_part_of_the_pairs_can_be_held_out(tmp_path: Path) -> None:
    part = subsample(opened(tmp_path, layout("beside")), 1)
    assert [len(batch["input"]) for _, batch in loader_of(part).evaluate()] == [1]


def test_pairs_in_any_storage() -> None:
    for name in LAYOUTS:
        data = opened(f"memory://{name.replace(' ', '')}", layout(name))
        assert loader_of(data).held_out([0])["input"].shape == (1, 3, SIZE, SIZE)


# What may be wrong


def refused(root: Path, files: Mapping[str, bytes]) -> str:
    with pytest.raises(UserError) as error:
        opened(root, files)
    return str(error.value).replace(f"{root}/", "")


def without(files: Mapping[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in names}


@pytest.mark.parametrize(
    ("files", "mistake"),
    [
        (
            without(layout("A inside"), "train/B/2.png", "train/B/4.png"),
            "data.root: train/A/2.png has no partner of its name in train/B and 1 more have none (5 in A, 3 in B): "
            "add or remove images until the names are the same",
        ),
        (
            without(layout("A outside"), "A/val/1.png"),
            "data.root: B/val/1.png has no partner of its name in A/val (2 in A, 3 in B): add or remove images "
            "until the names are the same",
        ),
        (
            {**layout("A inside"), "train/B/2.jpg": b""},
            "data.root: train/B/2.jpg and train/B/2.png have one name: which is of the pair?",
        ),
        (
            {n: d for n, d in layout("A inside").items() if "train/B" not in n},
            f"data.root: train/B has no images ({', '.join(SUFFIXES)}): A and B need one each per pair",
        ),
        (
            {n: d for n, d in layout("beside").items() if "val" not in n},
            "evaluate.split: the pairs in '{root}' has no 'val' split; it has: train: add one or set evaluate.split",
        ),
        (
            {"train/0.png": disk.png(0, 15, 8), "val/0.png": beside(0)},
            "data.root: train/0.png: its width of 15 pixels is odd, so it is no two images side by side",
        ),
        (
            {"train/0.png": disk.png(0, 8, 8), "val/0.png": beside(0)},
            "data.root: train/0.png: of 8x8 pixels is no two images side by side",
        ),
        (
            {"train/cat/0.png": disk.png(0), "val/cat/0.png": disk.png(0)},
            "data.root: train has neither images of two side by side nor folders A and B; it has cat: for a set "
            "without pairs use data.name folder and workload.pairs edges, grey or low_resolution",
        ),
    ],
)  # fmt: skip
def test_what_is_no_set_of_pairs_is_named(files: Mapping[str, bytes], mistake: str, tmp_path: Path) -> None:
    assert refused(tmp_path, files) == mistake.replace("{root}", str(tmp_path))


def test_a_folder_without_a_training_split(tmp_path: Path) -> None:
    said = refused(tmp_path, {"pictures/0.png": beside(0)})
    assert said.startswith("data.root: no folder 'train' in ")
    assert "train/A/NAME.jpg and train/B/NAME.jpg" in said


def test_a_later_pair_that_is_none_is_replaced_and_named(tmp_path: Path) -> None:
    files = {**layout("beside"), "train/3.png": disk.png(0, 15, 8)}
    loader = loader_of(opened(tmp_path, files))
    next(loader.train(0))
    (problem,) = loader.bad_samples()
    assert re.fullmatch(r"\S+train/3.png: its width of 15 pixels is odd, so it is no two images side by side", problem)


def test_images_of_two_shapes_are_no_pair(tmp_path: Path) -> None:
    files = {**layout("A inside"), "train/B/3.png": disk.png(0, 8, 12), "train/B/4.png": disk.png(0, 16, 16)}
    loader = loader_of(opened(tmp_path, files))
    next(loader.train(0))
    (problem,) = loader.bad_samples()
    assert problem.endswith("train/A/3.png: of 8x12 and 8x8 pixels, two shapes")
