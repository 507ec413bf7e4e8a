"""Every config trains: a real step, or where its data is not at hand, a step on stand-ins of the same shape."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from .pictures_on_disk import folder
from .ranks import run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_takes_its_first_steps(path: Path, tmp_path: Path, real_data: str) -> None:
    settings = yaml.safe_load(path.read_text())
    arguments = [path, "--duration", "2 steps", "--evaluate.samples", "8", "--schedule.warmup", "0 steps"]
    data = settings["data"]["name"]
    if settings["workload"]["name"] != "classifier":  # of which the features are, and which may not be there
        arguments += ["--metrics.features", "pixels", "--batch_size", "4", "--samples.count", "4"]
        arguments += ["--workload.width", "8"]  # those for a GPU would take long here
        if settings["workload"].get("discriminator_steps", 1) > 1:
            arguments += ["--workload.discriminator_steps", "2"]
    if data.startswith("cifar"):
        arguments += ["--data.name", "fake", "--data.samples", "64", "--batch_size", "8"]
    elif data == "imagenet":
        folder(str(tmp_path / "imagenet"), {"train": 2, "val": 2})
        arguments += ["--data.root", tmp_path, "--batch_size", "2", "--data.size", "64", "--data.workers", "1"]
    result = json.loads(run(arguments, tmp_path, environment={"TRAINER_DATA": real_data}).splitlines()[-1])
    assert result["status"] == "done"
    assert result["step"] == 2
    assert Path(result["run"]).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_to_expect_of_it(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"configs/{path.name}" in header
    assert re.search(r"\d %|FID \d|NOT YET RUN", header)
