"""Reading back what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from trainer.storage.metric_log import TIMING


def final_tensors(run: Path) -> dict[str, Tensor]:
    """Weights, averaged weights and optimizer state of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*/MANIFEST.json"))[-1].parent
    return {
        f"{file}/{name}": tensor
        for file in ("weights", "optimizer")
        for name, tensor in safetensors.torch.load_file(newest / f"{file}.safetensors").items()
    }


def records(run: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The metric log in order, without the fields that are a matter of time."""
    lines = [line for path in sorted((run / "metrics").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [{k: v for k, v in json.loads(line).items() if timing or k not in TIMING} for line in lines]


def outcome(run: Path) -> dict[str, Any]:
    return json.loads((run / "outcome.json").read_text())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert a.keys() == b.keys()
    return max(
        float(((a[name].double() - b[name].double()).abs().max()) / a[name].double().abs().max().clamp(min=1e-300))
        for name in a
    )
