"""`train`: the default command."""

from __future__ import annotations

from collections.abc import Sequence

from ..run import session
from .common import read_config


def main(words: Sequence[str]) -> int:
    config, name = read_config(words, "python -m trainer [train] [CONFIG.yaml]", "Train a run, or resume it.")
    return session.train(config, name)
