"""Pictures as PNG: learning curves, confusion matrix, grids of images."""

from __future__ import annotations

import io
import math
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


def learning_curves(records: list[dict[str, Any]], title: str) -> bytes:
    """Every metric against the epoch; training and held-out values of one name share a panel."""
    hidden = {"step", "kind", "epoch", "steps_per_epoch", "data_wait", "gpu_memory_bytes"}
    names = list(dict.fromkeys(n for r in records for n in r if n not in hidden and n != "top5_accuracy"))
    names = names[:9] or ["loss"]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(4.2 * columns, 2.8 * rows + 0.3)
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        for kind, color, label in (("train", BLUE, "training"), ("evaluate", ORANGE, "held out")):
            points = [(r["epoch"], r[name]) for r in records if r["kind"] == kind and name in r]
            if points:
                marker = "o" if kind == "evaluate" else None
                axes.plot(
                    *zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3, linewidth=1.3
                )
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        values = [r[name] for r in records if name in r and r[name] > 0]
        if name.endswith("loss") and values and max(values) > 20 * min(values):
            axes.set_yscale("log")
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
    side = min(max(4.5, 0.55 * count + 2), 14)
    figure = _figure(side, side)
    axes = figure.subplots()
    shares = matrix.values.double() / matrix.values.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)  # the root makes rare mistakes visible
    axes.set_title(matrix.title, fontsize=11)
    axes.set_xlabel(matrix.column_axis)
    axes.set_ylabel(matrix.row_axis)
    ticks = range(0, count, max(1, count // 25))
    names = [matrix.labels[i] for i in ticks]
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    if count <= 20:
        for i in range(count):
            for j in range(count):
                if value := int(matrix.values[i, j]):
                    color = "white" if shares[i, j] > 0.35 else "black"
                    axes.text(j, i, str(value), ha="center", va="center", fontsize=7, color=color)
    return _png(figure)


def _grid(grid: ImageGrid) -> bytes:
    count = len(grid.images)
    columns = min(8, math.ceil(math.sqrt(count * 1.5)))
    rows = math.ceil(count / columns)
    lines = max((c.count("\n") + 1 for c in grid.captions), default=0)
    figure = _figure(1.35 * columns, (1.25 + 0.17 * lines) * rows + 0.4)
    figure.suptitle(grid.title, fontsize=11)
    for axes in (panels := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for index, image in enumerate(grid.images.clamp(0, 1)):
        axes = panels.flat[index]
        pixels = image.permute(1, 2, 0).float()
        axes.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation="nearest")
        if grid.captions:
            axes.set_title(grid.captions[index], fontsize=7)
    return _png(figure)


def from_samples(samples: Tensor, title: str) -> ImageGrid:
    """Generated images (N, C, H, W) in [-1, 1] as a grid."""
    return ImageGrid(samples.float().cpu() * 0.5 + 0.5, (), title)
