"""The protocols that a URL may have: one table for the settings, which check it, and for storage, which connects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    extra: str | None = None  # of this package, which brings the backend
    object_store: bool = False  # has no folders, and connects with the first request


_S3, _GCS, _AZURE, _SSH = Protocol("s3", True), Protocol("gcs", True), Protocol("azure", True), Protocol("ssh")
PROTOCOLS: dict[str, Protocol] = {
    "file": Protocol(), "memory": Protocol(), "s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS,
    "az": _AZURE, "abfs": _AZURE, "abfss": _AZURE, "ssh": _SSH, "sftp": _SSH, "webdav": Protocol(),
}  # fmt: skip
