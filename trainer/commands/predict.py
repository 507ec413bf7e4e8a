"""`predict`: labels and probabilities of image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config.options import UserError
from ..data.image_files import image_paths, read_images
from ..run.opened import Trained, open_run
from .common import Parser, checkpoint_arguments, say

Prediction = tuple[str, list[tuple[str, float]]]  # an image, its labels and their probabilities, the best first


@torch.no_grad()
def _probabilities(trained: Trained, paths: Sequence[Path], batch_size: int) -> Tensor:
    """(N, classes) float32 for image files, prepared as the held-out data is."""
    data = trained.images.normalised_to(trained.workload.input_range)
    network = trained.workload.eval().inference().eval()
    background = trained.config.data.background
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    return torch.cat([network(read_images(batch, data, background)).float().softmax(1) for batch in batches])


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer predict", description="Label images: a table of classes and probabilities.")
    checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument("--top", metavar="N", type=int, default=3, help="how many classes to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="a JSON object per image instead of a table")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="images at a time (default: 64)")
    options = parser.parse_args(words)
    if options.top < 1 or options.batch_size < 1:
        raise UserError("predict: --top and --batch-size must be 1 or more")
    paths = image_paths(options.images)
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    if trained.workload.generates:
        raise UserError(f"{options.checkpoint}: {trained.config.workload.name} labels nothing: give a classifier's run")
    names = trained.images.classes
    top = _probabilities(trained, paths, options.batch_size).topk(min(options.top, len(names)))
    predictions: list[Prediction] = [
        (str(path), [(names[c], round(value, 6)) for c, value in zip(classes, values, strict=True)])
        for path, values, classes in zip(paths, top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    if options.json:
        for path, labels in predictions:
            say(json.dumps({"image": path, "label": labels[0][0], "probabilities": dict(labels)}))
    else:
        Console().print(_table(predictions))
    return 0


def _table(predictions: Sequence[Prediction]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    for position in range(len(predictions[0][1])):
        table.add_column("label" if position == 0 else f"{position + 1}.", no_wrap=True)
    for path, labels in predictions:
        table.add_row(path, *(f"{label} {probability:.1%}" for label, probability in labels))
    return table
