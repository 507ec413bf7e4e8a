"""Ranks that would train different things say so, before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer.data.dataset import Memory
from trainer.run.sameness import digest

from ..ranks import start

TINY = ["--workload.network", "softmax", "--data.name", "fake", "--data.samples", "40", "--data.size", "8",
        "--batch_size", "10", "--duration", "3 steps", "--run.url", "run"]  # fmt: skip


def refused(folder: Path, words: list[str], last: list[str], environment: dict[str, str] | None = None) -> str:
    """The line of a start in which the second of two ranks differs."""
    ranks = start(words, folder, 2, last=(last, environment or {}))
    assert ranks.wait() == [2, 2], ranks.text(0) + ranks.text(1)
    assert not (folder / "run" / "config.yaml").exists()
    lines = [line for line in ranks.text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert ranks.text(1) == ""
    return lines[0]


def test_ranks_that_agree_train(tmp_path: Path) -> None:
    """Where a node keeps its data, and how many workers read it, is its own affair."""
    ranks = start(TINY, tmp_path, 2, last=(["--data.workers", "1", "--threads", "1"], {}))
    assert ranks.wait() == [0, 0], ranks.text()


def test_another_setting_is_named_with_its_values_and_ranks(tmp_path: Path) -> None:
    line = refused(tmp_path, [*TINY, "--optimizer.lr", "0.1"], ["--optimizer.lr", "0.2"])
    assert line == (
        "error: optimizer.lr: 0.1 on rank 0, 0.2 on rank 1: give all ranks the same config, environment, data and "
        "versions"
    )


def test_another_environment_is_found(tmp_path: Path) -> None:
    line = refused(tmp_path, TINY, [], {"TRAINER_SEED": "5"})
    assert "seed: 0 on rank 0, 5 on rank 1" in line


def images(folder: Path, count: int) -> None:
    for split in ("train", "val"):
        for label, shade in (("cat", 60), ("dog", 180)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (shade, i, 0)).save(folder / split / label / f"{i}.png")


FOLDER = [*TINY, "--data.name", "folder", "--data.size", "8", "--data.workers", "0"]
DAMAGE = {
    "an image is missing": lambda folder: (folder / "train/cat/3.png").unlink(),
    "an image has another name": lambda folder: (folder / "train/cat/3.png").rename(folder / "train/cat/3b.png"),
    "an image is of another class": lambda folder: (folder / "val/cat/0.png").rename(folder / "val/dog/00.png"),
    "a class has another name": lambda folder: [
        (folder / split / "dog").rename(folder / split / "emu") for split in ("train", "val")
    ],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_other_data_is_found(damage: str, tmp_path: Path) -> None:
    images(tmp_path / "a", 12)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    DAMAGE[damage](tmp_path / "b")
    line = refused(tmp_path, [*FOLDER, "--data.root", "a"], ["--data.root", "b"])
    assert line.startswith("error: data set.")


def test_a_copy_of_the_data_in_another_place_is_the_same(tmp_path: Path) -> None:
    images(tmp_path / "a", 12)
    shutil.copytree(tmp_path / "a", tmp_path / "somewhere" / "else")
    ranks = start([*FOLDER, "--data.root", "a"], tmp_path, 2, last=(["--data.root", "somewhere/else"], {}))
    assert ranks.wait() == [0, 0], ranks.text()


def test_a_single_pixel_counts_in_memory() -> None:
    pixels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    changed = pixels.clone()
    changed[3, 0, 1, 1] = 1
    assert digest(Memory({"image": pixels})) == digest(Memory({"image": pixels.clone()}))
    assert digest(Memory({"image": pixels})) != digest(Memory({"image": changed}))
