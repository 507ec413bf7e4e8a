"""The classifier that `metrics.features` names by its config: trained where it is missing.

It is the run that `python -m trainer CONFIG` makes, in the same place, so that one that was trained by hand is used as
it is. The first rank of a machine trains it in a process of its own, and all ranks wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from .. import workloads
from ..config.options import RunConfig, UserError
from ..config.settings import read_file, run_name
from ..distributed.elastic import die_with_parent
from ..distributed.process import first_error, without_launcher
from ..distributed.runtime import Runtime
from ..storage import lease
from ..storage.objects import Storage, StorageError
from .outcome import read_outcome

SUFFIXES = (".yaml", ".yml")
POLL_SECONDS = 0.25
WAIT_SECONDS = 1.0  # until the next look at a run that another process of this machine is training
AGAIN_SECONDS = 10.0  # the same, where only a new process can find out
SAVE_SECONDS = 20.0  # that a training which is to stop has for its last checkpoint
LONGEST_SECONDS = 7 * 24 * 3600.0  # no wait is forever


@dataclass(frozen=True)
class FeatureClassifier:
    """A classifier as its config says, and what this run has it take over."""

    file: str
    url: str  # of its run
    storage: Storage  # the same
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.file

    def outcome(self) -> dict[str, Any]:
        """How its run ended; empty where it did not."""
        return read_outcome(self.storage)

    def finished(self) -> bool:
        return self.outcome().get("status") == "done"

    @property
    def log(self) -> Path:
        """What its training prints, in the folder for temporary files where the run is no local one."""
        return Path(self.url) / "train.log" if self.storage.local else self.temporary("log")

    def temporary(self, suffix: str) -> Path:
        """A file of its own in the folder for temporary files."""
        key = hashlib.sha256(f"{os.getuid()} {self.storage.url}".encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"trainer-{key}.{suffix}"

    def check(self) -> None:
        """Find out whether its settings are valid; raises UserError. Takes seconds, in a process of its own."""
        command = [sys.executable, "-m", "trainer", "config", self.file, *self.flags]
        done = subprocess.run(command, env=without_launcher(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"metrics.features: {self.file}: {first_error(done.stderr)}")


class Untrained(UserError):
    """A classifier is missing that can be trained."""

    def __init__(self, classifier: FeatureClassifier) -> None:
        super().__init__(
            f"metrics.features: {classifier} is not trained, there is no finished run in {classifier.url}: train it: "
            f"python -m trainer {' '.join((classifier.file, *classifier.flags))}"
        )
        self.classifier = classifier


def feature_classifier(config: RunConfig) -> FeatureClassifier | None:
    """The classifier whose config `metrics.features` is; None where that is none. Raises UserError."""
    file = config.metrics.features
    if not file.endswith(SUFFIXES):
        return None
    try:
        values = read_file(file)
    except UserError as error:
        raise UserError(f"metrics.features: {error}; it counts from {Path.cwd()}") from None
    name = _text(values, "workload", "name") or "classifier"
    hint = "give the config of a classifier, such as configs/mnist_lenet5.yaml"
    if name != "classifier" and name in workloads.names():
        raise UserError(f"metrics.features: {file} trains no classifier but {name}: {hint}")
    if _text(values, "metrics", "features").endswith(SUFFIXES):  # the process that trains it would go on like this
        raise UserError(f"metrics.features: {file} has features of its own, which no classifier needs: {hint}")
    flags: list[str] = []
    # The name of a set says what its folder holds; an image folder of this run is not that of another set.
    if config.data.root and config.data.name.removeprefix("stacked_") == _text(values, "data", "name"):
        flags += [] if _text(values, "data", "root") else ["--data.root", config.data.root]
    flags += [] if config.device == "auto" or "device" in values else ["--device", config.device]
    url = _text(values, "run", "url") or str(Path("runs") / run_name(file))
    try:
        return FeatureClassifier(file, url, Storage(url), tuple(flags))
    except StorageError as error:
        raise UserError(f"metrics.features: {file}: run.url: {error}") from None


def _text(values: dict[str, Any], group: str, name: str) -> str:
    """A setting as the file has it, '' where it is left out; the other checks are those of the process that trains."""
    section = values.get(group)
    value = section.get(name) if isinstance(section, dict) else None
    return value if isinstance(value, str) else ""


def train_missing(missing: FeatureClassifier | None, runtime: Runtime, note: Callable[[str], None]) -> str:
    """Train what this machine lacks. Called by all ranks together; raises UserError on all of them.

    Returns what has asked any rank to stop meanwhile, or ''. The training is then saved, and resumed by the next one.
    """
    end = time.monotonic() + LONGEST_SECONDS
    with contextlib.ExitStack() as stack:
        training = None
        if missing is not None and runtime.local_main:
            threads = torch.get_num_threads() * runtime.local_world
            training = stack.enter_context(Training(missing, threads, note))
        while True:
            asked = runtime.signalled
            state = "" if training is None else None if asked else training.poll()
            if state is None and time.monotonic() > end:
                state = f"metrics.features: {missing} was not trained within {LONGEST_SECONDS / 3600:.0f} hours"
            answers = runtime.gather((state, asked))
            if all(state == "" for state, _ in answers):
                return ""
            # Before any problem: a signal to a whole job ends the training as well.
            if stop := next((asked for _, asked in answers if asked), ""):
                return stop
            if problem := next((state for state, _ in answers if state), ""):
                raise UserError(problem)
            time.sleep(POLL_SECONDS)


class Training:
    """The training of a classifier by one process of this machine, or the wait for another job that trains it."""

    def __init__(self, classifier: FeatureClassifier, threads: int, note: Callable[[str], None]) -> None:
        self.classifier, self.threads, self.note = classifier, threads, note
        self.lock = filelock.FileLock(classifier.temporary("lock"))
        self.process: subprocess.Popen[bytes] | None = None
        self.log_size = 0  # before this training
        self.began = self.next_look = 0.0
        self.waits = False

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(SAVE_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self.process.kill()
                self.process.wait()
        self.lock.release(force=True)

    def poll(self) -> str | None:
        """None while it goes on, '' at its end, else what went wrong, for the user."""
        try:
            if self.process is not None:
                return self._result(self.process)
            if time.monotonic() < self.next_look:
                return None
            return self._begin()
        except (OSError, StorageError) as error:
            return f"metrics.features: {self.classifier} cannot be trained: {error}"

    def _begin(self) -> str | None:
        """Train, unless that is done or another process of this machine is at it."""
        if self.classifier.finished():
            return ""
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            self._wait(WAIT_SECONDS)
            return None
        if self.classifier.finished():  # by who had the lock
            return ""
        self._start()
        return None

    def _start(self) -> None:
        file, log = self.classifier.file, self.classifier.log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "trainer", file, *self.classifier.flags, "--wandb.mode", "disabled"]
        with log.open("ab") as output:
            self.log_size = output.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=without_launcher() | {"OMP_NUM_THREADS": str(self.threads)},
                preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
            )  # fmt: skip
        self.began = time.monotonic()
        if not self.waits:
            self.note(f"training {file}, whose features metrics.features asks for; log: {log}")

    def _result(self, process: subprocess.Popen[bytes]) -> str | None:
        if (code := process.poll()) is None:
            return None
        outcome = self.classifier.outcome()
        if code == 0 and outcome.get("status") == "done":
            seconds = time.monotonic() - self.began
            self.note(f"trained {self.classifier} in {seconds:.0f} s: accuracy {outcome.get('accuracy', 0.0):.1%}")
            return ""
        if code == 2 and self.classifier.storage.exists(lease.NAME):  # it was refused by another job, which has it
            self.process = None
            self._wait(AGAIN_SECONDS)
            return None
        return (
            f"metrics.features: {self.classifier}: {self._reason(code, outcome)} ({self.classifier.log}); or train it "
            f"by hand, with settings of your own, and the run in {self.classifier.url} will be used"
        )

    def _reason(self, code: int, outcome: dict[str, Any]) -> str:
        if code != 2 and outcome:
            return f"{outcome.get('status')}: {outcome.get('reason')}"
        with self.classifier.log.open("rb") as file:
            file.seek(self.log_size)
            return first_error(file.read().decode(errors="replace"))

    def _wait(self, seconds: float) -> None:
        if not self.waits:
            self.note(f"waiting for {self.classifier.url}, which another process is training")
        self.waits, self.next_look = True, time.monotonic() + seconds
