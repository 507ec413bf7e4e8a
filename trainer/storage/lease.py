"""One live job per run directory: a lease that its owner keeps renewing.

A lease whose owner is a dead process of this machine is taken over at once, and so is one of this Slurm job from before
it was requeued; any other is watched, and taken over when its heartbeat has stopped. Comparing heartbeats with each
other needs no synchronised clocks.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from .objects import Storage, StorageError

NAME = "lease.json"
HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 35.0
SETTLE_SECONDS = 0.3  # of two jobs that take over a lease at the same moment, the later one has written by then


class LeaseHeld(Exception):
    """Another live job works in this run directory."""


def _start_time(pid: int) -> str | None:
    """What distinguishes a process from a later one with the same number; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _machine() -> str | None:
    """Where a process number means the same process: this boot and this container. None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


class Lease:
    """`acquire` before the first write, `release` after the last; `lost` means that another job has taken it over."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._owner = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        }
        self.lost = False
        self._heartbeat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; raises LeaseHeld, or StorageError."""
        try:
            self._storage.write(NAME, self._content(), create=True)
        except StorageError as error:
            if not error.exists:
                raise
            self._take_over(self._read())
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Delete the lease if it is still this job's."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * HEARTBEAT_SECONDS)
            try:
                if self._read(HEARTBEAT_SECONDS).get("id") == self._owner["id"]:
                    self._storage.delete(NAME, deadline=HEARTBEAT_SECONDS)
            except StorageError:
                return  # the next job will see that this process is gone

    def _content(self) -> bytes:
        self._heartbeat += 1
        return json.dumps({**self._owner, "beat": self._heartbeat}).encode()

    def _read(self, deadline: float | None = None) -> dict[str, Any]:
        try:
            holder = json.loads(self._storage.read(NAME, deadline=deadline))
        except StorageError as error:
            if error.missing:
                return {}
            raise
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _alive(self, holder: dict[str, Any]) -> bool:
        """Whether the holder is alive; where only its heartbeat shows that, this watches it for WATCH_SECONDS."""
        pid = holder.get("pid")
        if not isinstance(pid, int):
            return False  # released in the meantime, or nothing that a job has written
        if self._owner["machine"] and holder.get("machine") == self._owner["machine"]:
            return _start_time(pid) == holder.get("started")
        same_job = holder.get("job") is not None and holder["job"] == self._owner["job"]
        if same_job and holder.get("restarts") != self._owner["restarts"]:
            return False  # Slurm ends a job everywhere before it starts it again
        return not self._heartbeat_stopped(holder)

    def _heartbeat_stopped(self, holder: dict[str, Any]) -> bool:
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT_SECONDS))
            current = self._read()
            if not current:
                return True  # released
            if (current.get("id"), current.get("beat")) != (holder.get("id"), holder.get("beat")):
                return False
        return True

    def _take_over(self, holder: dict[str, Any]) -> None:
        if self._alive(holder):
            raise LeaseHeld(f"process {holder['pid']} on {holder.get('host')}")
        self._storage.write(NAME, self._content())
        time.sleep(SETTLE_SECONDS)
        if self._read().get("id") != self._owner["id"]:
            raise LeaseHeld("another job that started at the same moment")

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if self._read(HEARTBEAT_SECONDS).get("id", self._owner["id"]) != self._owner["id"]:
                    self.lost = True  # this process was suspended for so long that another job took it for dead
                    return
                self._storage.write(NAME, self._content(), deadline=HEARTBEAT_SECONDS)
            except StorageError:
                continue  # a late heartbeat is no reason to stop training
