"""What the commands share: a parser whose mistakes are one line, and the config of words, environment and file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import workloads
from ..config.options import RunConfig, UserError
from ..config.settings import build_config, read_file, run_name, takes_no_value
from ..config.user_code import digests

DEFAULT_FILE = Path(__file__).parents[1] / "digits_cnn.yaml"  # what is trained where no config is given


class Parser(argparse.ArgumentParser):
    """Mistakes as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('python -m trainer ')}: {message}; see --help")


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what the user asked for


def checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN", help="URL of a run, or of a checkpoint in it")
    parser.add_argument("--step", metavar="N", type=int, help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best evaluation")


def _split_file(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file among the words, and the flags."""
    flags = list(words)
    for index, word in enumerate(flags):
        before = flags[index - 1] if index else ""
        value_of_flag = before.startswith("--") and "=" not in before and not takes_no_value(before)
        if not word.startswith("-") and (index == 0 or (word.endswith((".yaml", ".yml")) and not value_of_flag)):
            return flags.pop(index), flags
    return None, flags


def peek(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before the model that knows its type exists."""
    for index, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(words):
            return words[index + 1]
    return None


def read_config(words: Sequence[str], program: str, description: str) -> tuple[RunConfig, str]:
    """The config that the words, the environment and the file give, and the run's name."""
    file, flags = _split_file(words)
    values = read_file(file or str(DEFAULT_FILE))
    section = values.get("workload", {})
    if not isinstance(section, dict):
        raise UserError(f"workload: {section!r} should be a mapping with a name: 'workload: {{name: classifier}}'")
    name = peek(flags, "--workload.name") or os.environ.get("TRAINER_WORKLOAD__NAME")
    name = name if name and not name.startswith("--") else str(section.get("name", "classifier"))
    model = workloads.config_model(name)
    if file is None and name != section["name"]:  # the default config is that of another workload
        values, section = {}, {}
    values = {**values, "workload": {"name": name, **section}}
    values.pop("code", None)  # of an earlier run's config
    config = build_config(model, values, flags, program, description)
    config = config.model_copy(update={"code": digests(config)})
    return config, run_name(file or str(DEFAULT_FILE))
