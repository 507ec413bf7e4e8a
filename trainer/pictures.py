"""Pictures as PNG: learning curves, confusion matrix, grids of images."""

from __future__ import annotations

import io
import math
import textwrap
from typing import Any

from torch import Tensor

from .workload import ImageGrid, Matrix, Picture

BLUE, ORANGE, GREY = "#3465a4", "#d9730d", "#888888"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _short(text: str, length: int) -> str:
    """At most so many characters; the middle goes, since names and percentages differ at their ends."""
    return text if len(text) <= length else f"{text[: length - 6].rstrip()}…{text[-5:].lstrip()}"


def _title(figure: Any, text: str, size: float) -> None:
    """A title that wraps where the figure ends."""
    characters = int(figure.get_figwidth() * 120 / size)  # of average width; 72 points are an inch
    figure.suptitle("\n".join(textwrap.wrap(text, characters)), fontsize=size)


def _panels(records: list[dict[str, Any]]) -> list[str]:
    """The metrics that get a panel: what is held out first, then losses, speed and learning rate last."""
    hidden = {"step", "kind", "epoch", "steps_per_epoch", "data_wait", "gpu_memory_bytes", "top5_accuracy"}
    names = list(dict.fromkeys(name for record in records for name in record if name not in hidden))
    evaluated = {name for record in records if record["kind"] == "evaluate" for name in record}
    last = ("lr", "samples_per_second")
    names.sort(key=lambda name: (name in last, name not in evaluated, not name.endswith("loss")))
    return names[:9] or ["loss"]


def learning_curves(records: list[dict[str, Any]], title: str) -> bytes:
    """Every metric against the epoch; training and held-out values of one name share a panel."""
    names = _panels(records)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(4.2 * columns, 2.8 * rows + 0.3)
    _title(figure, title, 12)
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        shown: list[float] = []
        for kind, color, label in (("train", BLUE, "training"), ("evaluate", ORANGE, "held out")):
            points = [(r["epoch"], r[name]) for r in records if r["kind"] == kind and name in r]
            finite = [value for _, value in points if math.isfinite(value)]
            if finite:
                marker = "o" if kind == "evaluate" or len(finite) < 3 else None
                axes.plot(
                    *zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3, linewidth=1.3
                )
            shown += finite
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name.endswith("loss") and shown and min(shown) > 0 and max(shown) > 20 * min(shown):
            axes.set_yscale("log")
        if not shown:
            axes.text(0.5, 0.5, "no finite value", ha="center", color=GREY, transform=axes.transAxes)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    return _png(figure)


def render(picture: Picture) -> bytes:
    return _matrix(picture) if isinstance(picture, Matrix) else _grid(picture)


def _matrix(matrix: Matrix) -> bytes:
    """Counts as colours, relative to their row; numbers where there is room."""
    count = len(matrix.labels)
    ticks = range(0, count, max(1, math.ceil(count / 25)))
    names = [_short(matrix.labels[i], 22) for i in ticks]
    longest = max(map(len, names))
    side = min(max(3.0, 0.55 * count), 12) + 0.07 * longest + 0.7
    figure = _figure(side, side)
    axes = figure.subplots()
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
    count = len(grid.images)
    columns = min(8, math.ceil(math.sqrt(count * 1.5))) if count > 1 else 1
    rows = math.ceil(count / columns)
    captions = ["\n".join(_short(line, 23) for line in text.split("\n")) for text in grid.captions]
    lines = max((text.count("\n") + 1 for text in captions), default=0)
    figure = _figure(max(1.45 * columns, 3), (1.35 + 0.17 * lines) * rows + 0.4)
    _title(figure, grid.title, 11)
    for axes in (panels := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for index, image in enumerate(grid.images.float().nan_to_num().clamp(0, 1)):
        axes = panels.flat[index]
        axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        if captions:
            axes.set_title(captions[index], fontsize=7)
    return _png(figure)


def from_samples(samples: Tensor, title: str) -> ImageGrid:
    """Generated images (N, C, H, W) in [-1, 1] as a grid."""
    return ImageGrid(samples.float().cpu() * 0.5 + 0.5, (), title)
