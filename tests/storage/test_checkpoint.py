"""The commit protocol on a local disk, in memory and on an S3 server: valid, or it does not exist."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from trainer.storage.checkpoint import (
    MANIFEST,
    QUARANTINED,
    Checkpoint,
    CheckpointStore,
    CorruptCheckpoint,
    Groups,
    folder,
)
from trainer.storage.objects import Storage, StorageError

from .test_storage import endpoint, forget_s3, use_s3

FILES = ["weights.safetensors", "optimizer.safetensors", "state.json"]


class Recorder(Storage):
    """Storage that keeps the order of what changes it, and can corrupt what is read."""

    def __init__(self, url: str, deadline: float = 60) -> None:
        super().__init__(url, deadline)
        self.actions: list[tuple[str, str]] = []
        self.before_write: Callable[[str], None] = lambda name: None
        self.corrupt: Callable[[str, bytes], bytes] = lambda name, data: data

    def read(self, name: str, *, deadline: float | None = None) -> bytes:
        return self.corrupt(name, super().read(name, deadline=deadline))

    def write(self, name: str, data: bytes, *, create: bool = False, deadline: float | None = None) -> None:
        self.before_write(name)
        super().write(name, data, create=create, deadline=deadline)
        self.actions.append(("create" if create else "write", name))

    def delete(self, name: str, *, deadline: float | None = None) -> None:
        super().delete(name, deadline=deadline)
        self.actions.append(("delete", name))

    def delete_tree(self, name: str) -> None:
        super().delete_tree(name)
        self.actions.append(("delete_tree", name))


@pytest.fixture(scope="module", autouse=True)
def no_connection_of_another_module() -> None:
    forget_s3()


@pytest.fixture(params=["file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    if request.param == "s3":
        return Recorder(use_s3(request.getfixturevalue("s3_server"), monkeypatch))
    return Recorder(f"file://{tmp_path}/run" if request.param == "file" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def local(tmp_path: Path) -> Recorder:
    return Recorder(str(tmp_path / "checkpoints"))


def groups_of(step: int) -> Groups:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {
            "float": torch.randn(3, 4, generator=generator),
            "half": torch.randn(5, generator=generator).bfloat16(),
            "transposed": torch.randn(2, 3, generator=generator).T,
            "empty": torch.zeros(0, 7),
        },
        "optimizer": {
            "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
            "long": torch.tensor([2**62, -1, step]),
            "scalar": torch.tensor(float(step)),
            "flags": torch.tensor([True, False]),
            "bytes": torch.arange(4, dtype=torch.uint8),
        },
    }


def state_of(step: int) -> dict[str, object]:
    return {"step": step, "seconds": 1.25, "name": "größe", "means": {"k": 0.1}, "none": None}


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(Checkpoint(step, groups_of(step), state_of(step)))


def assert_is(store: CheckpointStore, step: int) -> None:
    """The checkpoint of a step is, bit for bit, what was saved."""
    loaded, expected = store.load(step), groups_of(step)
    assert (loaded.step, loaded.state) == (step, state_of(step))
    assert {name: set(tensors) for name, tensors in loaded.groups.items()} == {n: set(t) for n, t in expected.items()}
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            actual = loaded.groups[name][key]
            assert (actual.dtype, actual.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(actual, tensor)


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


# saving and loading


def test_a_checkpoint_comes_back_bit_for_bit(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    assert store.steps() == []
    save(store, 1, 12)
    assert store.steps() == store.folders() == [1, 12]
    for step in (1, 12):
        assert_is(store, step)
        assert store.verify(step) == []
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert (newest.step, newest.state) == (12, state_of(12))
    assert store.size(12) == sum(len(storage.read(f"{folder(12)}/{name}")) for name in FILES)


def test_some_groups_are_loaded_without_reading_the_others(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 1)
    local.delete(f"{folder(1)}/optimizer.safetensors")
    loaded = store.load(1, ["weights"])
    assert set(loaded.groups) == {"weights"}
    assert loaded.state == state_of(1)
    with pytest.raises(CorruptCheckpoint, match=r"^optimizer\.safetensors is missing$"):
        store.load(1)


def test_the_data_comes_first_and_the_manifest_last(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    save(store, 7)
    path = folder(7)
    assert path == "step-00000007"
    assert storage.actions == [
        ("delete_tree", path),
        *(("write", f"{path}/{name}") for name in FILES),
        ("create", f"{path}/{MANIFEST}"),
    ]


def test_the_manifest_promises_size_and_sha256_of_every_file(local: Recorder) -> None:
    save(CheckpointStore(local), 7)
    manifest = json.loads(local.read(f"{folder(7)}/{MANIFEST}"))
    assert (manifest["format"], manifest["step"]) == (1, 7)
    for name in FILES:
        data = local.read(f"{folder(7)}/{name}")
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert list(manifest["files"]) == FILES


def test_a_committed_checkpoint_is_not_written_again(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    save(store, 1)
    storage.actions.clear()
    store.save(Checkpoint(1, groups_of(2), state_of(2)))
    assert storage.actions == []
    assert_is(store, 1)


# a save that does not finish


@pytest.mark.parametrize("at", [*FILES, MANIFEST])
def test_a_save_that_fails_at_any_file_does_not_exist(storage: Recorder, at: str) -> None:
    store = CheckpointStore(storage)
    save(store, 1)

    def fail(name: str) -> None:
        if name == f"{folder(2)}/{at}":
            raise StorageError("the disk is full")

    storage.before_write = fail
    with pytest.raises(StorageError, match="the disk is full"):
        save(store, 2)
    assert store.steps() == [1]
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert newest.step == 1
    storage.before_write = lambda name: None
    save(store, 2)
    assert store.steps() == [1, 2]
    assert_is(store, 2)


class Halting(Storage):
    """Storage whose process halts forever at a file: before it, or in the middle of it."""

    def __init__(self, url: str, at: str, middle: bool, reached: Connection) -> None:
        super().__init__(url, 60)
        self.halt, self.middle, self.reached = at, middle, reached

    def write(self, name: str, data: bytes, *, create: bool = False, deadline: float | None = None) -> None:
        if name.endswith(self.halt):

            def stop(*arguments: object) -> None:
                self.reached.send(True)
                time.sleep(600)

            if not self.middle:
                stop()
            os.fsync = stop  # the temporary file is written and has not got its name
        super().write(name, data, create=create, deadline=deadline)


def save_and_halt(environment: dict[str, str], url: str, at: str, middle: bool, reached: Connection) -> None:
    os.environ.update(environment)
    save(CheckpointStore(Halting(url, at, middle, reached)), 2)


@pytest.mark.parametrize(
    ("backend", "at", "middle"),
    [
        ("file", "weights.safetensors", True),
        ("file", "state.json", False),
        ("file", MANIFEST, True),
        ("s3", MANIFEST, False),
    ],
)
def test_a_save_that_is_killed_before_the_manifest_does_not_exist(
    backend: str, at: str, middle: bool, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    environment = request.getfixturevalue("s3_server") if backend == "s3" else {}
    url = use_s3(environment, monkeypatch) if backend == "s3" else str(tmp_path / "run")
    store = CheckpointStore(Storage(url))
    save(store, 1)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("forkserver").Process(
        target=save_and_halt, args=(environment, url, at, middle, sender)
    )
    child.start()
    assert receiver.poll(60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL

    assert store.folders() == [1, 2]
    assert store.steps() == [1]
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert newest.step == 1
    assert store.verify(2) == [f"{MANIFEST} is missing: the save did not finish"]
    save(store, 2)
    assert store.steps() == [1, 2]
    assert_is(store, 2)
    if backend == "file":  # nothing of the killed save is left, temporary files included
        assert sorted(os.listdir(tmp_path / "run" / folder(2))) == sorted([*FILES, MANIFEST])  # noqa: PTH208


# corruption


def corrupt(storage: Storage, name: str, how: str) -> None:
    path = f"{folder(2)}/{name}"
    data = storage.read(path)
    match how:
        case "flipped":
            storage.write(path, flip(data))
        case "truncated":
            storage.write(path, data[:-1])
        case "deleted":
            storage.delete(path)
        case "garbage":
            storage.write(path, b"\xff\x00{")


CORRUPTIONS = [
    ("weights.safetensors", "flipped", "weights.safetensors has other content than was written (sha256 differs)"),
    ("state.json", "flipped", "state.json has other content than was written (sha256 differs)"),
    ("optimizer.safetensors", "truncated", "optimizer.safetensors has {less} bytes where {size} were written"),
    ("optimizer.safetensors", "deleted", "optimizer.safetensors is missing"),
    (MANIFEST, "garbage", f"{MANIFEST} cannot be read"),
    (MANIFEST, "truncated", f"{MANIFEST} cannot be read"),
]


@pytest.mark.parametrize(("name", "how", "problem"), CORRUPTIONS)
def test_a_corrupt_checkpoint_is_quarantined_and_the_one_before_is_loaded(
    storage: Recorder, name: str, how: str, problem: str
) -> None:
    store = CheckpointStore(storage)
    save(store, 1, 2)
    size = len(storage.read(f"{folder(2)}/{name}"))
    problem = problem.format(size=size, less=size - 1)
    corrupt(storage, name, how)
    assert store.verify(2) == [problem]
    assert store.verify(1) == []
    before = set(storage.list(folder(2)))

    lines: list[str] = []
    newest = store.newest(lines.append)
    assert newest is not None
    assert (newest.step, newest.state) == (1, state_of(1))
    assert lines == [f"checkpoint step-00000002 is corrupt ({problem}): quarantined, using the one before"]
    assert store.steps() == [1]
    assert set(storage.list(folder(2))) == before - {MANIFEST} | {QUARANTINED}
    assert json.loads(storage.read(f"{folder(2)}/{QUARANTINED}")) == {"step": 2, "reason": problem}

    assert store.newest(pytest.fail) is not None  # reported once
    save(store, 2)  # the run reaches that step again
    assert store.steps() == [1, 2]
    assert_is(store, 2)


def test_a_checkpoint_without_its_manifest_does_not_exist(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    save(store, 1, 2)
    corrupt(storage, MANIFEST, "deleted")
    assert store.verify(2) == [f"{MANIFEST} is missing: the save did not finish"]
    assert store.steps() == [1]
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b'{"format": 1, "step": 2}', b'{"format": 1, "step": 2, "files": []}',
     b'{"format": 1, "step": 2, "files": {}}', b'{"format": 1, "step": 2, "files": {"state.json": 3}}',
     b'{"format": 1, "step": 2, "files": {"state.json": {"size": "x", "sha256": ""}}}',
     b'{"format": 1, "step": 1, "files": {"state.json": {"size": 1, "sha256": ""}}}'],
)  # fmt: skip
def test_a_manifest_that_does_not_describe_the_checkpoint_is_corruption(local: Recorder, content: bytes) -> None:
    store = CheckpointStore(local)
    save(store, 1, 2)
    local.write(f"{folder(2)}/{MANIFEST}", content)
    [problem] = store.verify(2)
    assert problem.startswith(MANIFEST)
    assert store.size(2) == 0
    lines: list[str] = []
    newest = store.newest(lines.append)
    assert newest is not None
    assert newest.step == 1
    assert len(lines) == 1


def test_any_flipped_byte_is_detected(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 1)
    for name in FILES:
        content = local.read(f"{folder(1)}/{name}")
        for position in range(0, len(content), 13):
            corrupted = bytearray(content)
            corrupted[position] ^= 1 << position % 8
            local.corrupt = lambda n, data, name=name, corrupted=corrupted: (
                bytes(corrupted) if n.endswith(name) else data
            )
            assert store.verify(1) == [f"{name} has other content than was written (sha256 differs)"]
            with pytest.raises(CorruptCheckpoint, match=f"^{name} has other content"):
                store.load(1)


def test_verify_has_a_line_for_each_file(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 2)
    corrupt(local, "weights.safetensors", "flipped")
    corrupt(local, "state.json", "deleted")
    assert store.verify(2) == [
        "weights.safetensors has other content than was written (sha256 differs)", "state.json is missing",
    ]  # fmt: skip


def test_all_corrupt_is_an_error_and_not_a_fresh_start(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    save(store, 1, 2)
    storage.write(f"{folder(1)}/state.json", b"{}")
    corrupt(storage, "weights.safetensors", "deleted")
    lines: list[str] = []
    for _ in range(2):  # the second time there is nothing committed any more, and yet there was
        with pytest.raises(CorruptCheckpoint) as caught:
            store.newest(lines.append)
        assert str(caught.value) == f"no valid checkpoint is left in {storage}: 2 quarantined as corrupt"
    assert [line.split(" (")[0] for line in lines] == [
        "checkpoint step-00000002 is corrupt", "checkpoint step-00000001 is corrupt",
    ]  # fmt: skip


def test_nothing_ever_committed_is_a_fresh_start(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    assert store.newest(pytest.fail) is None
    storage.write(f"{folder(3)}/weights.safetensors", b"of a killed save")
    storage.write("notes.txt", b"of a user")
    assert store.newest(pytest.fail) is None


def test_what_a_transfer_corrupts_once_is_read_again_and_not_quarantined(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 1)
    corrupted: list[str] = []

    def once(name: str, data: bytes) -> bytes:
        if name.endswith(MANIFEST) or name in corrupted:
            return data
        corrupted.append(name)
        return flip(data)

    local.corrupt = once
    assert_is(store, 1)
    assert len(corrupted) == 3


def test_storage_that_is_down_quarantines_nothing(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 1, 2)

    def down(name: str, data: bytes) -> bytes:
        raise StorageError("no answer")

    local.corrupt = down
    local.actions.clear()
    with pytest.raises(StorageError, match="no answer"):
        store.newest(pytest.fail)
    assert local.actions == []
    assert store.steps() == [1, 2]


def test_a_checkpoint_of_a_newer_trainer_is_not_taken_for_corrupt(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 1, 2)
    path = f"{folder(2)}/{MANIFEST}"
    local.write(path, json.dumps({**json.loads(local.read(path)), "format": 2, "trainer": "9.1"}).encode())
    with pytest.raises(StorageError, match=r"step-00000002 has format 2, written by trainer 9\.1; .*: update it$"):
        store.newest(pytest.fail)
    assert store.steps() == [1, 2]


# retention


def test_prune_keeps_the_newest_and_the_protected_and_deletes_the_manifest_first(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    save(store, 1, 2, 3, 4, 5)
    storage.actions.clear()
    assert store.prune(2, lambda step: step == 2) == [1, 3]
    assert store.steps() == [2, 4, 5]
    assert storage.actions[:4] == [
        ("delete", f"{folder(1)}/{MANIFEST}"),
        ("delete_tree", folder(1)),
        ("delete", f"{folder(3)}/{MANIFEST}"),
        ("delete_tree", folder(3)),
    ]
    for step in (2, 4, 5):
        assert_is(store, step)
    assert store.prune(9) == []
    assert store.steps() == [2, 4, 5]


def test_prune_deletes_what_was_killed_but_not_what_was_quarantined_or_may_be_in_flight(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 2, 4)
    local.write(f"{folder(1)}/weights.safetensors", b"of a killed prune")
    local.write(f"{folder(3)}/weights.safetensors", b"of a killed save")
    local.write(f"{folder(5)}/weights.safetensors", b"of a save in flight")
    corrupt(local, "state.json", "flipped")
    store.quarantine(2, "state.json")
    assert store.prune(1) == []
    assert store.folders() == [2, 4, 5]
    assert store.steps() == [4]


def test_prune_never_deletes_everything(local: Recorder) -> None:
    store = CheckpointStore(local)
    save(store, 1)
    for keep in (0, -1):
        with pytest.raises(AssertionError):
            store.prune(keep)
    assert store.steps() == [1]


# in the background


def test_one_save_is_in_flight_and_the_next_waits_for_it(local: Recorder) -> None:
    store = CheckpointStore(local)
    go, running, most = threading.Event(), [0], [0]

    def slow(step: int) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        go.wait(10)
        save(store, step)
        running[0] -= 1

    store.in_background(lambda: slow(1))
    with pytest.raises(TimeoutError, match=r"^a checkpoint was still being written after 0 s$"):
        store.wait(0.05)
    assert store.steps() == []
    threading.Timer(0.1, go.set).start()
    store.in_background(lambda: slow(2))
    assert store.steps()[0] == 1
    store.wait()
    assert store.steps() == [1, 2]
    assert most == [1]
    assert store.failure() is None
    assert len(store.seconds) == 2
    assert store.seconds[0] >= 0.1


def test_a_failed_background_save_is_reported_once_and_the_next_one_works(storage: Recorder) -> None:
    store = CheckpointStore(storage)
    error = StorageError("the upload failed")

    def fail(name: str) -> None:
        raise error

    storage.before_write = fail
    store.in_background(lambda: save(store, 1))
    store.wait()
    assert store.failure() is error
    assert store.failure() is None
    assert store.seconds == []
    storage.before_write = lambda name: None
    store.in_background(lambda: save(store, 2))
    store.wait()
    assert store.failure() is None
    assert store.steps() == [2]
    assert_is(store, 2)


def test_a_save_to_a_server_that_hangs_fails_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in endpoint(server.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        forget_s3()
        store = CheckpointStore(Storage("s3://bucket/run/checkpoints", deadline=0.5))
        started = time.monotonic()
        store.in_background(lambda: save(store, 1))
        assert time.monotonic() - started < 0.2  # the training loop continues
        store.wait(20)
    forget_s3()
    assert str(store.failure()) == (
        f"cannot look for s3://bucket/run/checkpoints/{folder(1)}/{MANIFEST}: TimeoutError: no answer within 0.5 s"
    )
