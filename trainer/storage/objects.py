"""One storage layer over fsspec: atomic objects, one error class, a deadline on every call, jittered retries.

Objects are written in one piece from memory. A file object that is closed by an exception commits its truncated content
on every fsspec backend, so none is used for writing.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec
import tenacity

from .protocols import PROTOCOLS, Protocol

T = TypeVar("T")

_OPTIONS: dict[str | None, dict[str, Any]] = {  # of the backends, by the extra that brings them
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2, "mode": "standard"}},
    },
    "gcs": {"use_listings_cache": False},
    "azure": {"use_listings_cache": False},
}
_PERMANENT = (  # errors that a retry would not change
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError,
    ValueError, TypeError, AttributeError, LookupError, NotImplementedError,
)  # fmt: skip
_PERMANENT_NAMES = {"NoCredentialsError", "ParamValidationError", "ProfileNotFound", "ClientAuthenticationError"}
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
SLOWEST_BYTES_PER_SECOND = 2e6  # a deadline grows by this, or a large file could never be moved


class StorageError(Exception):
    """Storage failed; `missing` means that the object does not exist, `exists` that it does, which `create` refuses."""

    def __init__(self, message: str, *, missing: bool = False, exists: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.exists = exists


def redact(url: str) -> str:
    """The URL without user names, passwords and query (which may hold a signature)."""
    scheme, separator, location = url.partition("://")
    if not separator:
        return url
    location, question, _ = location.partition("?")
    host, slash, path = location.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?...' if question else ''}"


def _secrets(url: str) -> set[str]:
    """What an error of another library must not repeat from the URL."""
    location, _, query = url.partition("://")[2].partition("?")
    user = location.partition("/")[0].rpartition("@")[0]
    password = user.partition(":")[2]
    return {query, password, unquote(password)} - {""}


def _retryable(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, _PERMANENT):
        return False
    return type(error).__name__ not in _PERMANENT_NAMES


def _with_timeout(call: Callable[[], T], seconds: float, deadline: float) -> T:
    """Run a call that may hang, in a thread that may be abandoned; `seconds` are what is left of the `deadline`."""
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {deadline:g} s")
    if failure:
        raise failure[0]
    return result[0]


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, target: Path, data: bytes) -> None:
    """Give a finished file its name, unless that is taken."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _write_synced(target, data)  # as exclusive, though a crash right now leaves it truncated


