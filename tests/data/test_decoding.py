"""Pixels are what a person sees: files of the kinds that people have, compared value by value."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from trainer.data.decoding import BadSample, decode

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
TURNED = {  # EXIF orientation, and what it makes of an array
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.transpose(a), 2), 8: np.rot90,
}  # fmt: skip


def saved(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def grey(data: bytes, background: str = "white") -> np.ndarray:
    return np.asarray(decode(data, "file", 1, background))


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "tiff"])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_turned_as_its_camera_was_held(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    more: dict[str, object] = {"webp": {"lossless": True}, "jpeg": {"quality": 100}}.get(kind, {})
    image = decode(saved(Image.fromarray(GREY), kind, exif=exif, **more), "file", 1)
    expected = TURNED[orientation](GREY)
    assert np.asarray(image).shape == expected.shape
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= (4 if kind == "jpeg" else 0)


@pytest.mark.parametrize(("background", "shade"), [("white", 255), ("black", 0), ("grey", 128)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P key", "RGB key"])
def test_what_is_transparent_shows_the_background(mode: str, background: str, shade: int) -> None:
    """A black icon on nothing: without its alpha it would be all black."""
    alpha = np.zeros((6, 8), np.uint8)
    alpha[2:4, 2:6] = 255
    icon = np.where(alpha > 0, 0, shade).astype(np.uint8)
    if mode in ("RGBA", "LA"):
        image = Image.merge(mode, [Image.new("L", (8, 6), 0)] * (len(mode) - 1) + [Image.fromarray(alpha)])
        data = saved(image, "png")
    else:
        image = Image.fromarray(np.where(alpha > 0, 0, 7).astype(np.uint8))
        if mode == "RGB key":
            data = saved(Image.merge("RGB", [image] * 3), "png", transparency=(7, 7, 7))
        else:
            image = Image.fromarray((alpha > 0).astype(np.uint8), "P")
            image.putpalette([50, 60, 70, 0, 0, 0])
            data = saved(image, "png", transparency=0 if mode == "P key" else bytes([0, 255]))
    assert grey(data, background).tolist() == icon.tolist()


def test_half_transparent_pixels_are_mixed() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert grey(saved(image, "png"), "white").tolist() == [[127] * 4] * 4


DEEP = (np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8)


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "big-endian tiff", "white is zero"])
def test_sixteen_bits_are_scaled_by_their_range(kind: str) -> None:
    if kind == "pgm":
        data = b"P5\n8 6\n65535\n" + DEEP.astype(">u2").tobytes()
    elif kind == "big-endian tiff":
        data = tiff(DEEP.astype(">u2").tobytes(), bits=16, order=">")
    elif kind == "white is zero":
        data = tiff((65535 - DEEP).astype("<u2").tobytes(), bits=16, photometric=0)
    else:
        data = saved(Image.fromarray(DEEP), kind)
    assert grey(data).tolist() == (DEEP >> 8).tolist()


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_of_sixteen_bits_is_turned_as_well(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(DEEP), kind, exif=exif)
    assert grey(data).tolist() == TURNED[orientation](DEEP >> 8).tolist()


def test_a_pgm_of_another_maximum_is_scaled_by_that() -> None:
    data = b"P5\n8 6\n4095\n" + (DEEP >> 4).astype(">u2").tobytes()
    assert np.abs(grey(data).astype(int) - (DEEP >> 8)).max() <= 1


@pytest.mark.parametrize(("pixels", "kind"), [(DEEP.astype(np.int32), "integers"), (DEEP / 65535, "floats")])
def test_what_has_no_known_range_is_refused(pixels: np.ndarray, kind: str) -> None:
    data = saved(Image.fromarray(pixels.astype(np.float32 if kind == "floats" else np.int32)), "tiff")
    with pytest.raises(BadSample, match=f"file: its pixels are 32-bit {kind}, of which nothing says the range"):
        decode(data, "file", 1)


@pytest.mark.parametrize("kind", ["gif", "jpeg2000", "avif"])
def test_formats_that_people_have_are_read(kind: str) -> None:
    if not (kind == "gif" or features.check("jpg_2000" if kind == "jpeg2000" else kind)):
        pytest.skip(f"this build of PIL has no {kind}")
    data = saved(Image.fromarray(GREY), kind)
    assert np.abs(grey(data).astype(int) - GREY).mean() < 4


def test_a_file_that_would_start_a_program_is_none() -> None:
    with pytest.raises(BadSample, match="cannot identify"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "photo.jpg", 3)


def tiff(pixels: bytes, bits: int, order: str = "<", photometric: int = 1) -> bytes:
    """A TIFF of 8x6 grey pixels, whose tags PIL would not write."""
    tags = [(256, 3, 8), (257, 3, 6), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
            (278, 3, 6), (279, 4, len(pixels))]  # fmt: skip
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + (struct.pack(f"{order}HH", value, 0) if kind == 3 else
                                                    struct.pack(f"{order}I", value)) for tag, kind, value in tags
    )  # fmt: skip
    return header + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
