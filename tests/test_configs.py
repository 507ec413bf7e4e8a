"""Every config trains: a real step, or where its data is missing, a step on fake data of the same shape."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from trainer.commands.common import read_config
from trainer.config.options import RunConfig, differences

from .pictures_on_disk import folder
from .ranks import run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
FOLDED = [path for path in CONFIGS if "On a GPU" in path.read_text()]  # with a command for a GPU in the header
ON_A_GPU = "On a GPU, not yet run: python -m trainer "


def header(path: Path) -> list[str]:
    """The lines of comment that a config begins with, without their marks."""
    lines = path.read_text().splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].strip() for line in lines[:end]]


def gpu_commands(path: Path) -> list[list[str]]:
    """The words of the commands for a GPU in a config's header: the config, then flags."""
    lines = "\n".join(header(path)).replace("\\\n", "").splitlines()
    return [shlex.split(line.removeprefix(ON_A_GPU)) for line in lines if line.startswith(ON_A_GPU)]


def resolve(words: list[str]) -> RunConfig:
    return read_config(words, "trainer", "")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_takes_its_first_steps(path: Path, tmp_path: Path, real_data: str) -> None:
    settings = yaml.safe_load(path.read_text())
    arguments = [path, "--duration", "2 steps", "--evaluate.samples", "8", "--schedule.warmup", "0 steps"]
    arguments += ["--batch_size", "4"]
    data = settings["data"]["name"]
    if settings["workload"]["name"] != "classifier":  # whose features are those of a classifier that would be trained
        arguments += ["--metrics.features", "pixels", "--samples.count", "4"]
        arguments += ["--workload.width", "8"]  # one for a GPU would take long here
        if settings["workload"].get("discriminator_steps", 1) > 1:
            arguments += ["--workload.discriminator_steps", "2"]
    if data.startswith("cifar"):
        arguments += ["--data.name", "fake", "--data.samples", "64"]
    elif data == "tinyshakespeare":
        arguments += ["--data.name", "text", "--data.root", __file__, "--data.length", "8"]
    elif data == "imagenet":
        folder(str(tmp_path / "imagenet"), {"train": 2, "val": 2})
        arguments += ["--data.root", tmp_path, "--batch_size", "2", "--data.size", "64", "--data.workers", "1"]
    result = json.loads(run(arguments, tmp_path, environment={"TRAINER_DATA": real_data}).splitlines()[-1])
    assert result["status"] == "done"
    assert result["step"] == 2
    assert Path(result["run"]).name == path.stem
    shutil.rmtree(result["run"])  # those of large networks would fill the disk


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_header_holds_a_measurement_or_says_that_there_is_none(path: Path) -> None:
    text = " ".join(header(path))
    assert f"configs/{path.name}" in text
    measured = re.search(r"Seeds? \d.* on .*, torch \d\.\d+, .*: .*(\d %|FID \d|\d bits|error \d)", text)
    assert bool(measured) != ("NOT YET RUN" in text)


@pytest.mark.parametrize("path", FOLDED, ids=lambda path: path.stem)
def test_a_command_for_a_gpu_builds_a_config_that_differs_in_every_flag(path: Path) -> None:
    ((file, *flags),) = gpu_commands(path)
    assert file == f"configs/{path.name}"
    here, gpu = (resolve([str(path), *words]) for words in ([], flags))
    assert gpu.run.url != f"runs/{path.stem}"  # it would meet the run on a CPU there, and be refused
    changed = differences(here.model_dump(mode="json"), gpu.model_dump(mode="json"))
    assert sorted(changed) == sorted(word.removeprefix("--") for word in flags if word.startswith("--"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_features_of_a_config_are_those_of_a_classifier_of_the_same_data(path: Path) -> None:
    for words in ([], *(flags for _, *flags in gpu_commands(path))):
        config = resolve([str(path), *words])
        if config.metrics.features != "pixels":
            classifier = resolve([str(path.parents[1] / config.metrics.features)])
            assert classifier.workload.name == "classifier"
            assert classifier.data.name == config.data.name.removeprefix("stacked_")
