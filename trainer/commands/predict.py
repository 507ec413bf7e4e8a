"""`predict`: labels and probabilities of image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..config.options import DataOptions, UserError
from ..data.stored import SUFFIXES, BadSample, decode
from ..data.transforms import Augment, Crop
from ..run.opened import Trained, open_run
from .common import Parser, checkpoint_arguments, say


def _image_paths(names: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{name}: no images in this folder ({', '.join(SUFFIXES)})")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{name}: no such file or folder")
    return paths


@torch.no_grad()
def _probabilities(trained: Trained, paths: Sequence[Path], batch_size: int) -> Tensor:
    """(N, classes) float32 for image files, prepared as the held-out data is."""
    data = trained.data
    plain = DataOptions(name=trained.config.data.name)
    crop = Crop(plain, data.size, 0, train=False, variable_size=data.variable_size)
    normalise = Augment(plain, data, 0, False, torch.device("cpu"), torch.float32, False).normalise
    network = trained.workload.eval().inference().eval()
    found = []
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            try:
                images.append(crop(decode(path.read_bytes(), str(path), data.channels), 0, 0))
            except (BadSample, OSError) as error:
                raise UserError(f"{error}: repair or remove it") from None
        found.append(network(normalise(torch.stack(images))).float().softmax(1))
    return torch.cat(found)


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
    paths = _image_paths(options.images)
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    if trained.workload.generates:
        raise UserError(f"{options.checkpoint}: {trained.config.workload.name} labels nothing: give a classifier's run")
    names = trained.data.classes
    best = _probabilities(trained, paths, options.batch_size).topk(min(options.top, len(names)))
    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    for position in range(best.values.shape[1]):
        table.add_column("label" if position == 0 else f"{position + 1}.", no_wrap=True)
    for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        labels = [(names[c], round(v, 6)) for c, v in zip(classes, values, strict=True)]
        if options.json:
            say(json.dumps({"image": str(path), "label": labels[0][0], "probabilities": dict(labels)}))
        else:
            table.add_row(str(path), *(f"{label} {value:.1%}" for label, value in labels))
    if not options.json:
        Console().print(table)
    return 0
