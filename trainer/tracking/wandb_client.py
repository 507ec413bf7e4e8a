"""Weights & Biases, seen from training: the end of a pipe to a process of its own, which may be killed at any time.

No key, no network, an outage or a dead worker process never stop or slow training; the metric log has everything. A
process and not a thread, since wandb's import holds the interpreter for half a second, patches sys.exit, prints where
it likes, and waits without bound when the interpreter ends. The process has a low priority, outlives the signals that
stop a run, and when training is killed it still delivers what was committed. `wandb_worker` is what it runs.

The pipe carries JSON lines: the settings, then `{"past" | "log" | "image" | "alert" | "close": ...}`. Back come
`{"note"}` (for the console), `{"ready"}` and `{"finished"}`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import netrc
import os
import queue
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..storage.objects import Storage, StorageError, redact

ID_FILE = "wandb.json"
WORKER = "trainer.tracking.wandb_worker"  # the module that the process runs
START_SECONDS = 10.0  # W&B starts at the first checkpoint, or after this time
EXIT_SECONDS = 3.0  # for the worker to exit once it has reported that it is finished
INIT_SECONDS, FINISH_SECONDS = 15.0, 20.0  # waiting for the start and for the last upload is bounded by their sum
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def bounds() -> tuple[float, float]:
    """Seconds for the start and for the last upload; W&B's own variables change them."""

    def seconds(name: str, default: float) -> float:
        try:
            return float(os.environ[name])
        except (KeyError, ValueError):
            return default

    return seconds("WANDB_INIT_TIMEOUT", INIT_SECONDS), seconds("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)


def logged_in() -> bool:
    """Whether there is a key, without importing wandb."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host.partition(":")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(storage: Storage) -> str:
    """The id of a run, kept in its directory so that a restart resumes the same W&B run."""
    new_id = uuid.uuid4().hex[:10]
    try:
        return str(json.loads(storage.read(ID_FILE))["id"])
    except StorageError as error:
        if not error.missing:  # there may be an id: do not replace it
            return new_id
    except (ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(StorageError):
        storage.write(ID_FILE, json.dumps({"id": new_id}).encode())
    return new_id


def redacted(config: Any) -> Any:
    """A config without values that look like secrets, and without user names and queries in URLs."""
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
    discarded_records: int = 0  # that W&B had before the run went back to a checkpoint, and which the log no longer has


class WandbSink:
    """Training's end of the pipe. Only `close` waits."""

    def __init__(self, settings: WandbSettings, note: Callable[[str], None]) -> None:
        self._settings, self._note = settings, note
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._has_messages = threading.Event()
        self._ready, self._finished = threading.Event(), threading.Event()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._run_worker, name="wandb", daemon=True).start()

    def past(self, records: list[dict[str, Any]]) -> None:
        self._queue.put({"past": records})

    def log(self, records: list[dict[str, Any]]) -> None:
        self._queue.put({"log": records})
        self._has_messages.set()

    def image(self, step: int, name: str, picture: bytes) -> None:
        self._queue.put({"image": {"name": name, "picture": base64.b64encode(picture).decode()}})

    def alert(self, title: str, text: str) -> None:
        self._queue.put({"alert": {"title": title, "text": text}})
        self._has_messages.set()

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        """Wait, within the bounds, until W&B has everything."""
        self._queue.put({"close": {"summary": summary, "failed": failed}})
        self._queue.put(None)
        self._has_messages.set()
        init_seconds, finish_seconds = bounds()
        self._ready.wait(init_seconds)
        if not self._finished.wait(finish_seconds):
            self._warn("gave no answer in time and was killed")
        self._closed = True  # a later note would come after the run's last line
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS if self._finished.is_set() else 0)
            self._process.kill()

    def _warn(self, text: str) -> None:
        self._note(f"warning: W&B {text}; the metric log has everything")

    def _run_worker(self) -> None:
        """A thread, because a pipe blocks when its other end is slow."""
        self._has_messages.wait(START_SECONDS)
        environment = {"WANDB_ERROR_REPORTING": "false", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), *_python_path())))
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            self._warn(f"is off: its process cannot be started: {error}")
            self._ready.set()
            self._finished.set()
            return
        threading.Thread(target=self._read_answers, args=(process,), name="wandb-answers", daemon=True).start()
        assert process.stdin
        with contextlib.suppress(OSError), process.stdin as pipe:  # a broken pipe is reported by `_read_answers`
            send(pipe, {"settings": asdict(self._settings), "argv": sys.argv, "pid": os.getpid()})
            while (message := self._queue.get()) is not None:
                send(pipe, message)

    def _read_answers(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        for line in process.stdout:
            answer = json.loads(line)
            if "note" in answer and not self._closed:
                self._note(answer["note"])
            if "ready" in answer:
                self._ready.set()
            if "finished" in answer:
                self._finished.set()
        if not self._finished.is_set() and not self._closed:
            self._warn("ended early")
        self._ready.set()
        self._finished.set()


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    """Write a message as a line of JSON."""
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()
