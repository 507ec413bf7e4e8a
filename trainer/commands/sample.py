"""`sample`: images of a generator, or text of a language model."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..config.options import UserError
from ..figures import Figure
from ..randomness import Draws
from ..run.build import open_run_data, recipe
from ..run.opened import Trained, open_run
from ..storage.objects import Storage
from ..tracking import render
from .common import Parser, checkpoint_arguments, say

FLAGS = {  # by the kind of samples that they are for
    "images": ("class", "truncation"),
    "translations": ("data-root",),
    "text": ("prompt", "length", "temperature"),
}
RULE = "-" * 40  # between two texts


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
    parser = Parser(
        "python -m trainer sample", description="Generate images, in a grid or a file each, or text, on the terminal."
    )
    checkpoint_arguments(parser)
    parser.add_argument("--count", metavar="N", type=int, help="how many (default: 64 images, or 1 text)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the latents or the choices (default: 0)")
    parser.add_argument(
        "--out", metavar="PATH",
        help="FILE.png for a grid or FILE.txt for all texts, else a folder for a file each; may be a URL "
        "(default: samples.png, and the terminal for text)",
    )  # fmt: skip
    parser.add_argument(
        "--truncation", metavar="X", type=float,
        help="images: less varied, more typical: draw latents from within so many standard deviations, or multiply "
        "StyleGAN's distance from its mean style by it (default: all)",
    )  # fmt: skip
    parser.add_argument("--class", metavar="NAME", help="images: name or number of the class (default: all in turn)")
    parser.add_argument("--data-root", metavar="DIR", help="translations: where the held-out images are")
    parser.add_argument("--prompt", metavar="TEXT", help="text: what it begins with (default: the end of a line)")
    parser.add_argument("--length", metavar="N", type=int, help="text: how many tokens to add (default: 500)")
    parser.add_argument(
        "--temperature", metavar="X", type=float,
        help="text: below 1 more typical, above 1 more varied, 0 the likeliest (default: 0.8)",
    )  # fmt: skip
    options = parser.parse_args(words)
    _check(options)
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    workload, name = trained.workload.eval(), trained.config.workload.name
    if not (workload.generates or workload.writes):
        raise UserError(f"{options.checkpoint}: {name} generates nothing: give the run of a GAN or of a language model")
    kind = "text" if workload.writes else "translations" if workload.directions else "images"
    for other, flags in FLAGS.items():
        for flag in flags:
            if other != kind and getattr(options, flag.replace("-", "_")) is not None:
                raise UserError(f"--{flag}: {name} gives {kind}, not {other}: leave it out")
    count = options.count or (1 if kind == "text" else 64)
    write = {"images": _images, "translations": _translations, "text": _texts}[kind]
    if where := write(trained, count, options):
        say(f"{count} samples of step {trained.step}: {where}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for a number that is out of range."""
    for flag, low in (("count", 1), ("length", 1), ("temperature", 0)):
        value = getattr(options, flag)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{flag}: {value} must be {low} or more")
    if options.truncation is not None and not options.truncation > 0:
        raise UserError(f"--truncation: {options.truncation} must be above 0")


def _images(trained: Trained, count: int, options: argparse.Namespace) -> str:
    """Write images; returns where they are."""
    workload, out = trained.workload, options.out or "samples.png"
    label = _class_of(getattr(options, "class"), trained)
    batches = []
    for start in range(0, count, 256):
        rows = slice(start, min(start + 256, count))
        batches.append(
            workload.samples(Draws(options.seed, ("sample",), rows, torch.device("cpu")), label, options.truncation)
        )
    samples = torch.cat([images for images in batches if isinstance(images, Tensor)])
    if trained.images.mixture and not out.lower().endswith(".png"):
        raise UserError(f"--out: {out!r}: points are not images: give a FILE.png")
    title = f"{trained.data.name}, {trained.config.workload.name}, step {trained.step}"
    return _write(out, ".png", lambda: render.render(render.from_samples(samples, title)), map(render.plain, samples))


@torch.no_grad()
def _translations(trained: Trained, count: int, options: argparse.Namespace) -> str:
    """Write held-out images and what is made of them, in one picture; returns where it is."""
    out = options.out or "samples.png"
    if not out.lower().endswith(".png"):
        raise UserError(f"--out: {out!r}: give a FILE.png for held-out images; `translate` writes a file each")
    parts = recipe(trained.config, 1, data=open_run_data(trained.config, options.data_root), workload=trained.workload)
    draws = Draws(options.seed, ("sample",), slice(0, count), torch.device("cpu"))
    figure = trained.workload.shown(parts.plain_loader(count).held_out, draws)
    assert isinstance(figure, Figure)
    return _write(out, ".png", lambda: render.render(figure), ())


def _texts(trained: Trained, count: int, options: argparse.Namespace) -> str:
    """Write texts; returns where they are, '' where that is the terminal."""
    draws = Draws(options.seed, ("sample",), slice(0, count), torch.device("cpu"))
    temperature = 0.8 if options.temperature is None else options.temperature
    try:
        texts = trained.workload.write(draws, options.prompt or "", options.length or 500, temperature)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    whole = f"\n{RULE}\n".join(texts)
    if options.out is None:
        say(whole)
        return ""
    return _write(options.out, ".txt", lambda: f"{whole}\n".encode(), (f"{text}\n".encode() for text in texts))


def _write(out: str, suffix: str, whole: Callable[[], bytes], parts: Iterable[bytes]) -> str:
    """All in one file where `out` has that suffix, else a file each in a folder; returns where they are."""
    folder, _, name = out.rpartition("/")
    if name.lower().endswith(suffix):
        Storage(folder or ".").write(name, whole())
        return out
    if name.lower().endswith((".png", ".txt")):
        raise UserError(f"--out: {out!r}: give a FILE{suffix}, or a folder for a file each")
    target = Storage(out)
    for index, part in enumerate(parts):
        target.write(f"{index:05d}{suffix}", part)
    return f"{out.rstrip('/')}/00000{suffix} and on"
