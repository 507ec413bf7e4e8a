"""The places beside the metric log that a config asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..config.options import RunConfig
from ..storage.objects import Storage
from .tracker import Sink
from .wandb_client import WandbSettings, WandbSink, logged_in, run_id


def open_sinks(
    config: RunConfig, name: str, storage: Storage, discarded_records: int, note: Callable[[str], None]
) -> tuple[Sink, ...]:
    w = config.wandb
    mode = os.environ.get("WANDB_MODE", "auto") if w.mode == "auto" else w.mode
    mode = ("online" if logged_in() else "offline") if mode not in ("online", "offline", "disabled") else mode
    if mode == "disabled":
        return ()
    directory = Path(storage.url.removeprefix("file://")) if storage.local else Path("runs") / name
    settings = WandbSettings(
        mode, run_id(storage), name, w.project, w.entity, w.group, w.tags, str(directory),
        config.model_dump(mode="json"), discarded_records,
    )  # fmt: skip
    return (WandbSink(settings, note),)
