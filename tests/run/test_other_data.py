"""Data that is not, or no longer, what a run was trained on: classes go by their names, and what changed is told."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from trainer import workloads
from trainer.data.dataset import DataSet, Memory, relabelled
from trainer.data.description import ImageDescription
from trainer.run.build import recipe

from ..ranks import run
from ..results import outcome

SHADES = {"ape": 0, "cat": 80, "dog": 160, "emu": 240}
WORDS = ["--workload.network", "softmax", "--data.name", "folder", "--data.root", "data", "--data.size", "8",
         "--data.channels", "1", "--data.workers", "0", "--data.resized_crop", "false", "--batch_size", "8",
         "--optimizer.lr", "0.02", "--run.url", "run"]  # fmt: skip


def images(folder: Path, classes: dict[str, int]) -> None:
    for split, count in (("train", 12), ("val", 6)):
        for name, shade in classes.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("L", (8, 8), shade + i)
                image.putpixel((shade // 80, 0), 255 if shade < 128 else 0)
                image.save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    images(folder / "data", SHADES)
    run([*WORDS, "--duration", "150 epochs"], folder)
    assert outcome(folder / "run")["metrics"]["accuracy"] == 1.0
    return folder


def evaluated(folder: Path, classes: dict[str, int], code: int = 0) -> str:
    other = folder / "other"
    shutil.rmtree(other, ignore_errors=True)
    images(other, classes)
    return run(["evaluate", "run", "--data-root", "other"], folder, code=code).splitlines()[-1]


@pytest.mark.parametrize("missing", SHADES)
def test_labels_go_by_the_names_of_classes_also_where_some_are_missing(missing: str, trained: Path) -> None:
    line = evaluated(trained, {name: shade for name, shade in SHADES.items() if name != missing})
    assert json.loads(line)["accuracy"] == 1.0
    assert json.loads(line)["samples"] == 18


@pytest.mark.parametrize("classes", [{**SHADES, "fox": 200}, {"ape": 0, "cow": 80, "dog": 160, "emu": 240}])
def test_a_class_that_the_run_does_not_know_is_refused_by_name(classes: dict[str, int], trained: Path) -> None:
    (new,) = set(classes) - set(SHADES)
    line = evaluated(trained, classes, code=2)
    assert line.startswith(f"error: data.root: the run was not trained with the class {new!r}; its classes are: ")
    assert all(name in line for name in SHADES)


def test_a_resume_refuses_other_classes_and_keeps_what_the_run_knows_of_its_data(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    known = (tmp_path / "run" / "data.json").read_bytes()
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").rename(tmp_path / "data" / split / "zebra")
    text = run([*WORDS, "--duration", "160 epochs", "--run.force_resume"], tmp_path, code=2)
    assert text.splitlines()[-1] == (
        "error: data.root: the data there has other classes than the run was trained with (without cat, with zebra): "
        "set data.root to that data, or train another run on this"
    )
    assert (tmp_path / "run" / "data.json").read_bytes() == known


def test_a_resume_says_how_many_samples_came_or_went(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data" / "train" / "cat" / "3.png").unlink()
    (tmp_path / "data" / "val" / "dog" / "2.png").unlink()
    text = run([*WORDS, "--duration", "151 epochs"], tmp_path)
    assert "changed since the run began: the data's training: 48 -> 47 (changes the result)\n" in text
    assert "changed since the run began: the data's evaluated: 24 -> 23\n" in text


def test_labels_in_memory_go_by_name_as_well() -> None:
    import torch

    description = ImageDescription("own", 3, 3, 1, 1, ("dog", "ape"), (0.5,), (0.5,))
    split = Memory({"image": torch.zeros(3, 1, 1, 1, dtype=torch.uint8), "label": torch.tensor([0, 1, 0])})
    moved = relabelled(DataSet(description, split, split, "val"), ("ape", "cat", "dog"))
    assert isinstance(moved.held_out, Memory)
    assert moved.held_out["label"].tolist() == [2, 0, 2]
    assert moved.description.classes == ("ape", "cat", "dog")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("shades", "said"), [
    ((7,) * 8, "each has one colour in all of its pixels"), ((), "are all equal"), ((1, 2, 3), "")
])  # fmt: skip
def test_images_that_show_nothing_are_noticed_at_the_start(shades: tuple[int, ...], said: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(8):
            path = tmp_path / "data" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("L", (8, 8), 50 if len(shades) != 8 else 7 * i)
            image.putpixel((0, 0), image.getpixel((0, 0)) + (len(shades) < 8) * (1 + len(shades) * i))
            image.save(path)
    text = run([*WORDS, "--duration", "1 steps"], tmp_path)
    assert ("warning: " in text) == bool(said)
    assert said in text


def test_small_images_are_not_enlarged_without_a_word(tmp_path: Path) -> None:
    images(tmp_path / "data", SHADES)
    text = run([*WORDS, "--data.size", "64", "--duration", "1 steps"], tmp_path)
    assert "warning: images of 8 pixels are enlarged to 64, which costs time and shows nothing more: " in text
    assert "set data.size to 8\n" in text
    assert "enlarged" not in run([*WORDS, "--duration", "1 steps", "--run.url", "as they are"], tmp_path)


@pytest.mark.parametrize(("workload", "random"), [("classifier", True), ("dcgan", False), ("cyclegan", False)])
def test_what_makes_images_learns_whole_ones(workload: str, random: bool, tmp_path: Path) -> None:
    """A classifier of photographs sees random crops of them, unless the user says otherwise."""
    images(tmp_path, SHADES)
    model = workloads.config_model(workload)
    for said, expected in ((None, random), (True, True), (False, False)):
        more = {"domains": ("ape", "cat")} if workload == "cyclegan" else {}
        data = {"name": "folder", "root": str(tmp_path), "size": 16, "workers": 0, "resized_crop": said, **more}
        parts = recipe(model(data=data, workload={"name": workload}), 1)  # type: ignore[arg-type]
        assert parts.plain_loader(4).readers[0].crop.random == expected  # type: ignore[union-attr]


def test_images_of_one_colour_are_noticed_as_those_of_one_grey_are(tmp_path: Path) -> None:
    for split, i in itertools.product(("train", "val"), range(8)):
        path = tmp_path / split / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 10 * i, 0)).save(path)
    data = {"name": "folder", "root": str(tmp_path), "size": 8, "workers": 0}
    parts = recipe(workloads.config_model("classifier")(data=data), 1)  # type: ignore[arg-type]
    assert parts.plain_loader(4).oddities() == [
        "of 8 training images looked at, each has one colour in all of its pixels"
    ]
