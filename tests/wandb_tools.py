"""What W&B received: a reader of `.wandb` files and a stub of its server on loopback.

The file format and the server's protocol are private to wandb and were read off version 0.31.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
KEY = "0123456789" * 4


def chunks(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, as far as they are whole."""
    position, parts = HEADER, b""  # the file's own header is as long as a record's
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block that is too short for a header is padding
            position += BLOCK - position % BLOCK
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        kind, content = data[position + 6], data[position + HEADER : position + HEADER + size]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(content) < size:
            return
        parts = content if kind in (FULL, FIRST) else parts + content
        if kind in (FULL, LAST):
            yield parts
        position += HEADER + size


@dataclass
class Stored:
    """The content of one `.wandb` file."""

    id: str = ""
    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    references: list[str] = field(default_factory=list)  # of artifacts
    exit_code: int | None = None


def _item(item: Any) -> tuple[str, Any]:
    return item.key or ".".join(item.nested_key), json.loads(item.value_json)


def read_file(path: Path) -> Stored:
    stored = Stored()
    for chunk in chunks(path.read_bytes()):
        record = Record.FromString(chunk)
        if record.HasField("run"):
            stored.id, stored.name = record.run.run_id, record.run.display_name
            stored.group = record.run.run_group
            stored.config |= dict(map(_item, record.run.config.update))
        elif record.HasField("history"):
            stored.rows.append(dict(map(_item, record.history.item)))
        elif record.HasField("summary"):
            stored.summary |= dict(map(_item, record.summary.update))
        elif record.HasField("artifact"):
            stored.references += [entry.ref for entry in record.artifact.manifest.contents]
        elif record.HasField("exit"):
            stored.exit_code = record.exit.exit_code
    return stored


def read_runs(run: Path) -> list[Stored]:
    """All segments of a run directory, oldest first."""
    paths = sorted(run.glob("wandb/*run-*/*.wandb"), key=lambda path: path.parent.name.split("run-")[1])
    return [read_file(path) for path in paths]


def as_row(record: dict[str, Any]) -> dict[str, Any]:
    """A record of the metric log as W&B shows it."""
    kind = record["kind"]
    return {"step": record["step"], **{f"{kind}/{k}": v for k, v in record.items() if k not in ("step", "kind")}}


def values(row: dict[str, Any]) -> dict[str, Any]:
    """A row without W&B's own columns and without pictures."""
    return {name: value for name, value in row.items() if not name.startswith(("_", "pictures/"))}


def pictures(rows: list[dict[str, Any]]) -> list[str]:
    return [name for row in rows for name in row if name.startswith("pictures/")]


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests are killed, so that connections break."""


class Server:
    """A stub of W&B. `mode`: ok, refuse (503) or hang. It keeps what it was sent, by run id."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # by run and line
        self.starts: list[str] = []  # run ids, one for each wandb.init
        self.configs: dict[str, Any] = {}
        self.complete: dict[str, Any] = {}  # exit codes
        self.references: list[str] = []
        self.unknown: list[str] = []
        self.freed = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None: ...

            def answer(self, content: Any, code: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                data = self.rfile.read(size)
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    data = gzip.decompress(data)
                if outer.mode == "hang":
                    outer.freed.wait(60)
                    return
                if outer.mode == "refuse":
                    self.answer({"error": "out of service"}, 503)
                elif self.path.endswith("/graphql"):
                    self.answer({"data": outer.graphql(json.loads(data), self.headers["Host"])})
                elif self.path.endswith("/file_stream"):
                    outer.stream(self.path.split("/")[-2], json.loads(data))
                    self.answer({})
                else:
                    self.answer({})

            do_GET = do_POST = do_PUT = handle_any

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._server.server_address[1]}", "WANDB_API_KEY": KEY}

    def close(self) -> None:
        self.freed.set()
        self._server.shutdown()
        self._server.server_close()

    def history(self, run: str) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self.rows.get(run, {}).items())]

    def stream(self, run: str, message: dict[str, Any]) -> None:
        history = (message.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for line, content in enumerate(history["content"], history["offset"]):
            self.rows.setdefault(run, {})[line] = json.loads(content)
        if message.get("complete"):
            self.complete[run] = message.get("exitcode")

    def graphql(self, request: dict[str, Any], host: str) -> dict[str, Any]:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name, variables = operation[1] if operation else "", request.get("variables") or {}
        run = variables.get("name") or variables.get("run") or ""
        project = {"name": "trainer", "entity": {"name": "tester"}}
        if name == "Viewer":
            viewer = {"id": "1", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        if name == "RunResumeStatus":
            self.starts.append(run)
            rows = self.history(run)
            bucket = {
                "id": "b", "name": run, "summaryMetrics": "{}", "displayName": run, "logLineCount": 0,
                "historyLineCount": len(rows), "eventsLineCount": 0, "historyTail": json.dumps([json.dumps(rows[-1])]),
                "eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
            } if rows else None  # fmt: skip
            return {"model": {"id": "p", **project, "bucket": bucket}}
        if name == "UpsertBucket":
            self.configs[run] = json.loads(variables.get("config") or "{}")
            bucket = {
                "id": "b", "name": run, "displayName": run, "description": "", "config": "{}", "sweepName": None,
                "project": project, "historyLineCount": len(self.history(run)),
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history(run)}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"http://{host}/upload/{file}"} for file in variables.get("files", [])]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            self.references.append(json.loads(variables["input"]["metadata"])["url"])
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"artifact": artifact}}
        if name == "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        self.unknown.append(name)
        return {}


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
