"""What a workload can show: scalars, grids, animations, points, tables. Values only; tracking/ draws them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """Pictures, with a caption each or edge to edge. `images` are (N, C, H, W) in [0, 1]."""

    images: Tensor
    captions: tuple[str, ...] = ()
    title: str = ""
    columns: int | None = None
    rows: tuple[str, ...] = ()  # names of the rows of pictures that are edge to edge


@dataclass(frozen=True)
class Panels:
    """Grids beside each other."""

    grids: tuple[ImageGrid, ...]


@dataclass(frozen=True)
class Points:
    """Real and generated points in the plane, each (N, 2) in [0, 1]."""

    real: Tensor
    generated: Tensor
    title: str


@dataclass(frozen=True)
class Matrix:
    """A table of counts, (rows, columns)."""

    values: Tensor
    labels: tuple[str, ...]
    title: str
    row_axis: str
    column_axis: str


@dataclass(frozen=True)
class Animation:
    """Pictures that move together, in a grid, without end. `frames` are (frames, N, C, H, W) in [0, 1]."""

    frames: Tensor
    columns: int | None = None


Figure = ImageGrid | Panels | Points | Matrix | Animation


@dataclass(frozen=True)
class ScalarDisplay:
    """How a logged scalar is shown. Panels and the console follow the order in which a workload lists its scalars."""

    on_console: bool = False
    label: str = ""  # on the console; default: the scalar's name
    healthy_range: tuple[float, float] | None = None  # where the values of a stable run lie, for the plots
    baseline: str = ""  # the scalar that is a line in this one's plot, and has no plot of its own
