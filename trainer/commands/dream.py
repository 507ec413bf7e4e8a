"""`dream`: an image as a trained network would have it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from ..config.options import UserError
from ..pixels.dream import Dream, dream
from ..pixels.layers import LayeredNetwork, ends_of_stages
from ..run.layered import open_layered
from .common import Parser, say
from .pictures import (
    NETWORK,
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
    usual = Dream("")
    parser = Parser(
        "python -m trainer dream", allow_abbrev=False,
        description="Deep dream: change an image until a layer of a trained network sees more of what it looks for.",
    )  # fmt: skip
    parser.add_argument("network", metavar="RUN", help=NETWORK)
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="image file to start from")
    parser.add_argument("--list-layers", action="store_true", help="show the layers with their channels, and stop")
    parser.add_argument("--layer", metavar="NAME", help="what is strengthened (default: the last with convolutions)")
    parser.add_argument(
        "--channel", metavar="N", type=number(int, 0),
        help="raise the mean of this channel of the layer alone; of the last layer it is a class (default: all)",
    )  # fmt: skip
    number_arguments(parser, usual, (
        ("octaves", number(int, 1), "sizes that are worked on, from small to large: more of them make larger shapes"),
        ("octave-scale", number(float, 1.05, 4), "ratio of two sizes"),
        ("steps", number(int, 1), "steps in each octave"),
        ("rate", number(float, 1e-5, 1), "mean change of a pixel in a step, as a share of white"),
        ("jitter", number(int, 0), "random shift before each step, in pixels at most"),
        ("seed", int, "of the jitter"),
    ))  # fmt: skip
    picture_arguments(parser, "dream.png")
    return parser


def main(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    network = open_layered(options.network, choose_device(options.device))
    if options.list_layers:
        _list(network)
        return 0
    if options.image is None:
        raise UserError("dream: the following arguments are required: IMAGE; see --help")
    wish = _wish(options, network)
    file = PictureFile(options.out)
    image = read_picture(options.image, options.size, network)
    height, width = image.shape[2:]
    _check_sizes(wish, height, width, network)
    with torch.no_grad():
        before = float(wish.objective(network, image))
    for octave, picture in enumerate(dream(network, image, wish), 1):
        with torch.no_grad():
            after = float(wish.objective(network, picture))
        say(f"octave {octave}/{wish.octaves}  {picture.shape[3]} x {picture.shape[2]}  activation {after:.4g}")
    what = wish.layer if wish.channel is None else f"{wish.layer}, channel {wish.channel}"
    file.write(picture, f"activation of {what} from {before:.4g} to {after:.4g}")
    return 0


def _list(network: LayeredNetwork) -> None:
    width = max(len(layer.name) for layer in network.layers)
    side = network.size
    say(f"{'layer':<{width}}  channels, rows and columns for an image of {side} x {side}")
    for layer in network.layers:
        say(f"{layer.name:<{width}}  {' x '.join(map(str, layer.shape))}")


def _wish(options: argparse.Namespace, network: LayeredNetwork) -> Dream:
    if options.layer is not None:
        check_layers("--layer", [options.layer], network)
    name = options.layer or (ends_of_stages(network.layers) or [network.layers[-1].name])[-1]
    channels = next(layer.shape[0] for layer in network.layers if layer.name == name)
    if options.channel is not None and options.channel >= channels:
        raise UserError(f"--channel: {options.channel}: the channels of {name} are 0 to {channels - 1}")
    return Dream(name, options.channel, options.octaves, options.octave_scale, options.steps, options.rate,
                 options.jitter, options.seed)  # fmt: skip


def _check_sizes(wish: Dream, height: int, width: int, network: LayeredNetwork) -> None:
    """Whether the layer takes the smallest and the largest octave; raises UserError."""
    sizes = wish.sizes(height, width)
    if min(sizes[0]) < SMALLEST:
        fit = 1 + math.floor(math.log(max(min(height, width) / SMALLEST, 0.1), wish.octave_scale))
        way_out = f"use {fit} octaves or fewer, or a larger --size" if fit >= 1 else "use a larger --size"
        raise UserError(
            f"--octaves: the smallest of {wish.octaves} would be {sizes[0][1]} x {sizes[0][0]} pixels, below "
            f"{SMALLEST}: {way_out}"
        )
    for rows, columns in (sizes[0], sizes[-1]):
        if reason := network.takes(rows, columns, [wish.layer]):
            raise UserError(
                f"--layer: {wish.layer} takes no image of {columns} x {rows} pixels ({reason}): use an earlier layer, "
                f"or octaves of other sizes; the network was made for {network.size} x {network.size}"
            )
