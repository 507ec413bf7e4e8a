"""Pictures are PNG of a sane size whatever they show, and cost nothing before the end of a run."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.figures import Animation, ImageGrid, Matrix
from trainer.tracking.render import from_samples, learning_curves, render

LONG_NAME = "great white shark, white shark, man-eater, Carcharodon carcharias"


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert min(image.size) >= 200
    assert max(image.size) <= 1600
    assert len(png) < 1_000_000
    return image


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    counts = image.convert("RGB").getcolors(maxcolors=2**24)
    assert counts
    return {colour for _, colour in counts}


def record(index: int, kind: str = "train", **values: float) -> dict[str, Any]:
    return {"step": index * 50, "kind": kind, "epoch": index / 3, "loss": 2 / index, "accuracy": 1 - 1 / (index + 1),
            **values}  # fmt: skip


BLUE, ORANGE = (0x34, 0x65, 0xA4), (0xD9, 0x73, 0x0D)


def test_learning_curves_show_training_and_held_out() -> None:
    records = [record(i, lr=0.001) for i in range(1, 30)]
    assert BLUE in colours(opened(learning_curves(records, "a run")))
    assert ORANGE not in colours(opened(learning_curves(records, "a run")))
    both = colours(opened(learning_curves([*records, record(9, "evaluate"), record(18, "evaluate")], "a run")))
    assert {BLUE, ORANGE} <= both


def test_one_record_is_a_visible_point() -> None:
    assert BLUE in colours(opened(learning_curves([record(1)], "a run")))


def test_values_that_are_not_finite_leave_a_gap_and_an_infinite_loss_is_no_error() -> None:
    records = [record(i) for i in range(1, 9)]
    records[3]["loss"], records[-1]["loss"], records[-1]["grad_norm"] = math.nan, math.inf, math.nan
    opened(learning_curves(records, f"{LONG_NAME} {LONG_NAME} {LONG_NAME}"))
    opened(learning_curves([{**record(1), "loss": math.nan}], "a run"))


def test_many_metrics_are_nine_panels_at_most() -> None:
    names = [f"metric_{index}" for index in range(20)]
    opened(learning_curves([{**record(i), **dict.fromkeys(names, 1.0 * i)} for i in range(1, 5)], "a run"))


@pytest.mark.parametrize("classes", [1, 2, 10, 100])
@pytest.mark.parametrize("name", ["", LONG_NAME], ids=["short", "long"])
def test_a_confusion_matrix_of_any_size(classes: int, name: str) -> None:
    values = torch.eye(classes, dtype=torch.long) * 95 + 5
    labels = tuple(f"{index}{name}" for index in range(classes))
    image = opened(render(Matrix(values, labels, f"{LONG_NAME}: 100 samples", "true", "predicted")))
    assert image.width == image.height


def test_a_matrix_without_counts_is_no_error() -> None:
    opened(render(Matrix(torch.zeros(3, 3, dtype=torch.long), ("a", "b", "c"), "nothing", "true", "predicted")))


@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_a_grid_of_images(count: int, channels: int) -> None:
    image = torch.zeros(count, channels, 28, 28)
    image[:, 0, :14] = 1  # the upper half: white, or red where there are colours
    grid = ImageGrid(image, tuple(f"{LONG_NAME} 100%\nis {LONG_NAME}" for _ in range(count)), "the worst mistakes")
    drawn = colours(opened(render(grid)))
    assert ((255, 0, 0) in drawn) == (channels == 3)
    assert (0, 0, 0) in drawn


def test_rows_edge_to_edge_have_their_names_beside_them() -> None:
    black = torch.zeros(20, 1, 28, 28)
    bare, named = (opened(render(ImageGrid(black, columns=10, rows=rows))) for rows in ((), (LONG_NAME, "b")))
    margin = named.width - bare.width
    assert margin > 0
    assert named.height == bare.height
    assert (0, 0, 0) in colours(named.crop((0, 0, margin, named.height))), "nothing is written there"
    assert colours(bare) == {(0, 0, 0), (255, 255, 255)}


def test_samples_from_minus_one_to_one_fill_the_grid_and_nan_is_black() -> None:
    samples = torch.ones(64, 1, 16, 16)
    samples[0] = math.nan
    assert {(0, 0, 0), (255, 255, 255)} <= colours(opened(render(from_samples(samples, "samples"))))
    assert (128, 128, 128) in colours(opened(render(from_samples(torch.zeros(4, 3, 16, 16), ""))))


def test_an_animation_is_a_gif_that_shows_its_frames_without_end() -> None:
    frames = torch.zeros(3, 4, 1, 28, 28)
    frames[1, 2] = 1  # the picture at the lower left
    gif = Image.open(io.BytesIO(render(Animation(frames, columns=2))))
    assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 3, 0)  # type: ignore[attr-defined]
    assert min(gif.size) >= 200
    shown = []
    for index in range(3):
        gif.seek(index)
        pixels = gif.convert("L")
        shown.append([pixels.getpixel((x, y)) for y in (20, gif.height - 20) for x in (20, gif.width - 20)])
    assert shown == [[0, 0, 0, 0], [0, 0, 255, 0], [0, 0, 0, 0]]


SCRIPT = """
import sys
from trainer.__main__ import main
from trainer.run.directory import RunDirectory
finish = RunDirectory.finish
def late(*words):
    assert not {"matplotlib", "wandb", "PIL.Image"} & set(sys.modules), "imported before the end of training"
    return finish(*words)
RunDirectory.finish = late
code = main(["--duration", "4 steps", "--workload.network", "softmax", "--checkpoint.every", "2 steps",
             "--wandb.mode", "offline", "--run.url", "run"])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
assert "wandb" not in sys.modules, "W&B has a process of its own"
sys.exit(code)
"""


def test_matplotlib_comes_at_the_end_of_a_run_without_pyplot_and_wandb_never(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/samples/learning_curves.png").exists()
    assert (tmp_path / "run/samples/confusion.png").exists()
