"""The process that talks to Weights & Biases: it turns what `wandb_client` sends through a pipe into W&B calls.

A record's place in the metric log is its W&B step. So a run that is resumed online continues after the last record that
the server has, whatever was lost on the way, and no record is logged twice; offline a small file next to W&B's own
holds how many records earlier attempts delivered. The training step is the value `step`, which W&B uses as the x-axis.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..storage.objects import redact
from .wandb_client import WandbSettings, bounds, logged_in, redacted, send

NICENESS = 10
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WandbWorker:
    """Has a method for each kind of message. Raises what W&B raises."""

    def __init__(self, settings: WandbSettings, pid: int, note: Callable[[str], None]) -> None:
        self._settings, self._pid, self._note = settings, pid, note
        self._online = settings.mode == "online"
        self._position = settings.discarded_records  # of the next record, among all that W&B was ever given
        self._pictures: dict[str, bytes] = {}
        self._count_file = Path(settings.directory) / "wandb" / "delivered.json"
        self._run = self._start()
        self._received = int(self._run.starting_step)  # records that W&B has; offline this is 0

    def past(self, records: list[dict[str, Any]]) -> None:
        """Deliver what earlier attempts did not."""
        if not self._online:
            self._received = self._position + len(records)
            with contextlib.suppress(OSError, ValueError, TypeError):  # more, where the run was rewound since
                self._received = max(self._received, int(json.loads(self._count_file.read_bytes())))
        self.log(records)

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if self._position >= self._received:
                values = {
                    "step" if name == "step" else f"{record['kind']}/{name}": value
                    for name, value in record.items()
                    if name != "kind"
                }
                self._run.log(values, step=self._position)
            self._position += 1
        self._log_pictures()

    def image(self, name: str, picture: str) -> None:
        self._pictures[name] = base64.b64decode(picture)

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text)

    def _log_pictures(self) -> None:
        """Add the pictures to the last record, which W&B has not sent yet."""
        if self._position > self._received and self._pictures:
            images = {f"pictures/{name}": _media(picture) for name, picture in self._pictures.items()}
            self._run.log(images, step=self._position - 1)
            self._pictures = {}

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        self._log_pictures()
        self._run.summary.update(redacted(summary))
        problem = ""
        try:
            self._log_reference(summary.get("checkpoint"))
        except Exception as error:  # an outage is reported by `finish` alone
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
            self._count_file.write_text(str(max(self._position, self._received)))
        return complete

    def _log_reference(self, checkpoint: str | None) -> None:
        import wandb

        if not checkpoint:
            return
        url = redact(checkpoint if "://" in checkpoint else f"file://{checkpoint}")
        artifact = wandb.Artifact(f"run-{self._settings.id}", type="model", metadata={"url": url})
        artifact.add_reference(url, checksum=False)
        self._run.log_artifact(artifact)

    def _start(self) -> Any:
        if self._online and not logged_in():
            self._switch_to_offline("has no key (run 'wandb login', or set WANDB_API_KEY)")
        try:
            run = self._init()
        except Exception as error:
            if not self._online:
                raise
            import wandb

            self._switch_to_offline(f"cannot be reached ({type(error).__name__})")
            wandb.teardown()  # its process still holds the run's id
            run = self._init()
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if self._online:
            self._note(f"W&B: {run.url}")
        return run

    def _switch_to_offline(self, reason: str) -> None:
        self._online = False
        self._note(f"warning: W&B {reason}: logging offline instead")

    def _init(self) -> Any:
        import wandb

        run = self._settings
        init_seconds, finish_seconds = bounds()
        options = {
            "init_timeout": init_seconds, "finish_timeout": finish_seconds, "finish_timeout_raises": True,
            "console": "off", "silent": True, "save_code": False, "disable_git": True,
            "x_stats_pid": self._pid,  # training, whose memory and load are recorded
            "x_transaction_log_flush_interval": 1.0,
        }  # fmt: skip
        settings = wandb.Settings(**{k: v for k, v in options.items() if k in wandb.Settings.model_fields})
        return wandb.init(
            mode="online" if self._online else "offline", id=run.id, name=run.name, project=run.project,
            entity=run.entity, group=run.group, tags=run.tags, dir=run.directory, config=redacted(run.config),
            resume="allow" if self._online else None, settings=settings,
        )  # fmt: skip


def _media(picture: bytes) -> Any:
    """A PNG, or a GIF, which moves only as a video."""
    import wandb
    from PIL import Image

    data = io.BytesIO(picture)
    return wandb.Video(data, format="gif") if picture.startswith(b"GIF") else wandb.Image(Image.open(data))


def serve(messages: IO[bytes], answer: Callable[[dict[str, Any]], None]) -> None:
    """Deliver until the message `close`, or until training is gone."""

    def note(text: str) -> None:
        answer({"note": text})

    try:
        first = json.loads(messages.readline())
        sys.argv = redacted(first["argv"])  # what W&B shows as the program
        worker = WandbWorker(WandbSettings(**first["settings"]), first["pid"], note)
        answer({"ready": True})
        for line in messages:
            ((kind, content),) = json.loads(line).items()
            if kind in ("past", "log"):
                getattr(worker, kind)(content)
            else:
                getattr(worker, kind)(**content)
            if kind == "close":
                break
        else:
            worker.finish(1)
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
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    os.nice(NICENESS)

    def answer(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # training may be gone
            send(answers, message)

    serve(messages, answer)


if __name__ == "__main__":
    main()
