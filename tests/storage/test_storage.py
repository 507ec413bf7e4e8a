"""The storage layer on real backends: a local disk, memory, an S3 server, and servers that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from trainer.storage.objects import Storage, StorageError, redact

SECRET = "hunter2-secret"


def forget_s3() -> None:
    """Drop fsspec's cached connections, which keep the environment that they were made in."""
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module", autouse=True)
def no_connection_of_another_module() -> None:
    forget_s3()


def use_s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh prefix on the S3 server; a bucket each would use up the server's volumes."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return f"s3://warm-up/{uuid.uuid4().hex}"


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    return use_s3(s3_server, monkeypatch)


@pytest.fixture
def other_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets or (None) removes what s3:// is reached with, for this test."""

    def change(**environment: str | None) -> None:
        for name, value in environment.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        forget_s3()

    yield change
    forget_s3()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return f"file://{tmp_path}/run" if request.param == "file" else f"memory://{uuid.uuid4().hex}/run"


class Flaky(MemoryFileSystem):
    """A remote backend: its first calls fail with `errors`, before or after the work is done."""

    protocol = "flaky"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    errors: ClassVar[list[Exception]] = []
    after: ClassVar[bool] = False
    calls: ClassVar[list[str]] = []

    @classmethod
    def _fail(cls, name: str) -> None:
        cls.calls.append(name)
        if cls.errors:
            raise cls.errors.pop(0)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if not self.after:
            self._fail("pipe_file")
        waiting, self.errors[:] = self.errors[:], []  # it asks for info itself, and would swallow the errors
        try:
            super().pipe_file(path, value, mode, **options)
        finally:
            self.errors[:] = waiting
        if self.after:
            self._fail("pipe_file")

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._fail("cat_file")
        return super().cat_file(path, *arguments, **options)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._fail("info")
        return super().info(path, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Storage:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for name, value in {"store": {}, "pseudo_dirs": [""], "errors": [], "after": False, "calls": []}.items():
        monkeypatch.setattr(Flaky, name, value)
    return Storage("flaky://server/run", deadline=20)


@contextlib.contextmanager
def s3_answers(
    other_s3: Callable[..., None], answer: Callable[[], tuple[int, str]]
) -> Iterator[list[http.server.BaseHTTPRequestHandler]]:
    """An S3 endpoint that gives each request the status and the error code that `answer` says."""
    requests: list[http.server.BaseHTTPRequestHandler] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append(self)
            status, code = answer()
            body = f"<Error><Code>{code}</Code><Message>the server says {code}</Message></Error>" if code else ""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    other_s3(**endpoint(server.server_address[1]))
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()


def endpoint(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


def failure(call: Callable[[], object]) -> StorageError:
    """The StorageError of a call; it is one line and holds no secret."""
    with pytest.raises(StorageError) as caught:
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert SECRET not in message
    assert "trainer-secret" not in message
    return caught.value


# what it does


def test_objects_are_written_listed_read_overwritten_and_deleted(url: str) -> None:
    storage = Storage(url)
    assert storage.list() == []
    assert not storage.exists("a/one.bin")
    storage.write("a/one.bin", b"first")
    storage.write("a/one.bin", b"\x00second\xff")
    storage.write("b.json", b"{}")
    assert storage.read("a/one.bin") == b"\x00second\xff"
    assert storage.exists("a/one.bin")
    assert storage.list() == ["a", "b.json"]
    assert storage.list("a") == ["one.bin"]
    storage.delete("b.json")
    storage.delete("b.json")  # a missing one is no error
    storage.delete_tree("a")
    storage.delete_tree("a")
    assert not storage.exists("b.json")
    assert not storage.exists("a/one.bin")


def test_a_folder_below_is_the_same_storage(url: str) -> None:
    storage = Storage(url, deadline=7)
    below = storage.at("checkpoints").at("step-1")
    below.write("x", b"1")
    assert storage.read("checkpoints/step-1/x") == b"1"
    assert below.url == f"{storage.url}/checkpoints/step-1"
    assert (below.deadline, below.local) == (7, storage.local)
    assert str(storage) == url


def test_reading_a_missing_object_is_an_error_that_says_so(url: str) -> None:
    error = failure(lambda: Storage(url).read("nothing"))
    assert (error.missing, error.exists) == (True, False)
    assert str(error).startswith(f"cannot read {url}/nothing: FileNotFoundError: ")


def test_a_probe_passes_where_all_is_well_and_leaves_nothing(url: str) -> None:
    storage = Storage(url, deadline=50)
    storage.probe(deadline=20)
    assert storage.list() == []
    assert storage.deadline == 50


def test_create_refuses_to_overwrite(url: str) -> None:
    storage = Storage(url)
    storage.write("lease", b"first", create=True)
    error = failure(lambda: storage.write("lease", b"second", create=True))
    assert (error.missing, error.exists) == (False, True)
    assert storage.read("lease") == b"first"


@pytest.mark.parametrize("backend", ["file", "s3"])
def test_of_eight_racing_creators_exactly_one_wins(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage = Storage(str(tmp_path) if backend == "file" else request.getfixturevalue("s3"))
    storage.write("warm", b"")  # so that no racer is held up by the first connection
    for race in range(5 if storage.local else 1):  # the losers of a race wait for seconds on SeaweedFS's locks
        name, start, losers, winners = f"race-{race}", threading.Barrier(8), [], []

        def create(racer: int) -> None:
            start.wait()  # noqa: B023
            try:
                storage.write(name, b"%d" % racer, create=True)  # noqa: B023
                winners.append(racer)  # noqa: B023
            except StorageError as error:
                losers.append(error.exists)  # noqa: B023

        threads = [threading.Thread(target=create, args=(racer,)) for racer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert losers == [True] * 7
        assert storage.read(name) == b"%d" % winners[0]


def test_a_local_write_is_synced_with_every_folder_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    Storage(str(tmp_path)).write("checkpoints/step-1/x", b"1")
    assert Path(synced[0]).name.startswith(".x.")
    assert synced[1:] == [str(tmp_path / "checkpoints/step-1"), str(tmp_path / "checkpoints"), str(tmp_path)]


def test_a_local_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = failure(lambda: storage.write("x", b"new"))
    assert str(error) == f"cannot write {tmp_path}/x: OSError: [Errno 28] No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read("x") == b"old"


def test_a_file_system_without_hard_links_still_creates_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    storage.write("lease", b"first", create=True)
    assert failure(lambda: storage.write("lease", b"second", create=True)).exists
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_a_file_server_gets_the_folder_before_the_file(tmp_path: Path) -> None:
    class Server(LocalFileSystem):  # as sftp: no folder is made by writing into it
        protocol = "server"

    fsspec.register_implementation("server", Server, clobber=True)
    storage = Storage(f"server://{tmp_path}/run")
    storage.write("checkpoints/step-1/x", b"1")
    storage.write("checkpoints/step-1/MANIFEST.json", b"2", create=True)
    assert (tmp_path / "run/checkpoints/step-1/x").read_bytes() == b"1"
    assert failure(lambda: storage.write("checkpoints/step-1/MANIFEST.json", b"3", create=True)).exists


# transient errors


@pytest.mark.parametrize("name", ["pipe_file", "cat_file", "info"])
def test_a_backend_that_fails_twice_is_asked_a_third_time(flaky: Storage, name: str) -> None:
    flaky.write("x", b"1")
    Flaky.calls.clear()
    Flaky.errors += [ConnectionResetError("reset"), OSError(16, "Slow down")]
    if name == "pipe_file":
        flaky.write("x", b"2")
        assert next(iter(Flaky.store.values())).getvalue() == b"2"
    elif name == "cat_file":
        assert flaky.read("x") == b"1"
    else:
        assert flaky.exists("x")
    assert Flaky.calls[:3] == [name] * 3
    assert Flaky.errors == []


def test_an_s3_server_that_is_overloaded_is_asked_again(other_s3: Callable[..., None]) -> None:
    answers = itertools.chain([(503, "SlowDown"), (500, "InternalError")], itertools.repeat((200, "")))
    with s3_answers(other_s3, lambda: next(answers)) as requests:
        Storage("s3://bucket/run", deadline=30).write("x", b"1")
    assert len(requests) == 3


def test_a_create_whose_answer_was_lost_has_succeeded(flaky: Storage) -> None:
    Flaky.after = True
    Flaky.errors.append(ConnectionResetError("after the work was done"))
    flaky.write("lease", b"mine", create=True)
    assert Flaky.errors == []
    assert failure(lambda: flaky.write("lease", b"other", create=True)).exists
    assert flaky.read("lease") == b"mine"


def test_an_error_is_not_taken_for_a_missing_object(flaky: Storage) -> None:
    """fsspec's exists() says False to any error, and a run whose checkpoints seem missing starts from scratch."""
    flaky.write("MANIFEST.json", b"{}")
    flaky.deadline = 0.3
    Flaky.errors += [ConnectionResetError("down")] * 50
    error = failure(lambda: flaky.exists("MANIFEST.json"))
    assert str(error) == "cannot look for flaky://server/run/MANIFEST.json: ConnectionResetError: down"


@pytest.mark.parametrize("error", [PermissionError("no"), ValueError("bad name"), TypeError("bug")])
def test_an_error_that_no_retry_can_fix_fails_at_once(flaky: Storage, error: Exception) -> None:
    Flaky.errors += [error] * 3
    message = str(failure(lambda: flaky.read("x")))
    assert message == f"cannot read flaky://server/run/x: {type(error).__name__}: {error}"
    assert len(Flaky.errors) == 2


def test_an_endless_error_ends_at_the_deadline(flaky: Storage) -> None:
    Flaky.errors += [ConnectionResetError("down")] * 1000
    started = time.monotonic()
    failure(lambda: flaky.write("x", b"1", deadline=0.8))
    assert time.monotonic() - started < 2
    assert 1 < 1000 - len(Flaky.errors) < 100


def test_the_deadline_of_a_write_grows_with_its_size() -> None:
    storage = Storage("memory://x/run", deadline=60)
    assert storage.timeout_for(0) == 60
    assert storage.timeout_for(2 * 10**9) == 1060


# permanent errors


def test_an_s3_server_that_accepts_and_never_answers_is_given_up_at_the_deadline(
    other_s3: Callable[..., None],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        other_s3(**endpoint(server.getsockname()[1]))
        storage = Storage("s3://bucket/run", deadline=1.5)
        started = time.monotonic()
        error = failure(lambda: storage.write("x", b"1"))
        assert 1.4 < time.monotonic() - started < 5
    assert str(error) == "cannot write s3://bucket/run/x: TimeoutError: no answer within 1.5 s"


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_refused_at_once(s3: str, wrong: str, other_s3: Callable[..., None]) -> None:
    other_s3(**{wrong: SECRET})
    storage = Storage(s3, deadline=60)
    started = time.monotonic()
    error = failure(storage.probe)
    assert f"cannot write {s3}/.probe-" in str(error)
    assert "PermissionError: The " in str(error)
    assert "PermissionError: " in str(failure(lambda: storage.read("x")))
    assert "PermissionError: " in str(failure(lambda: storage.exists("x")))
    assert "PermissionError: " in str(failure(storage.list))
    assert time.monotonic() - started < 10
    assert not error.missing


def test_missing_credentials_are_refused_at_once(s3: str, other_s3: Callable[..., None], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none")
    other_s3(
        AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_SHARED_CREDENTIALS_FILE=nowhere,
        AWS_CONFIG_FILE=nowhere,
    )  # fmt: skip
    error = failure(lambda: Storage(s3).write("x", b"1"))
    assert str(error) == f"cannot write {s3}/x: NoCredentialsError: Unable to locate credentials"


def test_a_missing_bucket_is_reported_at_once(other_s3: Callable[..., None]) -> None:
    # SeaweedFS makes a bucket that is written to; AWS answers like this
    with s3_answers(other_s3, lambda: (404, "NoSuchBucket")) as requests:
        error = failure(Storage("s3://no-such-bucket/run", deadline=30).probe)
    assert str(error).startswith("cannot write s3://no-such-bucket/run/.probe-")
    assert str(error).endswith(": FileNotFoundError: the server says NoSuchBucket")
    assert len(requests) == 1


def test_an_invalid_bucket_name_is_explained(s3: str) -> None:
    error = failure(lambda: Storage("s3://Bad_Bucket!/run").write("x", b"1"))
    assert 'Invalid bucket name "Bad_Bucket!"' in str(error)


def test_a_folder_below_a_regular_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for create in (False, True):
        for url in (f"{tmp_path}/file", f"{tmp_path}/file/deeper"):
            error = failure(lambda: Storage(url).write("x", b"1", create=create))  # noqa: B023
            assert not error.exists  # a lease would take that for a holder
            assert str(error).startswith(f"cannot write {url}/x: NotADirectoryError: ")


def test_a_read_only_place_fails_the_probe() -> None:
    error = failure(Storage("/proc/run").probe)
    assert str(error).startswith("cannot write /proc/run/.probe-")


def test_a_server_that_refuses_the_connection_gives_one_line_without_the_password() -> None:
    class Server(MemoryFileSystem):  # as sftp, whose constructor connects
        protocol = "refusing"

        def __init__(self, *arguments: Any, **options: Any) -> None:
            raise ConnectionRefusedError(f"me:{SECRET}@host refused\nthe connection")

    fsspec.register_implementation("refusing", Server, clobber=True)
    error = failure(lambda: Storage(f"refusing://me:{SECRET}@host/run"))
    assert (
        str(error)
        == "cannot connect to refusing://host/run: ConnectionRefusedError: me:***@host refused the connection"
    )


def test_a_server_that_hangs_while_connecting_is_given_up_at_the_deadline() -> None:
    class Server(MemoryFileSystem):
        protocol = "hanging"

        def __init__(self, *arguments: Any, **options: Any) -> None:
            time.sleep(5)

    fsspec.register_implementation("hanging", Server, clobber=True)
    error = failure(lambda: Storage("hanging://host/run", deadline=0.2))
    assert str(error) == "cannot connect to hanging://host/run: TimeoutError: no answer within 0.2 s"


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    error = failure(lambda: Storage(f"s4://me:{SECRET}@bucket/run?signature={SECRET}"))
    assert str(error).startswith(
        "s4://bucket/run?...: not a URL that can be used: ValueError: Protocol not known: s4; "
    )
    assert "s3://, s3a://, sftp://" in str(error)


@pytest.mark.parametrize(
    ("protocol", "package", "extra"),
    [("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure"), ("sftp", "paramiko", "ssh"), ("hdfs", "pyarrow", None)],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    protocol: str, package: str, extra: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = str(failure(lambda: Storage(f"{protocol}://me:{SECRET}@host/run")))
    hint = f": pip install 'trainer[{extra}]' (" if extra else " ("
    assert error.startswith(f"{protocol}://host/run: {protocol}:// needs another package{hint}")
    assert package in error or extra == "azure"


@pytest.mark.parametrize("url", ["s3://", "memory://", "file:///"])
def test_a_url_without_a_folder_is_refused(url: str) -> None:
    assert str(failure(lambda: Storage(url))).startswith(f"{url}: names no folder")


def test_redact_hides_user_password_and_signature() -> None:
    assert redact("sftp://me:pw@host:22/a@b") == "sftp://host:22/a@b"
    assert redact("https://host/run?sig=abc") == "https://host/run?..."
    assert redact("s3://bucket/run@2") == "s3://bucket/run@2"
    assert redact("/local/me:pw@x?y") == "/local/me:pw@x?y"
