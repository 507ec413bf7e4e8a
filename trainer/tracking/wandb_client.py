"""Weights & Biases, at arm's length: in a process of its own that is fed through a pipe and may be killed at any time.

No key, no network, an outage or a dead helper process never stop or slow training; the metric log has everything. A
process and not a thread, since wandb's import holds the interpreter for half a second, patches sys.exit, prints where
it likes, and waits without bound when the interpreter ends. The process is nice to the ranks, outlives the
signals that stop a run, and when training is killed it still delivers what was committed.

The pipe carries JSON lines: the settings, then `{"past" | "log" | "image" | "close": ...}`. Back come `{"note"}` (for
the console), `{"ready"}` and `{"finished"}`.

A record's place in the metric log is its W&B step. So a run that is resumed online goes on after the last record that
the server has, whatever got lost on the way there, and nothing is there twice; offline a small file beside W&B's own
tells how far earlier lives came. The training step is the value `step`, which W&B uses as the x-axis.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import netrc
import os
import queue
import re
import signal
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
START_SECONDS = 10.0  # W&B starts at the first checkpoint, or after this time
LINGER_SECONDS = 3.0  # for the process to go once it has said that it is finished
INIT_SECONDS, FINISH_SECONDS = 15.0, 20.0  # waiting for the start and for the last upload is bounded by their sum
NICENESS = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def bounds() -> tuple[float, float]:
    """Seconds for the start and for the last upload; W&B's own variables change them."""

    def read(name: str, default: float) -> float:
        try:
            return float(os.environ[name])
        except (KeyError, ValueError):
            return default

    return read("WANDB_INIT_TIMEOUT", INIT_SECONDS), read("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)


def logged_in() -> bool:
    """Whether a key is at hand, without importing wandb."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host.partition(":")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(storage: Storage) -> str:
    """The id of a run, kept in its directory so that a restart goes on with the same W&B run."""
    fresh = uuid.uuid4().hex[:10]
    try:
        return str(json.loads(storage.read(ID_FILE))["id"])
    except StorageError as error:
        if not error.missing:  # there may be an id: leave it alone
            return fresh
    except (ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(StorageError):
        storage.write(ID_FILE, json.dumps({"id": fresh}).encode())
    return fresh


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
        self._wanted = threading.Event()  # there is something to send
        self._ready, self._over = threading.Event(), threading.Event()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._feed, name="wandb", daemon=True).start()

    def past(self, records: list[dict[str, Any]]) -> None:
        self._queue.put({"past": records})

    def log(self, records: list[dict[str, Any]]) -> None:
        self._queue.put({"log": records})
        self._wanted.set()

    def image(self, step: int, name: str, png: bytes) -> None:
        self._queue.put({"image": {"name": name, "png": base64.b64encode(png).decode()}})

    def alert(self, title: str, text: str) -> None:
        self._queue.put({"alert": {"title": title, "text": text}})
        self._wanted.set()

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        """Wait, within the bounds, until W&B has everything."""
        self._queue.put({"close": {"summary": summary, "failed": failed}})
        self._queue.put(None)
        self._wanted.set()
        init_seconds, finish_seconds = bounds()
        self._ready.wait(init_seconds)
        if not self._over.wait(finish_seconds):
            self._warn("gave no answer in time and was left behind")
        self._closed = True  # what the process still has to say would come after the run's last line
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LINGER_SECONDS if self._over.is_set() else 0)
            self._process.kill()

    def _warn(self, text: str) -> None:
        self._note(f"warning: W&B {text}; the metric log has everything")

    def _feed(self) -> None:
        """A thread, because a pipe blocks when its other end is slow."""
        self._wanted.wait(START_SECONDS)
        environment = {"WANDB_ERROR_REPORTING": "false", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), *_python_path())))
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            self._warn(f"is off: its process cannot be started: {error}")
            self._ready.set()
            self._over.set()
            return
        threading.Thread(target=self._listen, args=(process,), name="wandb-listen", daemon=True).start()
        assert process.stdin
        with contextlib.suppress(OSError), process.stdin as pipe:  # a broken pipe is what `_listen` tells of
            _send(pipe, {"settings": asdict(self._settings), "argv": sys.argv, "pid": os.getpid()})
            while (message := self._queue.get()) is not None:
                _send(pipe, message)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        for line in process.stdout:
            answer = json.loads(line)
            if "note" in answer and not self._closed:
                self._note(answer["note"])
            if "ready" in answer:
                self._ready.set()
            if "finished" in answer:
                self._over.set()
        if not self._over.is_set() and not self._closed:
            self._warn("has ended early")
        self._ready.set()
        self._over.set()


def _python_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


class Delivery:
    """The other end: turns messages into W&B calls. Raises what W&B raises."""

    def __init__(self, settings: WandbSettings, pid: int, note: Callable[[str], None]) -> None:
        self._settings, self._pid, self._note = settings, pid, note
        self._online = settings.mode == "online"
        self._position = settings.discarded_records  # of the next record, among all that W&B was ever given
        self._pictures: dict[str, Any] = {}
        self._delivered = Path(settings.directory) / "wandb" / "delivered.json"
        self._run = self._start()
        self._known = int(self._run.starting_step)  # records that W&B has; offline this is 0

    def past(self, records: list[dict[str, Any]]) -> None:
        """Catch up with what earlier lives did not deliver."""
        if not self._online:
            self._known = self._position + len(records)
            with contextlib.suppress(OSError, ValueError, TypeError):  # more, where the run was rewound since
                self._known = max(self._known, int(json.loads(self._delivered.read_bytes())))
        self.log(records)

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if self._position >= self._known:
                values = {
                    "step" if name == "step" else f"{record['kind']}/{name}": value
                    for name, value in record.items()
                    if name != "kind"
                }
                self._run.log(values, step=self._position)
            self._position += 1
        self._show()

    def image(self, name: str, png: str) -> None:
        self._pictures[name] = png

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text)

    def _show(self) -> None:
        """Pictures join the last record, which W&B still holds back."""
        import wandb
        from PIL import Image

        if self._position > self._known and self._pictures:
            images = {
                f"pictures/{name}": wandb.Image(Image.open(io.BytesIO(base64.b64decode(png))))
                for name, png in self._pictures.items()
            }
            self._run.log(images, step=self._position - 1)
            self._pictures = {}

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        self._show()
        self._run.summary.update(redacted(summary))
        problem = ""
        try:
            self._refer(summary.get("checkpoint"))
        except Exception as error:  # of an outage, only `finish` is to tell
            problem = f"warning: W&B did not take the reference to the checkpoint ({type(error).__name__})"
        if self.finish(1 if failed else 0) and problem:
            self._note(problem)

    def finish(self, exit_code: int) -> bool:
        """End the W&B run; False where W&B did not take everything."""
        complete = True
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            complete = False
            folder = Path(self._run.settings.sync_dir)
            self._note(f"warning: W&B did not take everything in time: 'wandb sync {folder}' sends the rest")
        with contextlib.suppress(OSError):
            self._delivered.write_text(str(max(self._position, self._known)))
        return complete

    def _refer(self, checkpoint: str | None) -> None:
        import wandb

        if not checkpoint:
            return
        url = redact(checkpoint if "://" in checkpoint else f"file://{checkpoint}")
        artifact = wandb.Artifact(f"run-{self._settings.id}", type="model", metadata={"url": url})
        artifact.add_reference(url, checksum=False)
        self._run.log_artifact(artifact)

    def _start(self) -> Any:
        if self._online and not logged_in():
            self._go_offline("has no key (run 'wandb login', or set WANDB_API_KEY)")
        try:
            run = self._init()
        except Exception as error:
            if not self._online:
                raise
            import wandb

            self._go_offline(f"cannot be reached ({type(error).__name__})")
            wandb.teardown()  # its process holds the run's id
            run = self._init()
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if self._online:
            self._note(f"W&B: {run.url}")
        return run

    def _go_offline(self, reason: str) -> None:
        self._online = False
        self._note(f"warning: W&B {reason}: logging offline instead")

    def _init(self) -> Any:
        import wandb

        s = self._settings
        init_seconds, finish_seconds = bounds()
        wanted = {
            "init_timeout": init_seconds, "finish_timeout": finish_seconds, "finish_timeout_raises": True,
            "console": "off", "silent": True, "save_code": False, "disable_git": True,
            "x_stats_pid": self._pid,  # of training, whose memory and load are of interest
            "x_transaction_log_flush_interval": 1.0,
        }  # fmt: skip
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields})
        return wandb.init(
            mode="online" if self._online else "offline", id=s.id, name=s.name, project=s.project, entity=s.entity,
            group=s.group, tags=s.tags, dir=s.directory, config=redacted(s.config),
            resume="allow" if self._online else None, settings=settings,
        )  # fmt: skip


def serve(messages: IO[bytes], answer: Callable[[dict[str, Any]], None]) -> None:
    """Deliver until told to close, or until training is gone."""

    def note(text: str) -> None:
        answer({"note": text})

    try:
        first = json.loads(messages.readline())
        sys.argv = redacted(first["argv"])  # what W&B shows as the program
        delivery = Delivery(WandbSettings(**first["settings"]), first["pid"], note)
        answer({"ready": True})
        for line in messages:
            ((kind, content),) = json.loads(line).items()
            if kind in ("past", "log"):
                getattr(delivery, kind)(content)
            else:
                getattr(delivery, kind)(**content)
            if kind == "close":
                break
        else:
            delivery.finish(1)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        note(f"warning: W&B is off: {type(error).__name__}: {''.join(reason)}; the metric log has everything")
    answer({"finished": True})


def main() -> None:
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # W&B asks for keys and prints; neither may reach the pipe or the user
        os.dup2(null, descriptor)
    # Blocked, not ignored: wandb-core inherits that for all but SIGTERM and SIGINT, which it handles itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.nice(NICENESS)

    def answer(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # training may be gone
            _send(answers, message)

    serve(messages, answer)


if __name__ == "__main__":
    main()
