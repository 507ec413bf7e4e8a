"""Pictures as PNG, those that move as GIF: learning curves, confusion matrix, grids of images."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..figures import Animation, Figure, ImageGrid, Matrix, Panels, Points, ScalarDisplay

BLUE, ORANGE, GREY, GREEN = "#3465a4", "#d9730d", "#888888", "#2e8b57"
TILE, SHEET = 56, 220  # least pixels of a picture in a grid without captions, and of the grid
CAPTIONED = 150  # at most, of a picture below a caption


def _panels_of_axes(
    rows: int, columns: int, width: float, height: float, margins: tuple[float, float, float, float], header: float = 0
) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns): panels of so many inches below a header, each with its own margins.

    The margins are left, right, bottom, top. matplotlib could find them itself, for four times the time of a drawing.
    """
    from matplotlib.figure import Figure

    left, right, bottom, top = margins
    full_width, full_height = columns * width, rows * height + header
    figure = Figure(figsize=(full_width, full_height), dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=left / full_width, right=1 - right / full_width, bottom=bottom / full_height,
        top=1 - (header + top) / full_height, wspace=(left + right) / (width - left - right),
        hspace=(bottom + top) / (height - bottom - top),
    )  # fmt: skip
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _short(text: str, length: int) -> str:
    """At most so many characters; the middle goes, since names and percentages differ at their ends."""
    return text if len(text) <= length else f"{text[: length - 6].rstrip()}…{text[-5:].lstrip()}"


def _panels(records: list[dict[str, Any]], scalars: Mapping[str, ScalarDisplay]) -> list[str]:
    """The metrics that get a panel: those of `scalars` in their order, then what is held out, then losses; speed and
    learning rate last."""
    hidden = {"step", "kind", "epoch", "steps_per_epoch", "data_wait", "gpu_memory_bytes", "top5_accuracy"}
    hidden |= {name for record in records for name in record if name.startswith(("fid_floor@", "fid_shuffled@"))}
    hidden |= {display.baseline for display in scalars.values()}
    names = list(dict.fromkeys(name for record in records for name in record if name not in hidden))
    evaluated = {name for record in records if record["kind"] == "evaluate" for name in record}
    last, listed = ("lr", "samples_per_second"), list(scalars)

    def order(name: str) -> tuple[Any, ...]:
        base = name.partition("@")[0]
        first = listed.index(base) if base in listed else len(listed)
        return (name in last, first, name not in evaluated, not name.endswith("loss"))

    return sorted(names, key=order)[:12] or ["loss"]


def learning_curves(
    records: list[dict[str, Any]], title: str, scalars: Mapping[str, ScalarDisplay] = {}
) -> bytes:  # fmt: skip
    """Every metric against the epoch; training and held-out values of one name share a panel."""
    names = _panels(records, scalars)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    lines = textwrap.wrap(title, 42 * columns)
    figure, panels = _panels_of_axes(rows, columns, 4.2, 2.8, (0.65, 0.15, 0.5, 0.35), 0.1 + 0.2 * len(lines))
    figure.suptitle("\n".join(lines), fontsize=12, y=1 - 0.08 / figure.get_figheight())
    for axes, name in zip(panels.flat, names, strict=False):
        _plot_metric(axes, name, records, scalars.get(name, ScalarDisplay()))
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    return _png(figure)


def _plot_metric(axes: Any, name: str, records: list[dict[str, Any]], display: ScalarDisplay) -> None:
    """One panel of the learning curves."""
    values: list[float] = []
    for kind, color, label in (("train", BLUE, "training"), ("evaluate", ORANGE, "held out")):
        points = [(r["epoch"], r[name]) for r in records if r["kind"] == kind and name in r]
        finite = [value for _, value in points if math.isfinite(value)]
        if finite:
            marker = "o" if kind == "evaluate" or len(finite) < 3 else None
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3, linewidth=1.3)
        values += finite
    if display.healthy_range and values:
        axes.axhspan(*display.healthy_range, color=GREEN, alpha=0.12, label="usual when stable")
    if name.startswith("fid@") and (floor := records[-1].get(name.replace("fid@", "fid_floor@"))):
        axes.axhline(floor, color=GREY, linewidth=1, linestyle="--", label="real against real")
    if baseline := [record[display.baseline] for record in records if display.baseline in record]:
        axes.axhline(baseline[-1], color=GREY, linewidth=1, linestyle="--", label=display.baseline.replace("_", " "))
    spans_decades = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    if spans_decades and (name.endswith("loss") or name.startswith("fid@")):
        axes.set_yscale("log")
    if not values:
        axes.text(0.5, 0.5, "no finite value", ha="center", color=GREY, transform=axes.transAxes)
    metric, at, features = name.partition("@")
    axes.set_title(_short(metric.replace("_", " ") + at + features, 34), fontsize=10)
    axes.set_xlabel("epoch", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) + len(axes.patches) > 1:
        axes.legend(fontsize=8, frameon=False)


