"""One live job per run directory, with real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from trainer.storage import lease as lease_module
from trainer.storage.lease import NAME, Lease, LeaseHeld
from trainer.storage.objects import Storage, StorageError

from .test_storage import forget_s3, use_s3

BEAT, WATCH = 0.1, 0.8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", BEAT)
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", WATCH)
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 0.15)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "file":
        return Storage(str(tmp_path))
    forget_s3()
    return Storage(use_s3(request.getfixturevalue("s3_server"), monkeypatch))


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


Start = Callable[[Storage], BaseProcess]


def hold(environment: dict[str, str], url: str, ready: Connection) -> None:
    """A job that takes the lease and trains forever."""
    os.environ.update(environment)
    lease_module.HEARTBEAT_SECONDS = BEAT
    Lease(Storage(url)).acquire()
    ready.send("held")
    time.sleep(600)


@pytest.fixture
def job() -> Iterator[Start]:
    """Starts another job on this machine that holds the lease."""
    started: list[BaseProcess] = []

    def start(storage: Storage) -> BaseProcess:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        process = multiprocessing.get_context("forkserver").Process(
            target=hold, args=(environment, storage.url, sender)
        )
        process.start()
        started.append(process)
        assert receiver.poll(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def content(storage: Storage) -> dict[str, Any]:
    return dict(json.loads(storage.read(NAME)))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def foreign(storage: Storage, **changes: object) -> dict[str, Any]:
    """A lease as another machine has written it."""
    lease = Lease(storage)
    holder = {**json.loads(lease._content()), "host": "node7", "machine": "another boot", "id": "theirs", "pid": 4321}
    holder |= changes
    storage.write(NAME, json.dumps(holder).encode())
    return holder


class Renewing:
    """Another machine whose job renews its lease."""

    def __init__(self, storage: Storage, holder: dict[str, Any]) -> None:
        self.storage, self.holder, self.stop = storage, holder, threading.Event()
        self.thread = threading.Thread(target=self.renew)

    def renew(self) -> None:
        while not self.stop.wait(BEAT):
            self.holder["beat"] += 1
            self.storage.write(NAME, json.dumps(self.holder).encode())

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def test_a_lease_names_its_holder_is_renewed_and_released(storage: Storage) -> None:
    lease = Lease(storage)
    lease.acquire()
    holder = content(storage)
    assert holder["pid"] == os.getpid()
    assert holder["host"] == os.uname().nodename
    wait_until(lambda: content(storage)["beat"] >= 3)
    assert content(storage)["id"] == holder["id"]
    lease.release()
    assert not storage.exists(NAME)
    time.sleep(3 * BEAT)
    assert not storage.exists(NAME)
    assert not lease.lost


def test_a_second_live_process_on_the_same_machine_is_refused_at_once(storage: Storage, job: Start) -> None:
    holder = job(storage)
    before = content(storage)
    started = time.monotonic()
    second = Lease(storage)
    with pytest.raises(LeaseHeld, match=f"^process {holder.pid} on {os.uname().nodename}$"):
        second.acquire()
    assert time.monotonic() - started < WATCH
    second.release()  # it does not delete a lease that it does not hold
    assert content(storage)["id"] == before["id"]


def test_a_suspended_process_is_not_dead(local: Storage, job: Start) -> None:
    holder = job(local)
    os.kill(holder.pid or 0, signal.SIGSTOP)
    with pytest.raises(LeaseHeld):
        Lease(local).acquire()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(
    local: Storage, job: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1e9)  # nothing is watched here
    holder = job(local)
    holder.kill()
    holder.join()
    assert content(local)["pid"] == holder.pid
    lease = Lease(local)
    lease.acquire()
    assert content(local)["pid"] == os.getpid()
    lease.release()
    assert not local.exists(NAME)


def test_a_zombie_is_dead(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1e9)
    child = subprocess.Popen(["sleep", "600"])
    own = json.loads(Lease(local)._content())
    stat = Path(f"/proc/{child.pid}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19]
    local.write(NAME, json.dumps({**own, "id": "theirs", "pid": child.pid, "started": started}).encode())
    with pytest.raises(LeaseHeld):
        Lease(local).acquire()
    child.kill()
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")  # dead, and its exit code was not read
    lease = Lease(local)
    lease.acquire()
    lease.release()
    child.wait()


def test_a_later_process_with_the_same_number_is_not_the_holder(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1e9)
    own = json.loads(Lease(local)._content())
    local.write(NAME, json.dumps({**own, "id": "theirs", "pid": os.getppid(), "started": "1"}).encode())
    lease = Lease(local)
    lease.acquire()
    lease.release()


def test_a_lease_of_another_machine_whose_heartbeat_continues_is_refused(storage: Storage) -> None:
    holder = foreign(storage)
    with Renewing(storage, holder), pytest.raises(LeaseHeld, match=r"^process 4321 on node7$"):
        Lease(storage).acquire()
    assert content(storage)["id"] == "theirs"


def test_a_lease_of_another_machine_whose_heartbeat_has_stopped_is_taken_over(local: Storage) -> None:
    foreign(local)
    lease = Lease(local)
    started = time.monotonic()
    lease.acquire()
    assert time.monotonic() - started >= WATCH
    assert content(local)["host"] == os.uname().nodename
    lease.release()


def test_the_same_name_in_another_container_is_another_machine(local: Storage) -> None:
    """Its process numbers mean nothing here, so only the heartbeat counts."""
    holder = foreign(local, host=os.uname().nodename, pid=2**22 + 1)
    with Renewing(local, holder), pytest.raises(LeaseHeld):
        Lease(local).acquire()


def test_a_lease_that_another_takes_over_while_it_is_watched_is_refused(local: Storage) -> None:
    holder = foreign(local)
    other = {**holder, "id": "a third", "host": "node8"}
    threading.Timer(WATCH / 2, lambda: local.write(NAME, json.dumps(other).encode())).start()
    with pytest.raises(LeaseHeld):
        Lease(local).acquire()


def test_a_lease_that_is_released_while_it_is_watched_is_taken_at_once(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1e9)
    foreign(local)
    threading.Timer(0.2, lambda: local.delete(NAME)).start()
    lease = Lease(local)
    lease.acquire()
    lease.release()


def test_a_requeued_slurm_job_takes_over_its_own_lease_at_once(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1e9)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    foreign(local, job="77", restarts="0")
    lease = Lease(local)
    lease.acquire()
    lease.release()


def test_a_second_run_in_one_slurm_allocation_is_refused(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    holder = foreign(local, job="77")
    with Renewing(local, holder), pytest.raises(LeaseHeld):
        Lease(local).acquire()


@pytest.mark.parametrize("rubbish", [b"", b"[]", b"\xff{", b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_is_taken_over(
    local: Storage, rubbish: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1e9)
    local.write(NAME, rubbish)
    lease = Lease(local)
    lease.acquire()
    assert content(local)["pid"] == os.getpid()
    lease.release()


def test_of_many_that_take_over_a_dead_lease_at_the_same_moment_exactly_one_wins(local: Storage) -> None:
    foreign(local)
    start, held, refused = threading.Barrier(6), [], []

    def take() -> None:
        lease = Lease(local)
        start.wait()
        try:
            lease.acquire()
            held.append(lease)
        except LeaseHeld:
            refused.append(lease)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)
    held[0].release()


def test_of_two_that_take_over_a_dead_lease_the_one_that_wrote_first_gives_way(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SETTLE_SECONDS", 1.0)
    local.write(NAME, b"rubbish")
    lease = Lease(local)
    other = json.dumps({"id": "the other"}).encode()

    def overtake() -> None:
        wait_until(lambda: local.read(NAME) != b"rubbish")
        local.write(NAME, other)

    thread = threading.Thread(target=overtake)
    thread.start()
    with pytest.raises(LeaseHeld, match=r"^another job that started at the same moment$"):
        lease.acquire()
    thread.join()
    lease.release()
    assert local.read(NAME) == other


def test_release_deletes_only_its_own_lease(local: Storage) -> None:
    lease = Lease(local)
    lease.acquire()
    lease._stop.set()
    foreign(local)
    lease.release()
    assert content(local)["id"] == "theirs"


def test_a_job_that_was_taken_for_dead_does_not_take_the_lease_back(local: Storage) -> None:
    lease = Lease(local)
    lease.acquire()
    foreign(local, beat=5)
    wait_until(lambda: lease.lost)
    time.sleep(3 * BEAT)
    assert (content(local)["id"], content(local)["beat"]) == ("theirs", 5)
    lease.release()
    assert content(local)["id"] == "theirs"


@pytest.mark.parametrize("broken", ["read", "write"])
def test_the_heartbeat_survives_a_storage_error(local: Storage, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(local)
    lease.acquire()
    failures = []

    def fail(*arguments: object, **options: object) -> None:
        failures.append(1)
        raise StorageError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(local, broken, fail)
        wait_until(lambda: len(failures) >= 3)
    before = content(local)["beat"]
    wait_until(lambda: content(local)["beat"] > before)
    assert not lease.lost
    lease.release()
    assert not local.exists(NAME)


def test_a_release_that_fails_does_not_raise(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(local)
    lease.acquire()

    def fail(*arguments: object, **options: object) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(local, "delete", fail)
    lease.release()
    assert content(local)["pid"] == os.getpid()


def test_storage_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="NotADirectoryError"):
        Lease(Storage(str(tmp_path / "file"))).acquire()
