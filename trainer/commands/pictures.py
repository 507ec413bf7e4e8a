"""What the commands that make pictures share: reading an image, naming layers, writing the result."""

from __future__ import annotations

import argparse
import difflib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.options import UserError
from ..data.decoding import BadSample, decode
from ..pixels.layers import LayeredNetwork
from ..storage.objects import Storage
from .common import say

SMALLEST, LARGEST = 16, 8192  # pixels along a side
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
NETWORK = (
    "URL of a classifier's run or of a checkpoint in it (else the best is taken), or torchvision:NAME:FILE for a "
    "network of torchvision with your own file of weights (.safetensors, or a state dict as .pth)"
)
SHOWN = 40  # names of layers in a message


def number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """What argparse makes a number of, within bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            bounds = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} should be {bounds}")
        return value

    parse.__name__ = kind.__name__  # for what argparse says of a text that is no number
    return parse


SIDE = number(int, SMALLEST, LARGEST)


Number = tuple[str, Callable[[str], float], str]  # a flag's name, what makes a number of its text, and its help


def number_arguments(parser: argparse.ArgumentParser, usual: object, numbers: Sequence[Number]) -> None:
    """A flag for each number; its default is the attribute of that name."""
    for name, kind, text in numbers:
        default = getattr(usual, name.replace("-", "_"))
        parser.add_argument(f"--{name}", metavar="N", type=kind, default=default, help=f"{text} (default: {default})")


def picture_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--size", metavar="N", type=SIDE, default=384, help="longer side in pixels (default: 384)")
    parser.add_argument(
        "--out", metavar="FILE", default=out, help=f".png or .jpg to write to; may be a URL (default: {out})"
    )
    parser.add_argument(
        "--device", metavar="NAME", default="auto", choices=["auto", "cpu"],
        help="auto | cpu; auto is the accelerator where there is one (default: auto)",
    )  # fmt: skip


def choose_device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else None
    return accelerator or torch.device("cpu")


def read_picture(name: str, size: int, network: LayeredNetwork) -> Tensor:
    """An image file as (1, C, H, W) in [0, 1], of this longer side, upright and in the colours that the network knows;
    raises UserError."""
    from PIL import Image

    try:
        image = decode(Path(name).read_bytes(), name, network.channels)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except BadSample as error:
        raise UserError(f"{error}: repair it, or give another image") from None
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, -1)
    return torch.from_numpy(pixels.copy()).to(network.device).permute(2, 0, 1)[None].contiguous().float() / 255


def check_layers(flag: str, names: Sequence[str], network: LayeredNetwork) -> None:
    """Raises UserError for what is no layer."""
    known = [layer.name for layer in network.layers]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 5, cutoff=0.3)
            listed = known if len(known) <= SHOWN else [*near, "... (all: python -m trainer dream RUN --list-layers)"]
            raise UserError(f"{flag}: {name!r} is no layer of this network; layers: {', '.join(listed)}")


class PictureFile:
    """Where a picture goes. Made, and tried, before the work that the picture takes; raises UserError, StorageError."""

    def __init__(self, url: str) -> None:
        folder, _, self.name = url.rpartition("/")
        self.url, self.format = url, FORMATS.get(Path(self.name).suffix.lower())
        if self.format is None:
            raise UserError(f"--out: {url!r} must end in {', '.join(FORMATS)}")
        self.folder = Storage(folder or ".")
        self.folder.probe()

    def write(self, picture: Tensor, what: str) -> None:
        """A picture (1, C, H, W) in [0, 1], and a line about it."""
        from PIL import Image

        pixels = (picture[0].cpu() * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        buffer = io.BytesIO()
        image.save(buffer, self.format, quality=90)
        self.folder.write(self.name, buffer.getvalue())
        colours = "" if picture.shape[1] == 3 else ", grey as the network's images"
        say(f"{what}: {self.url}, {image.width} x {image.height} pixels{colours}")
