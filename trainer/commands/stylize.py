"""`stylize`: the content of one image in the style of another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.options import UserError
from ..pixels.layers import LayeredNetwork, ends_of_stages
from ..pixels.style import Style, Target, stylize
from ..run.layered import open_layered
from .common import Parser, say
from .pictures import (
    NETWORK,
    SIDE,
    SMALLEST,
    PictureFile,
    check_layers,
    choose_device,
    number,
    number_arguments,
    picture_arguments,
    read_picture,
)


def _parser() -> Parser:
    usual = Style((), "")
    parser = Parser(
        "python -m trainer stylize", allow_abbrev=False,
        description="Style transfer: the content of one image in the textures of another, as a trained network sees "
        "them. The layers have names: python -m trainer dream RUN --list-layers.",
    )  # fmt: skip
    parser.add_argument("content", metavar="CONTENT", help="image file that says what is where")
    parser.add_argument("style", metavar="STYLE", help="image file with the textures and colours")
    parser.add_argument("--features", metavar="RUN", required=True, help=NETWORK)
    parser.add_argument(
        "--layers", metavar="NAME", nargs="+",
        help="whose Gram matrices are the style (default: the last at each resolution with convolutions)",
    )  # fmt: skip
    parser.add_argument(
        "--content-layer", metavar="NAME", help="whose activations are the content (default: the last but one of these)"
    )
    number_arguments(parser, usual, (
        ("style-weight", number(float, 0), "weight of the difference in style"),
        ("content-weight", number(float, 0), "weight of the difference in content: more keeps more of the image"),
        ("tv", number(float, 0), "weight of the total variation: more is smoother"),
        ("steps", number(int, 1), "steps of the optimizer"),
        ("rate", number(float, 1e-5, 1), "learning rate of adam"),
    ))  # fmt: skip
    parser.add_argument("--optimizer", metavar="NAME", default=usual.optimizer, choices=["lbfgs", "adam"],
                        help=f"lbfgs | adam (default: {usual.optimizer})")  # fmt: skip
    parser.add_argument("--style-size", metavar="N", type=SIDE,
                        help="longer side of the style: smaller makes finer strokes (default: as --size)")  # fmt: skip
    picture_arguments(parser, "stylized.png")
    return parser


def main(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    network = open_layered(options.features, choose_device(options.device))
    wish = _wish(options, network)
    file = PictureFile(options.out)
    content = read_picture(options.content, options.size, network)
    style = read_picture(options.style, options.style_size or options.size, network)
    for name, image in ((options.content, content), (options.style, style)):
        _check_size(name, image, wish, network)
    target = Target(network, content, style, wish)
    before, after = _show(0, target, content), 0.0
    for step, picture in stylize(target, content):
        after = _show(step, target, picture)
    file.write(picture, f"style loss from {before:.4g} to {after:.4g}")
    return 0


@torch.no_grad()
def _show(step: int, target: Target, picture: Tensor) -> float:
    """A line about the picture; its style loss."""
    losses = target.losses(picture)
    say(f"step {step}/{target.wish.steps}  style {losses.style:.4g}  content {losses.content:.4g}")
    return float(losses.style)


def _wish(options: argparse.Namespace, network: LayeredNetwork) -> Style:
    stages = ends_of_stages(network.layers)
    if not stages:
        raise UserError(f"--features: {options.features} has no convolutions at more than one place: give another")
    layers = options.layers or stages
    content_layer = options.content_layer or stages[max(0, len(stages) - 2)]
    check_layers("--layers", layers, network)
    check_layers("--content-layer", [content_layer], network)
    for layer in network.layers:
        if layer.name in layers and not layer.grid:
            raise UserError(f"--layers: {layer.name} has no rows and columns, so no textures: use an earlier layer")
    return Style(tuple(dict.fromkeys(layers)), content_layer, options.style_weight, options.content_weight,
                 options.tv, options.steps, options.optimizer, options.rate)  # fmt: skip


def _check_size(name: str, image: Tensor, wish: Style, network: LayeredNetwork) -> None:
    height, width = image.shape[2:]
    if min(height, width) < SMALLEST:
        raise UserError(
            f"{name}: {width} x {height} pixels are too few: use a size at which both are {SMALLEST} or more"
        )
    if reason := network.takes(height, width, wish.layers):
        raise UserError(f"{name}: the layers take no image of {width} x {height} pixels ({reason}): use another size")