def suffix(picture: bytes) -> str:
    return "gif" if picture.startswith(b"GIF") else "png"


def render(picture: Figure) -> bytes:
    if isinstance(picture, Animation):
        return _gif([_tiled(ImageGrid(frame, columns=picture.columns)) for frame in picture.frames])
    if isinstance(picture, Matrix):
        return _matrix(picture)
    if isinstance(picture, Points):
        return _points(picture)
    if isinstance(picture, ImageGrid) and picture.captions:
        return _grid(picture)
    return _panels_of_tiles(picture.grids if isinstance(picture, Panels) else (picture,))


def _points(points: Points) -> bytes:
    """Real points below, generated ones above."""
    figure, ((axes,),) = _panels_of_axes(1, 1, 5, 5.3, (0, 0, 0, 0.3))
    axes.scatter(*points.real[:, :2].numpy().T, s=5, color=GREY, alpha=0.5, linewidths=0, label="real")
    axes.scatter(*points.generated[:, :2].numpy().T, s=5, color=ORANGE, alpha=0.6, linewidths=0, label="generated")
    axes.set_aspect("equal")
    if len(points.real):
        low, high = float(points.real.min()), float(points.real.max())
        axes.set_xlim(low - 0.15 * (high - low), high + 0.15 * (high - low))
        axes.set_ylim(*axes.get_xlim())
    axes.set_axis_off()
    axes.legend(fontsize=8, frameon=False, loc="upper center", ncols=2)
    axes.set_title(points.title, fontsize=10)
    return _png(figure)


