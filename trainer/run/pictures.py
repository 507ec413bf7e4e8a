"""The pictures of a run, as files and for the tracker. None of them can fail the run."""

from __future__ import annotations

import re

from torch import Tensor

from ..storage.objects import Storage, StorageError
from ..tracking import render
from ..tracking.tracker import Tracker

FRAMES = 120  # at most, of the animation of the samples


class Pictures:
    def __init__(self, storage: Storage, tracker: Tracker, name: str) -> None:
        self.storage, self.tracker, self.name = storage, tracker, name

    def show(self, step: int, samples: Tensor | str) -> None:
        """Generated samples, as a grid."""
        if isinstance(samples, Tensor):
            figure = render.from_samples(samples, f"{self.name}, step {step}")
            self.add(step, f"step-{step:08d}", render.render(figure), "samples")

    def add(self, step: int, file: str, data: bytes, name: str = "") -> None:
        """Keep a picture, and show it under its name; PNG unless the file says otherwise."""
        path = file if "." in file else f"{file}.png"
        try:
            self.storage.write(f"samples/{path}", data)
        except StorageError as error:
            self.tracker.note(f"warning: {error}")
        if path.endswith(".png"):
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
