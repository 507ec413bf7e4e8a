"""`translate`: a user's images, turned into others by a run that learned to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..config.options import UserError
from ..data.image_files import image_paths, read_images
from ..randomness import Draws
from ..run.opened import Trained, open_run
from ..storage.objects import Storage
from ..tracking import render
from .common import Parser, checkpoint_arguments, say


def _direction(wanted: str | None, trained: Trained) -> str:
    known = trained.workload.directions
    name = trained.config.workload.name
    if not known:
        raise UserError(f"{trained.storage}: {name} translates nothing: give the run of pix2pix or cyclegan")
    if wanted is not None and wanted not in known:
        raise UserError(f"--direction: {wanted!r} is not known; {name} has: {', '.join(known)}")
    return wanted or known[0]


def _targets(paths: Sequence[Path], out: str) -> list[str]:
    """A name for each image; raises UserError where two would have the same, or an image be lost."""
    names: dict[str, Path] = {}
    for path in paths:
        name = f"{path.stem}.png"
        if name in names:
            raise UserError(f"--out: both {names[name]} and {path} would be {name}: translate one folder at a time")
        if (Path(out) / name).resolve() == path.resolve():
            raise UserError(f"--out: {out!r} holds {path}, which would be overwritten: name another folder")
        names[name] = path
    return list(names)


@torch.no_grad()
def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer translate", description="Turn images into others: a PNG each.")
    checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument("--out", metavar="DIR", default="translated", help="folder or URL (default: translated)")
    parser.add_argument("--direction", metavar="NAME", help="of a run that learned several, such as AtoB or BtoA")
    parser.add_argument(
        "--inputs", action="store_true",
        help="the images are inputs already, such as drawn edges, where the run derived its inputs from images",
    )  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="images at a time (default: 16)")
    options = parser.parse_args(words)
    if options.batch_size < 1:
        raise UserError("translate: --batch-size must be 1 or more")
    paths = image_paths(options.images)
    names = _targets(paths, options.out)
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    direction = _direction(options.direction, trained)
    workload, target = trained.workload.eval(), Storage(options.out)
    data = trained.images.normalised_to(workload.input_range)
    for start in range(0, len(paths), options.batch_size):
        rows = slice(start, min(start + options.batch_size, len(paths)))
        images = read_images(paths[rows], data, trained.config.data.background)
        inputs = images if options.inputs else workload.input_of(images)
        draws = Draws(options.seed, ("translate",), rows, torch.device("cpu"))
        for name, image in zip(names[rows], workload.translate(inputs, draws, direction), strict=True):
            target.write(name, render.plain(image))
    first = f"{options.out.rstrip('/')}/{names[0]}"
    say(f"{len(paths)} translated by step {trained.step}: {first}{' and on' if len(paths) > 1 else ''}")
    return 0