class Storage:
    """A folder at any fsspec URL. Names are relative, with forward slashes."""

    def __init__(self, url: str, deadline: float = 120.0) -> None:
        self.url = url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())
        self.deadline = deadline
        protocol, separator, _ = self.url.partition("://")
        if "://" in url and not separator:
            raise StorageError(f"{url}: names no folder: give a path as well, such as {protocol}//name/run")
        protocol = protocol if separator else "file"
        self.local = protocol in ("file", "local")
        self._in_process = self.local or protocol == "memory"
        known = PROTOCOLS.get(protocol, Protocol())
        self._object_store = known.object_store

        def connect() -> tuple[Any, str]:
            return fsspec.core.url_to_fs(self.url, **_OPTIONS.get(known.extra, {}))

        try:
            lazy = self._in_process or self._object_store
            self._fs, self._root = connect() if lazy else _with_timeout(connect, deadline, deadline)
        except ImportError as error:
            extra = known.extra
            hint = f": pip install 'trainer[{extra}]'" if extra else ""
            raise StorageError(f"{self}: {protocol}:// needs another package{hint} ({error})") from None
        except ValueError as error:
            raise StorageError(
                f"{self}: not a URL that can be used: {self._reason(error)}; "
                f"use a path, or one of {', '.join(f'{name}://' for name in sorted(PROTOCOLS))}"
            ) from None
        except Exception as error:
            raise StorageError(f"cannot connect to {self}: {self._reason(error)}") from error

    def __str__(self) -> str:
        return redact(self.url)

    def at(self, name: str) -> Storage:
        """The folder below, over the same connection."""
        below = copy.copy(self)
        below.url, below._root = f"{self.url}/{name}", self._path(name)
        return below

    def timeout_for(self, size: int) -> float:
        """Seconds that moving so many bytes may take."""
        return self.deadline + size / SLOWEST_BYTES_PER_SECOND

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    def _reason(self, error: BaseException) -> str:
        """One line of an error, without the secrets of the URL."""
        line = " ".join(str(error).split())[:300] or "no reason given"
        for secret in _secrets(self.url):
            line = line.replace(secret, "***")
        return f"{type(error).__name__}: {line}"

    def _retried(self, verb: str, name: str, call: Callable[[], T], deadline: float | None = None) -> T:
        """The result of a call, retried until the deadline; raises StorageError."""
        seconds = deadline or self.deadline
        end = time.monotonic() + seconds
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_retryable),
            stop=tenacity.stop_before_delay(seconds) if not self._in_process else tenacity.stop_after_attempt(1),
            wait=tenacity.wait_random_exponential(0.2, max=10),
            reraise=True,
        )

        def attempt() -> T:
            return call() if self._in_process else _with_timeout(call, max(0.0, end - time.monotonic()), seconds)

        try:
            return retrying(attempt)
        except Exception as error:
            raise StorageError(
                f"cannot {verb} {self.at(name) if name else self}: {self._reason(error)}",
                missing=isinstance(error, FileNotFoundError),
                exists=isinstance(error, FileExistsError),
            ) from error

    def read(self, name: str, *, deadline: float | None = None) -> bytes:
        return self._retried("read", name, lambda: bytes(self._fs.cat_file(self._path(name))), deadline)

    def write(self, name: str, data: bytes, *, create: bool = False, deadline: float | None = None) -> None:
        """Write an object durably and atomically. `create` refuses to overwrite."""
        call = self._write_file if self.local else self._write_object
        deadline = deadline or self.timeout_for(len(data))
        self._retried("write", name, lambda: call(self._path(name), data, create), deadline)

    def _exists(self, path: str) -> bool:
        """fsspec's own `exists` takes any error for a no on some backends, which would hide every checkpoint."""
        try:
            self._fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def _write_object(self, path: str, data: bytes, create: bool) -> None:
        try:
            self._put(path, data, create)
        except FileNotFoundError:
            if self._in_process or self._object_store:
                raise
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)  # file servers want the folder first
            self._put(path, data, create)

    def _put(self, path: str, data: bytes, create: bool) -> None:
        if not create:
            self._fs.pipe_file(path, data)
            return
        try:
            self._fs.pipe_file(path, data, mode="create")
        except TypeError:  # a backend without create-only writes
            if self._exists(path):
                raise FileExistsError(path) from None
            self._fs.pipe_file(path, data)
        except OSError as error:  # some S3 servers answer a failed If-None-Match with EINVAL
            if not self._exists(path):
                raise
            if bytes(self._fs.cat_file(path)) == data:
                return  # an earlier attempt succeeded, and only its answer was lost
            raise FileExistsError(path) from error

    @staticmethod
    def _write_file(path: str, data: bytes, create: bool) -> None:
        target = Path(path)
        new_folders = [folder for folder in target.parents if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # would read as: the object exists
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(target.parent)) from None
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            _write_synced(temporary, data)
            if create:
                _link(temporary, target, data)
            else:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        # A new folder is an entry in the one above it.
        for folder in (target.parent, *(folder.parent for folder in new_folders)):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def exists(self, name: str) -> bool:
        return self._retried("look for", name, lambda: self._exists(self._path(name)))

    def list(self, name: str = "") -> list[str]:
        """Names of the files and folders directly below, sorted; empty where there is nothing."""

        def call() -> list[str]:
            try:
                paths = {str(path).rstrip("/") for path in self._fs.ls(self._path(name), detail=False)}
            except FileNotFoundError:
                return []
            # some object stores keep a marker for a folder, which shows in its own listing
            return sorted({path.rpartition("/")[2] for path in paths - {self._path(name).rstrip("/")}})

        names = self._retried("list", name, call)
        return [n for n in names if not n.endswith(".tmp")]

    def delete(self, name: str, *, deadline: float | None = None) -> None:
        """Delete an object; one that does not exist is no error."""

        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

        self._retried("delete", name, call, deadline)

    def delete_tree(self, name: str) -> None:
        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(name), recursive=True)

        self._retried("delete", name, call)

    def probe(self, deadline: float = 30.0) -> None:
        """Write, list, read and delete a small object, so that missing rights show before training starts."""
        name, data = f".probe-{uuid.uuid4().hex}", b"trainer"
        usual_deadline, self.deadline = self.deadline, deadline
        try:
            self.write(name, data)
            if name not in self.list():
                raise StorageError(f"cannot list {self}: a file that was just written is not shown")
            if self.read(name) != data:
                raise StorageError(f"cannot trust {self}: a file that was just written reads back differently")
            self.delete(name)
        finally:
            self.deadline = usual_deadline
