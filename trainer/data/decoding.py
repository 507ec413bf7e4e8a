"""An image file to the pixels that a person sees: turned as its camera was held, transparent on a background, and in
8 bits whatever it has."""

from __future__ import annotations

import functools
import io
import re
from typing import Any

import numpy as np

from .dataset import Encoded, reason_of

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jp2",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")  # others may start programs
ORIENTATION, PHOTOMETRIC = 274, 262  # tags of EXIF and TIFF
MAX_PIXELS = 89_000_000  # PIL warns from here on: no photograph, probably a decompression bomb


class BadSample(Exception):
    """A sample cannot be read; the message names its file."""


def decode(data: Encoded, name: str, channels: int, background: str = "white") -> Any:
    """A PIL image in grey or colour; raises BadSample with the same message each time, so that it is counted once."""
    from PIL import Image, ImageOps

    if isinstance(data, BadSample):
        raise data
    if isinstance(data, Exception):
        raise BadSample(f"{name}: {reason_of(data)}")
    try:
        image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        image = ImageOps.exif_transpose(_in_8_bits(image))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # PIL raises whatever its many formats raise
        raise BadSample(f"{name}: {re.sub('<_io.BytesIO object at .*>', 'of it', reason_of(error))}") from None


@functools.cache
def _formats() -> list[str]:
    """Those of them that this build of PIL can read."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _in_8_bits(image: Any) -> Any:
    """Of more bits, by the range that the format has; ValueError where nothing says what that is."""
    from PIL import Image

    if image.mode in ("I", "F") and image.format not in ("PPM", "PNG"):
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(f"its pixels are 32-bit {kind}, of which nothing says the range: save it in 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # white is zero, which PIL heeds in 8 bits
        pixels = 65535 - pixels
    eight = Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
    eight.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return eight
