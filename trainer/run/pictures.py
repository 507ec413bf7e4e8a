"""The pictures of a run, as files and for the tracker. None of them can fail the run."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable

from torch import Tensor

from ..boundary import Boundary
from ..figures import Figure
from ..metrics.evaluator import Totals
from ..nn.row_state import fresh_rows
from ..storage.objects import Storage, StorageError
from ..tracking import render
from ..tracking.tracker import Tracker
from ..workload import Workload

FRAMES = 120  # at most, of the animation of the samples


class Pictures:
    def __init__(self, storage: Storage, tracker: Tracker, name: str) -> None:
        self.storage, self.tracker, self.name = storage, tracker, name

    def show(self, step: int, samples: Tensor | str | Figure) -> None:
        """Generated samples, as a grid, as text or as the workload shows them."""
        file = f"step-{step:08d}"
        if isinstance(samples, str):
            self.add(step, f"{file}.txt", samples.encode())
            return
        title = f"{self.name}, step {step}"
        figure = render.from_samples(samples, title) if isinstance(samples, Tensor) else samples
        self.draw(step, file, lambda: render.render(figure), "samples")

    def draw(self, step: int, file: str, make: Callable[[], bytes], name: str = "") -> None:
        """Keep the picture that a function draws."""
        try:
            data = make()
        except Exception:
            self._warn_of_failure(file)
        else:
            self.add(step, file, data, name)

    def figures(self, workload: Workload, boundary: Boundary, totals: Totals) -> dict[str, Figure]:
        """What the workload has to show; nothing where it fails."""
        try:
            with fresh_rows(workload, boundary.limits.sample_count):
                return workload.figures(totals, boundary.loader.pixels, boundary.fixed_draws())
        except Exception:
            self._warn_of_failure("the workload's figures")
            return {}

    def _warn_of_failure(self, what: str) -> None:
        self.tracker.note(f"warning: {what} could not be drawn:\n{traceback.format_exc().rstrip()}")

    def add(self, step: int, file: str, data: bytes, name: str = "") -> None:
        """Keep a file; one without a suffix is a picture, to be shown under its name."""
        picture = "." not in file
        path = f"{file}.{render.suffix(data)}" if picture else file
        try:
            self.storage.write(f"samples/{path}", data)
        except StorageError as error:
            self.tracker.note(f"warning: {error}")
        if picture:
            self.tracker.image(step, name or file, data)

    def animate(self, step: int) -> None:
        """The grids of samples up to a step, one after the other."""
        try:
            names = sorted(name for name in self.storage.list("samples") if re.fullmatch(r"step-\d{8,}\.png", name))
            names = [name for name in names if int(name[5:-4]) <= step]
            names = [names[i * len(names) // FRAMES] for i in range(FRAMES)] if len(names) > FRAMES else names
            if len(names) > 1:
                frames = [self.storage.read(f"samples/{name}") for name in names]
                self.add(step, "training.gif", render.animation(frames))
        except (StorageError, OSError) as error:  # OSError: PIL cannot read a frame
            self.tracker.note(f"warning: samples/training.gif was not made: {error}")
