"""One live job per run directory: a lease that its owner keeps beating.

A lease whose owner is a dead process of this machine is taken over at once; one from another machine is watched, and
taken over when its heartbeat stands still. Comparing heartbeats with each other needs no synchronised clocks.
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

from .storage import Storage, StorageError

NAME = "lease.json"
BEAT_SECONDS = 10.0
WATCH_SECONDS = 35.0


class LeaseHeld(Exception):
    """Another live job works in this run directory."""


def _start_time(pid: int) -> str | None:
    """What tells a process from a later one with its number; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


class Lease:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._owner = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        self._beat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; raises LeaseHeld, or StorageError."""
        try:
            self._storage.write(NAME, self._content(), create=True)
        except StorageError as error:
            if not error.exists:
                raise
            self._take_over()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_SECONDS)
            try:
                if self._read().get("id") == self._owner["id"]:
                    self._storage.delete(NAME)
            except StorageError:
                return  # the next job will see that this process is gone

    def _content(self) -> bytes:
        self._beat += 1
        return json.dumps({**self._owner, "beat": self._beat}).encode()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._storage.read(NAME))
        except StorageError as error:
            if error.missing:
                return {}
            raise
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _take_over(self) -> None:
        holder = self._read()
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder.get("host") == self._owner["host"]:
            if isinstance(holder.get("pid"), int) and _start_time(holder["pid"]) == holder.get("started"):
                raise LeaseHeld(who)
        elif holder and not (holder.get("job") and holder["job"] == self._owner["job"]):
            deadline = time.monotonic() + WATCH_SECONDS
            while time.monotonic() < deadline:
                time.sleep(1)
                if (now := self._read()) and now.get("beat") != holder.get("beat"):
                    raise LeaseHeld(who)
        self._storage.write(NAME, self._content())
        if self._read().get("id") != self._owner["id"]:
            raise LeaseHeld("another job that started at the same moment")

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._storage.write(NAME, self._content(), deadline=BEAT_SECONDS)
            except StorageError:
                continue  # a late beat is no reason to stop training
