"""Weights & Biases, at arm's length: a thread of its own, every call wrapped, start and finish bounded.

No key, no network, an outage or a dead helper process never stop or slow training; the metric log has everything.
"""

from __future__ import annotations

import io
import netrc
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .storage import Storage, StorageError, redact

ID_FILE = "wandb.json"
INIT_SECONDS, FINISH_SECONDS = 15, 20
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def logged_in() -> bool:
    """Whether a key is at hand, without importing wandb."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host.partition(":")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(storage: Storage) -> str:
    """The id of a run, kept in its directory so that a restart goes on with the same W&B run."""
    import json

    try:
        return str(json.loads(storage.read(ID_FILE))["id"])
    except (StorageError, ValueError, KeyError):
        fresh = uuid.uuid4().hex[:10]
        storage.write(ID_FILE, json.dumps({"id": fresh}).encode())
        return fresh


def redacted(config: Any) -> Any:
    """A config without values that look like secrets and without user names in URLs."""
    if isinstance(config, dict):
        return {k: "***" if SECRET.search(str(k)) and v else redacted(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [redacted(value) for value in config]
    return redact(config) if isinstance(config, str) else config


@dataclass(frozen=True)
class WandbSettings:
    mode: str  # online or offline
    id: str
    name: str
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    directory: str
    config: dict[str, Any]


class WandbSink:
    def __init__(self, settings: WandbSettings, note: Callable[[str], None]) -> None:
        self._settings, self._note = settings, note
        self._queue: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._started = False

    def _put(self, call: Callable[[Any], None] | None) -> None:
        if not self._started:  # late, so that the import does not delay the first step
            self._started = True
            self._thread.start()
        self._queue.put(call)

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            values = {
                ("step" if name == "step" else f"{record['kind']}/{name}"): value
                for name, value in record.items()
                if name != "kind"
            }
            self._put(lambda run, values=values: run.log(values))

    def image(self, step: int, name: str, png: bytes) -> None:
        def call(run: Any) -> None:
            import wandb
            from PIL import Image

            run.log({"step": step, f"pictures/{name}": wandb.Image(Image.open(io.BytesIO(png)))})

        self._put(call)

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        def call(run: Any) -> None:
            run.summary.update(redacted(summary))
            self._refer(run, summary.get("checkpoint"))
            run.finish(exit_code=1 if failed else 0)

        self._put(call)
        self._queue.put(None)
        self._thread.join(INIT_SECONDS + FINISH_SECONDS)

    def _refer(self, run: Any, checkpoint: str | None) -> None:
        import wandb

        if not checkpoint:
            return
        artifact = wandb.Artifact(f"run-{self._settings.id}", type="model", metadata={"url": redact(checkpoint)})
        url = checkpoint if "://" in checkpoint else f"file://{checkpoint}"
        artifact.add_reference(redact(url), checksum=False)
        run.log_artifact(artifact)

    def _work(self) -> None:
        try:
            run = self._start(self._settings.mode)
        except BaseException as error:
            self._note(
                f"warning: W&B is off: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            return
        warned = False
        while (call := self._queue.get()) is not None:
            try:
                call(run)
            except BaseException as error:
                if not warned:
                    self._note(f"warning: W&B lost something: {type(error).__name__}: {error}")
                    warned = True

    def _start(self, mode: str) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        s = self._settings
        wanted = {
            "init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "console": "off", "silent": True,
            "save_code": False, "disable_git": True,
        }  # fmt: skip
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields})
        try:
            run = wandb.init(
                mode=mode, id=s.id, name=s.name, project=s.project, entity=s.entity, group=s.group, tags=s.tags,
                dir=s.directory, config=redacted(s.config), resume="allow" if mode == "online" else None,
                settings=settings,
            )  # type: ignore[arg-type]  # fmt: skip
        except Exception as error:
            if mode == "offline":
                raise
            self._note(f"warning: W&B cannot be reached ({type(error).__name__}): logging offline instead")
            wandb.teardown()
            return self._start("offline")
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if mode == "online":
            self._note(f"W&B: {run.url}")
        return run
