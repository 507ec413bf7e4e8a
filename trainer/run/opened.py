"""Opening what a run has left: its config, what its data looked like, the weights of a checkpoint."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass

from .. import workloads
from ..config.options import RunConfig, UserError
from ..config.settings import read_yaml
from ..config.user_code import digests
from ..data.description import Description, ImageDescription, from_json
from ..state import load_weights
from ..storage.checkpoint import CheckpointStore, CorruptCheckpoint, folder
from ..storage.metric_log import MetricLog
from ..storage.objects import Storage, StorageError
from ..tracking.console import Console
from ..tracking.tracker import Tracker
from ..workload import Workload


@dataclass(frozen=True)
class Trained:
    """A run's checkpoint, opened."""

    storage: Storage
    step: int
    config: RunConfig
    data: Description
    workload: Workload
    digest: str  # sha256 of the weights

    @property
    def images(self) -> ImageDescription:
        """What its images look like; raises UserError where it is of no images."""
        if not isinstance(self.data, ImageDescription):
            raise UserError(f"{self.storage}: {self.config.workload.name} is not of images: give a run that is")
        return self.data

    @property
    def name(self) -> str:
        return f"{self.storage}/checkpoints/{folder(self.step)}"


class UnreadableDescription(UserError):
    """A run does not say, or no longer in this version, what its data looks like."""


def load_config(text: str, name: str) -> RunConfig:
    """The config that a run directory keeps, alone: neither environment nor flags have a say."""
    values = read_yaml(text, name)
    model = workloads.config_model(str(values.get("workload", {}).get("name", "classifier")))
    try:
        groups = {n: f.annotation for n, f in model.model_fields.items()}
        parsed = {
            n: groups[n].model_validate(v) if n != "code" and isinstance(v, dict) else v  # type: ignore[union-attr]
            for n, v in values.items()
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{name}: not a config of this version: {str(error).splitlines()[0]}") from None
    return model.model_construct(**parsed)


def locate(url: str) -> tuple[Storage, int | None]:
    """A run's storage, and the step where the URL names a checkpoint of it."""
    match = re.fullmatch(r"(.*?)/?checkpoints/step-(\d+)/?", url)
    storage = Storage(match[1] or ".") if match else Storage(url)
    try:
        known = storage.exists("config.yaml")
    except StorageError as error:
        raise UserError(str(error)) from None
    if not known:
        raise UserError(
            f"{url}: no run there: give the URL of a run (it holds config.yaml) or of one of its checkpoints"
        )
    return storage, int(match[2]) if match else None


def history(storage: Storage) -> Tracker:
    """What a run has logged."""
    tracker = Tracker(MetricLog(storage), Console(None))
    tracker.records = [record for segment in tracker.log_.segments() for record in tracker.log_.read(segment)]
    return tracker


def choose_step(storage: Storage, store: CheckpointStore, step: int | None, best: bool) -> int:
    steps = store.steps()
    if not steps:
        raise UserError(f"{storage}: the run has no committed checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"{storage}: no checkpoint of step {step}; there are: {', '.join(map(str, steps))}")
    if step is None and best:
        try:  # which metric counts is the run's to say: a generator's depends on its features
            state = store.load(steps[-1], []).state
        except CorruptCheckpoint as error:
            raise UserError(
                f"{storage}/checkpoints/{folder(steps[-1])} is corrupt: {error}: choose one with --step"
            ) from None
        step = history(storage).best(state["headline"], state["maximise"], steps)
    return steps[-1] if step is None else step


def description_of(storage: Storage) -> Description:
    """The data set of a run as its networks know it, so that the data need not be at hand."""
    try:
        return from_json(json.loads(storage.read("data.json")))
    except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableDescription(
            f"{storage}/data.json cannot be read: {error}: resume the run once, which writes it"
        ) from None


def open_run(url: str, *, step: int | None = None, best: bool = False) -> Trained:
    """Open a checkpoint; raises UserError."""
    storage, named = locate(url)
    config = load_config(storage.read("config.yaml").decode(), f"{storage}/config.yaml")
    for file, digest in digests(config, data=False).items():
        if config.code.get(file) != digest and os.environ.get("RANK", "0") == "0":
            print(f"warning: {file} has changed since {storage} was trained", file=sys.stderr)  # noqa: T201
    data = description_of(storage)
    workload = workloads.build(config, data)
    store = CheckpointStore(storage.at("checkpoints"))
    step = choose_step(storage, store, step if step is not None else named, best)
    try:
        load_weights(workload, store.load(step, ["weights"]).groups["weights"])
        digest = store.digest(step)
    except CorruptCheckpoint as error:
        raise UserError(
            f"{storage}/checkpoints/{folder(step)} is corrupt: {error}: choose another with --step"
        ) from None
    return Trained(storage, step, config, data, workload, digest)
