"""A run that meets more images that cannot be read than it may says so, to people and to batch scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from .. import pictures_on_disk as disk
from ..ranks import run
from ..results import outcome


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_bad_images_end_a_run_with_a_line_and_a_status(world: int, tmp_path: Path) -> None:
    disk.folder(str(tmp_path / "data"), {"train": 4, "val": 2})
    image = next((tmp_path / "data" / "train").rglob("*.*"))
    image.write_bytes(b"no image")
    words = ["--data.name", "folder", "--data.root", "data", "--data.size", "16", "--data.workers", "0", "--batch_size",
             "4", "--duration", "20 epochs", "--run.url", "run"]  # fmt: skip
    text = run(words, tmp_path, world, code=2)
    assert "error: data.bad_images: 1 images cannot be read, 0 are allowed:" in text
    assert image.name in text
    ended = outcome(tmp_path / "run")
    assert (ended["status"], ended["reason"]) == ("bad_data", "too many samples could not be read")
    assert ended["step"] < 40
    assert "done at step" in run([*words, "--data.bad_images", "1", "--duration", "2 steps"], tmp_path, world)
