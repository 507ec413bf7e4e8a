"""A grid of settings as the tasks of a job array: a run for each, in one folder and one W&B group."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from . import Refused
from .job import Task

LIMIT = 1000  # Slurm's default for the size of an array


def parse(grid: Sequence[str]) -> dict[str, list[str]]:
    """`optimizer.lr=1e-4,3e-4` as a setting and its values. Raises Refused."""
    settings: dict[str, list[str]] = {}
    for text in grid:
        name, equals, values = text.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        items = values.split(",")
        if not equals or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", name) or not all(items):
            raise Refused(f"--sweep: {text!r} is not a grid: write SETTING=VALUE,VALUE such as optimizer.lr=1e-4,3e-4")
        if name in settings:
            raise Refused(f"--sweep: {name} is set twice: put all values into one")
        if len(set(items)) < len(items):
            raise Refused(f"--sweep: {text!r} has a value twice: two tasks would be the same run")
        settings[name] = items
    return settings


def tasks(name: str, run: str, grid: Sequence[str]) -> tuple[Task, ...]:
    """A task for every combination; its run is in a folder of `run`, and W&B groups them by the sweep's name."""
    settings = parse(grid)
    combinations = list(itertools.product(*settings.values()))
    if len(combinations) > LIMIT:
        raise Refused(f"--sweep: {len(combinations)} combinations are more than {LIMIT}: make the grid smaller")
    array = []
    for index, values in enumerate(combinations):
        combination = dict(zip(settings, values, strict=True))
        label = "-".join(f"{setting.rpartition('.')[2]}={value}" for setting, value in combination.items())
        task_run = f"{run}/{index:03d}-{re.sub(r'[^A-Za-z0-9.=_-]', '_', label)[:80]}"
        flags = [f"--{setting}={value}" for setting, value in combination.items()]
        array.append(Task(task_run, (*flags, f"--wandb.group={name}")))
    return tuple(array)
