"""`config`: the resolved config, or its JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import workloads
from ..config.options import dump
from ..config.settings import config_class
from .common import read_config, say


def main(words: Sequence[str]) -> int:
    """Print the resolved config as YAML, or with --schema the JSON schema of all workloads."""
    if "--schema" in words:
        options = [workloads.options_class(name) for name in workloads.names()]
        say(json.dumps(config_class(*options).model_json_schema(), indent=1))
        return 0
    text = "Print the resolved config as YAML. With --schema: the JSON schema, for an editor."
    resolved, _ = read_config(words, "python -m trainer config [--schema] [CONFIG.yaml]", text)
    say(dump(resolved).rstrip())
    return 0
