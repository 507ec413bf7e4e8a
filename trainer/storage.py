"""One storage layer over fsspec: whole objects, one error class, a deadline on every call, jittered retries.

Objects are written in one piece from memory. A file object that is closed by an exception commits its truncated content
on every fsspec backend, so none is used for writing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity

T = TypeVar("T")

_S3 = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2, "mode": "standard"}},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": _S3,
    "gs": {"use_listings_cache": False},
    "gcs": {"use_listings_cache": False},
}
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
_FINAL_NAMES = {"NoCredentialsError", "ParamValidationError", "ProfileNotFound", "ClientAuthenticationError"}


class StorageError(Exception):
    """Storage did not do what was asked; `missing` tells that the object is not there."""

    def __init__(self, message: str, *, missing: bool = False, exists: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.exists = exists


def redact(url: str) -> str:
    """The URL without user names and passwords."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if separator and "@" in host else url


def _retryable(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, _FINAL) and type(error).__name__ not in _FINAL_NAMES


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """Run a call that may hang, in a thread that may be abandoned."""
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
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if failure:
        raise failure[0]
    return result[0]


class Storage:
    """A folder at any fsspec URL. Names are relative, with forward slashes."""

    def __init__(self, url: str, deadline: float = 120.0) -> None:
        self.url = url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())
        self.deadline = deadline
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        self.local = protocol in ("file", "local")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **_OPTIONS.get(protocol, {}))
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "sftp": "ssh", "ssh": "ssh"}.get(protocol, "azure")
            raise StorageError(
                f"{redact(url)}: {protocol}:// needs another package: pip install 'trainer[{extra}]' ({error})"
            ) from None
        except ValueError as error:
            raise StorageError(f"{redact(url)}: not a URL that can be used: {error}") from None
        self._in_process = self.local or protocol == "memory"

    def __str__(self) -> str:
        return redact(self.url)

    def at(self, name: str) -> Storage:
        return Storage(f"{self.url}/{name}", self.deadline)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    def _do(self, verb: str, name: str, call: Callable[[], T], deadline: float | None = None) -> T:
        deadline = deadline or self.deadline
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_retryable),
            stop=tenacity.stop_after_delay(deadline) if not self._in_process else tenacity.stop_after_attempt(1),
            wait=tenacity.wait_random_exponential(0.2, max=10),
            reraise=True,
        )
        try:
            return retrying(call) if self._in_process else retrying(_bounded, call, deadline)
        except Exception as error:
            what = f"cannot {verb} {redact(self.url)}/{name}".rstrip("/")
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StorageError(
                f"{what}: {type(error).__name__}: {reason}",
                missing=isinstance(error, FileNotFoundError),
                exists=isinstance(error, FileExistsError),
            ) from error

    def read(self, name: str) -> bytes:
        return self._do("read", name, lambda: bytes(self._fs.cat_file(self._path(name))))

    def write(self, name: str, data: bytes, *, create: bool = False, deadline: float | None = None) -> None:
        """Write a whole object durably, so that it is there in full or not at all. `create` refuses to overwrite."""
        call = self._write_file if self.local else self._write_object
        self._do("write", name, lambda: call(self._path(name), data, create), deadline)

    def _write_object(self, path: str, data: bytes, create: bool) -> None:
        if not create:
            self._fs.pipe_file(path, data)
            return
        try:
            self._fs.pipe_file(path, data, mode="create")
        except TypeError:  # a backend without create-only writes
            if self._fs.exists(path):
                raise FileExistsError(path) from None
            self._fs.pipe_file(path, data)
        except OSError as error:  # some S3 servers answer a failed If-None-Match with EINVAL
            if self._fs.exists(path):
                raise FileExistsError(path) from error
            raise

    @staticmethod
    def _write_file(path: str, data: bytes, create: bool) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if create:
                os.link(temporary, target)
            else:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def exists(self, name: str) -> bool:
        return self._do("look for", name, lambda: bool(self._fs.exists(self._path(name))))

    def list(self, name: str = "") -> list[str]:
        """Names of the files and folders directly below, sorted; empty where there is nothing."""

        def call() -> list[str]:
            try:
                found = self._fs.ls(self._path(name), detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found} - {""})

        names = self._do("list", name, call)
        return [n for n in names if not n.endswith(".tmp")]

    def delete(self, name: str) -> None:
        """Delete an object; one that is not there is fine."""

        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

        self._do("delete", name, call)

    def delete_tree(self, name: str) -> None:
        def call() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._path(name), recursive=True)

        self._do("delete", name, call)

    def probe(self, deadline: float = 30.0) -> None:
        """Write, list, read and delete a small object, so that missing rights show before training starts."""
        name, data = f".probe-{uuid.uuid4().hex}", b"trainer"
        patient, self.deadline = self.deadline, deadline
        try:
            self.write(name, data)
            if name not in self.list():
                raise StorageError(f"cannot list {self}: a file that was just written is not shown")
            if self.read(name) != data:
                raise StorageError(f"cannot trust {self}: a file that was just written reads back differently")
            self.delete(name)
        finally:
            self.deadline = patient
