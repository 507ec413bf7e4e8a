"""The commit protocol: a checkpoint is verified or does not exist.

    checkpoints/step-00001000/weights.safetensors optimizer.safetensors [lanes.safetensors] state.json MANIFEST.json

Data first; the manifest, with size and sha256 of every file, last. No rename is needed, so one protocol holds for local
disks and for object stores. A folder without a manifest is a save that did not finish, and is never read. A folder
that fails its own manifest is quarantined (DAMAGED.json takes the manifest's place) and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .. import __version__
from .objects import Storage, StorageError

Groups = dict[str, dict[str, Tensor]]
STATE = "state.json"
MANIFEST = "MANIFEST.json"
QUARANTINED = "DAMAGED.json"
FORMAT = 1


class CorruptCheckpoint(Exception):
    """A checkpoint does not hold what its manifest promises; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    groups: Groups  # tensors by file and name, on the CPU
    state: dict[str, Any]  # what is not a tensor


def folder(step: int) -> str:
    return f"step-{step:08d}"


class CheckpointStore:
    """Checkpoints below one URL. Knows dicts of tensors and URLs, not models. Used by one process of a run."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.seconds: list[float] = []  # how long each background save took

    def folders(self) -> list[int]:
        """Steps with a folder, finished or not, oldest first."""
        matches = (re.fullmatch(r"step-(\d{8,})", name) for name in self.storage.list())
        return sorted(int(match[1]) for match in matches if match)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return [step for step in self.folders() if self.storage.exists(f"{folder(step)}/{MANIFEST}")]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write and commit; raises StorageError. A committed checkpoint of that step is left as it is."""
        step, path = checkpoint.step, folder(checkpoint.step)
        if self.storage.exists(f"{path}/{MANIFEST}"):
            return
        self.storage.delete_tree(path)  # what is left of a save that did not finish, or that was quarantined
        files: dict[str, dict[str, Any]] = {}

        def put(name: str, data: bytes) -> None:
            self.storage.write(f"{path}/{name}", data)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        for name, tensors in checkpoint.groups.items():
            put(f"{name}.safetensors", safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}))
        put(STATE, json.dumps(checkpoint.state, indent=1, sort_keys=True).encode())
        manifest = {
            "format": FORMAT, "step": step, "files": files, "trainer": __version__, "torch": torch.__version__,
        }  # fmt: skip
        self.storage.write(f"{path}/{MANIFEST}", json.dumps(manifest, indent=1).encode(), create=True)

    def in_background(self, work: Callable[[], None]) -> None:
        """Run a save in a thread; at most one is in flight, so this waits for the one before."""
        self.wait()

        def run() -> None:
            started = time.monotonic()
            try:
                work()
                self.seconds.append(time.monotonic() - started)
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until no save is in flight; raises TimeoutError."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                raise TimeoutError(f"a checkpoint was still being written after {seconds:.0f} s")
            self._thread = None

    def failure(self) -> Exception | None:
        """Why a background save failed since this was last asked."""
        failure, self._failure = self._failure, None
        return failure

    def _manifest(self, step: int) -> dict[str, dict[str, Any]]:
        try:
            manifest = json.loads(self.storage.read(f"{folder(step)}/{MANIFEST}"))
            if isinstance(manifest["format"], int) and manifest["format"] > FORMAT:  # not corrupt: do not quarantine it
                raise StorageError(
                    f"{self.storage}/{folder(step)} has format {manifest['format']}, written by trainer "
                    f"{manifest.get('trainer')}; this is trainer {__version__}, which reads format {FORMAT}: update it"
                )
            if manifest["step"] != step or manifest["format"] != FORMAT:
                raise CorruptCheckpoint(f"{MANIFEST} is of step {manifest['step']}, format {manifest['format']}")
            files = {name: {"size": f["size"], "sha256": f["sha256"]} for name, f in manifest["files"].items()}
            if STATE not in files or not all(isinstance(file["size"], int) for file in files.values()):
                raise CorruptCheckpoint(f"{MANIFEST} does not list the files of a checkpoint")
            return files
        except StorageError as error:
            if error.missing:
                raise CorruptCheckpoint(f"{MANIFEST} is missing: the save did not finish") from None
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptCheckpoint(f"{MANIFEST} cannot be read") from None

    def _read(self, step: int, name: str, expected: dict[str, Any]) -> bytes:
        problem = ""
        for _ in range(2):  # a transfer error is gone the second time, and must not quarantine the checkpoint
            try:
                data = self.storage.read(f"{folder(step)}/{name}", deadline=self.storage.timeout_for(expected["size"]))
            except StorageError as error:
                if error.missing:
                    raise CorruptCheckpoint(f"{name} is missing") from None
                raise
            if len(data) != expected["size"]:
                problem = f"{name} has {len(data)} bytes where {expected['size']} were written"
            elif hashlib.sha256(data).hexdigest() != expected["sha256"]:
                problem = f"{name} has other content than was written (sha256 differs)"
            else:
                return data
        raise CorruptCheckpoint(problem)

    def size(self, step: int) -> int:
        """Bytes of a committed checkpoint; 0 where its manifest cannot be read."""
        try:
            return sum(file["size"] for file in self._manifest(step).values())
        except CorruptCheckpoint:
            return 0

    def digest(self, step: int, group: str = "weights") -> str:
        """The sha256 of a group of tensors, as hexadecimal digits; raises CorruptCheckpoint."""
        try:
            return str(self._manifest(step)[f"{group}.safetensors"]["sha256"])
        except KeyError:
            raise CorruptCheckpoint(f"{MANIFEST} lists no {group}") from None

    def remove(self, step: int) -> None:
        """Delete a checkpoint: the manifest first, so that a half-deleted one does not exist."""
        self.storage.delete(f"{folder(step)}/{MANIFEST}")
        self.storage.delete_tree(folder(step))

    def verify(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, a line per file; empty when it is valid."""
        try:
            files = self._manifest(step)
        except CorruptCheckpoint as error:
            return [str(error)]
        problems = []
        for name, expected in files.items():
            try:
                self._read(step, name, expected)
            except CorruptCheckpoint as error:
                problems.append(str(error))
        return problems

    def load(self, step: int, groups: Iterable[str] | None = None) -> Checkpoint:
        """Read and verify all of a checkpoint, or only some groups of it; raises CorruptCheckpoint."""
        files = self._manifest(step)
        if groups is not None:
            selected = {f"{name}.safetensors" for name in groups} | {STATE}
            files = {name: expected for name, expected in files.items() if name in selected}
        loaded: Groups = {}
        state: dict[str, Any] = {}
        for name, expected in files.items():
            data = self._read(step, name, expected)
            if name == STATE:
                state = json.loads(data)
            else:
                loaded[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
        return Checkpoint(step, loaded, state)

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest valid checkpoint; corrupt ones are quarantined. None where nothing was ever committed.

        Raises CorruptCheckpoint when there were checkpoints and none is valid, since starting from scratch would lose
        the run silently.
        """
        committed = self.steps()
        for step in reversed(committed):
            try:
                return self.load(step)
            except CorruptCheckpoint as error:
                report(f"checkpoint {folder(step)} is corrupt ({error}): quarantined, using the one before")
                self.quarantine(step, str(error))
        corrupt = committed or [s for s in self.folders() if self.storage.exists(f"{folder(s)}/{QUARANTINED}")]
        if corrupt:
            raise CorruptCheckpoint(
                f"no valid checkpoint is left in {self.storage}: {len(corrupt)} quarantined as corrupt"
            )
        return None

    def quarantine(self, step: int, reason: str) -> None:
        """Turn a corrupt checkpoint into one that does not exist; its files stay for a post-mortem."""
        self.storage.write(f"{folder(step)}/{QUARANTINED}", json.dumps({"step": step, "reason": reason}).encode())
        self.storage.delete(f"{folder(step)}/{MANIFEST}")

    def prune(self, keep: int, protected: Callable[[int], bool] = lambda step: False) -> list[int]:
        """Delete all but the newest `keep` (1 or more) and the protected ones; returns what was deleted.

        What a killed save or prune left behind is deleted too; quarantined checkpoints stay.
        """
        assert keep > 0, keep
        committed = self.steps()
        expired = [step for step in committed[:-keep] if not protected(step)]
        for step in expired:
            self.remove(step)
        for step in self.folders():
            # one that is newer than the newest may be a save in flight
            leftover = step not in committed and step < max(committed, default=0)
            if leftover and not self.storage.exists(f"{folder(step)}/{QUARANTINED}"):
                self.storage.delete_tree(folder(step))
        return expired
