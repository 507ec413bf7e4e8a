"""`sample`: images of a generator."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.options import UserError
from ..randomness import Draws
from ..run.opened import Trained, open_run
from ..storage.objects import Storage
from ..tracking import render
from .common import Parser, checkpoint_arguments, say


def _class_of(name: str | None, trained: Trained) -> int | None:
    """The label of a class, by its name or number."""
    if name is None:
        return None
    classes = trained.images.classes
    if not trained.workload.conditional:
        raise UserError(
            f"--class: {trained.config.workload.name} does not generate by class: leave it out, or use biggan"
        )
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    near = difflib.get_close_matches(name, classes, 3) or classes[:10]
    raise UserError(f"--class: {name!r} is not known; classes of {trained.data.name}: {', '.join(near)}")


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer sample", description="Generate images: a grid, or a file each.")
    checkpoint_arguments(parser)
    parser.add_argument("--count", metavar="N", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the latents (default: 0)")
    parser.add_argument(
        "--truncation", metavar="X", type=float,
        help="less varied, more typical: draw latents from within so many standard deviations, or multiply StyleGAN's "
        "distance from its mean style by it (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--class", metavar="NAME", dest="label", help="name or number of the class (default: all in turn)"
    )
    parser.add_argument(
        "--out", metavar="PATH", default="samples.png",
        help="FILE.png for a grid, else a folder for a file each; may be a URL (default: samples.png)",
    )  # fmt: skip
    options = parser.parse_args(words)
    if options.count < 1 or (options.truncation is not None and not options.truncation > 0):
        raise UserError("sample: --count must be 1 or more and --truncation above 0")
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    workload = trained.workload.eval()
    if not workload.generates:
        name = trained.config.workload.name
        raise UserError(f"{options.checkpoint}: {name} generates nothing: give the run of a GAN")
    label = _class_of(options.label, trained)
    batches = []
    for start in range(0, options.count, 256):
        rows = slice(start, min(start + 256, options.count))
        batches.append(
            workload.samples(Draws(options.seed, ("sample",), rows, torch.device("cpu")), label, options.truncation)
        )
    samples = torch.cat([images for images in batches if isinstance(images, Tensor)])
    folder_name, _, name = options.out.rpartition("/")
    if name.lower().endswith(".png"):
        title = f"{trained.data.name}, {trained.config.workload.name}, step {trained.step}"
        Storage(folder_name or ".").write(name, render.render(render.from_samples(samples, title)))
        say(f"{options.count} samples of step {trained.step}: {options.out}")
        return 0
    if trained.images.mixture:
        raise UserError(f"--out: {options.out!r}: points are not images: give a FILE.png")
    target = Storage(options.out)
    for index, image in enumerate(samples):
        target.write(f"{index:05d}.png", render.plain(image))
    say(f"{options.count} samples of step {trained.step}: {options.out.rstrip('/')}/00000.png and on")
    return 0