def _panels_of_tiles(grids: Sequence[ImageGrid]) -> bytes:
    """Grids of pictures edge to edge, magnified by whole numbers, side by side below their titles."""
    from PIL import Image, ImageDraw, ImageFont

    gap, header = 12, 24
    tiled = [_tiled(grid) for grid in grids]
    font = ImageFont.load_default(13)
    named = [[_short(name, 20) for name in grid.rows] for grid in grids]
    margins = [gap + (math.ceil(max(map(font.getlength, names))) + gap // 2 if names else 0) for names in named]
    width = sum(image.width for image in tiled) + sum(margins) + gap
    canvas = Image.new("RGB", (width, max(image.height for image in tiled) + header + gap), "white")
    draw, x = ImageDraw.Draw(canvas), 0
    for grid, image, names, margin in zip(grids, tiled, named, margins, strict=True):
        x += margin
        for row, name in enumerate(names):
            draw.text((x - gap // 2, header + image.height * (row + 0.5) / len(names)), name, "black", font, "rm")
        draw.text((x, 5), _short(grid.title, max(image.width // 7, 12)), fill="black", font=font)
        canvas.paste(image, (x, header))
        x += image.width
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tiled(grid: ImageGrid) -> Any:
    import torch
    from PIL import Image

    count, channels, height, width = grid.images.shape
    columns = grid.columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    blank = torch.ones(rows * columns, channels, height + 1, width + 1)
    blank[:count, :, :height, :width] = grid.images.float().nan_to_num().clamp(0, 1)
    sheet = blank.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = (sheet[:-1, :-1].expand(-1, -1, 3) * 255).round().to(torch.uint8).numpy()
    scale = max(1, math.ceil(TILE / height), math.ceil(SHEET / min(pixels.shape[:2])))
    return Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST)


def animation(frames: Sequence[bytes]) -> bytes:
    """PNGs of one size as an animated GIF; the last one stays for a while."""
    from PIL import Image

    return _gif([Image.open(io.BytesIO(frame)) for frame in frames], pause=2000)


def _gif(images: Sequence[Any], pause: int = 150) -> bytes:
    """Images of one size, 150 milliseconds each; the last one stays for `pause`."""
    from PIL import Image

    frames = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in images]
    buffer = io.BytesIO()
    durations = [150] * (len(frames) - 1) + [pause]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _matrix(matrix: Matrix) -> bytes:
    """Counts as colours, relative to their row; numbers where there is room."""
    count = len(matrix.labels)
    ticks = range(0, count, max(1, math.ceil(count / 25)))
    names = [_short(matrix.labels[i], 22) for i in ticks]
    longest = max(map(len, names))
    labels = 0.07 * longest + 0.65
    side = min(max(3.0, 0.55 * count), 12) + labels
    figure, ((axes,),) = _panels_of_axes(1, 1, side, side, (labels - 0.1, 0.1, labels - 0.2, 0.3))
    shares = matrix.values.double() / matrix.values.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)  # the root makes rare mistakes visible
    axes.set_title(_short(matrix.title, int(11 * side)), fontsize=11)
    axes.set_xlabel(matrix.column_axis)
    axes.set_ylabel(matrix.row_axis)
    axes.set_xticks(ticks, names, rotation=90 if longest > 3 else 0, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    if count <= 20:
        for i in range(count):
            for j in range(count):
                if value := int(matrix.values[i, j]):
                    color = "white" if shares[i, j] > 0.35 else "black"
                    size = 7 if count > 4 else 11
                    axes.text(j, i, str(value), ha="center", va="center", fontsize=size, color=color)
    return _png(figure)


def _grid(grid: ImageGrid) -> bytes:
    """Images in rows, each below its caption, magnified without smoothing."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    # Its font has more alphabets than that of PIL; a figure with as many axes would take seconds to draw.
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    gap, font, title_font = 12, ImageFont.truetype(path, 11), ImageFont.truetype(path, 15)
    images = [_magnified(image) for image in grid.images.float().nan_to_num().clamp(0, 1)]
    captions = [[_short(line, 23) for line in text.split("\n")] for text in grid.captions]
    columns = min(8, math.ceil(math.sqrt(len(images) * 1.5))) if len(images) > 1 else 1
    caption_height = 15 * max(map(len, captions))
    longest = max(font.getlength(line) for lines in captions for line in lines)
    width, height = max(images[0].width, math.ceil(longest)) + gap, caption_height + images[0].height + gap
    full_width = max(columns * width + gap, SHEET)
    title = textwrap.wrap(grid.title, full_width // 9)
    header = 22 * len(title) + gap
    canvas = Image.new("RGB", (full_width, max(header + math.ceil(len(images) / columns) * height, SHEET)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((full_width / 2, gap / 2), "\n".join(title), "black", title_font, "ma", align="center")
    for index, (image, lines) in enumerate(zip(images, captions, strict=True)):
        middle, top = full_width / 2 + (index % columns + 0.5 - columns / 2) * width, header + index // columns * height
        for row, line in enumerate(lines, max(map(len, captions)) - len(lines)):
            draw.text((middle, top + 15 * row), line, "black", font, "ma")
        canvas.paste(image, (round(middle - image.width / 2), top + caption_height))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _magnified(image: Tensor) -> Any:
    """An image (C, H, W) in [0, 1], by a whole number or, where it is large, reduced."""
    from PIL import Image

    pixels = (image.permute(1, 2, 0).expand(-1, -1, 3) * 255).round().byte().numpy()
    side = max(pixels.shape[:2])
    if side > CAPTIONED:
        return Image.fromarray(pixels).resize((CAPTIONED, CAPTIONED), Image.Resampling.BOX)
    scale = CAPTIONED // side
    return Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST)


def plain(image: Tensor) -> bytes:
    """One image (C, H, W) in [-1, 1] as a PNG of its own size."""
    from PIL import Image

    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy() if len(image) == 3 else pixels[..., 0].numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def from_samples(samples: Tensor, title: str) -> Figure:
    """Generated images (N, C, H, W) in [-1, 1] as a grid; points as points."""
    images = samples.float().cpu() * 0.5 + 0.5
    if images.shape[-1] == 1:
        return Points(images[:0].flatten(1), images.flatten(1), title)
    return ImageGrid(images, (), title)
