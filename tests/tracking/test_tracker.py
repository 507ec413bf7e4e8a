"""The metric log never loses or doubles a record, and the console says the same with and without a terminal."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from trainer.storage.metric_log import MetricLog, read_records
from trainer.storage.objects import Storage, StorageError
from trainer.tracking.console import Console
from trainer.tracking.tracker import Tracker
from trainer.workload import Workload

from ..ranks import run

TRAIN = {"epoch": 29.99, "loss": 0.24581905, "accuracy": 0.96375, "grad_norm": 1.7, "lr": 0.001,
         "steps_per_epoch": 937.5, "samples_per_second": 123456.7, "data_wait": 0.04}  # fmt: skip
EVALUATE = {"epoch": 30.0, "accuracy": 0.9532, "loss": 0.18828, "top5_accuracy": 1.0}


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run") if request.param == "file" else f"memory://{uuid.uuid4().hex}")


def record(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "kind": "train", "loss": 1 / step, **values}


def texts(storage: Storage) -> dict[str, str]:
    return {name: storage.read(f"metrics/{name}").decode() for name in storage.list("metrics")}


def silent(log: MetricLog) -> tuple[Tracker, io.StringIO]:
    stream = io.StringIO()
    return Tracker(log, Console(None, stream=stream)), stream


def test_records_are_whole_json_lines_in_segments_that_end_at_checkpoints(storage: Storage) -> None:
    log = MetricLog(storage)
    assert log.rewind(0) == []
    log.append(record(10))
    log.append(record(20))
    assert log.cut(20) == [record(10), record(20)]
    log.append(record(30))
    log.close()
    assert texts(storage) == {
        "00000000.jsonl": json.dumps(record(10)) + "\n" + json.dumps(record(20)) + "\n",
        "00000020.jsonl": json.dumps(record(30)) + "\n",
    }


def test_rewinding_deletes_what_came_after_and_returns_what_came_before(storage: Storage) -> None:
    log = MetricLog(storage)
    log.rewind(0)
    for step in range(10, 70, 10):
        log.append(record(step))
        if step % 20 == 0:
            log.cut(step)
    log.append(record(65))
    log.close()
    again = MetricLog(storage)
    assert again.rewind(40) == [record(10), record(20), record(30), record(40)]
    assert again.segments() == [0, 20]
    again.append(record(50))
    again.close()
    assert MetricLog(storage).rewind(1000) == [record(step) for step in (10, 20, 30, 40, 50)]
    assert MetricLog(storage).rewind(0) == []
    assert texts(storage) == {}


def test_a_torn_last_line_and_strange_files_are_left_out(storage: Storage) -> None:
    whole = json.dumps(record(10)) + "\n"
    storage.write("metrics/00000000.jsonl", (whole + whole[:20]).encode())
    storage.write("metrics/notes.jsonl", b"mine")
    assert MetricLog(storage).rewind(20) == [record(10)]
    assert read_records(b'12\n{"step": 1}') == [{"step": 1}]


def test_a_value_that_is_not_finite_is_still_valid_json(storage: Storage) -> None:
    log = MetricLog(storage)
    log.rewind(0)
    log.append({"step": 1, "kind": "train", "loss": math.nan, "grad_norm": math.inf})
    log.close()
    (line,) = texts(storage)["00000000.jsonl"].splitlines()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(line, parse_constant=refuse)["loss"] is None
    (record,) = log.read(0)
    assert math.isnan(record["loss"])
    assert record["step"] == 1


def test_every_record_is_on_the_local_disk_at_once(tmp_path: Path) -> None:
    log = MetricLog(Storage(str(tmp_path)))
    log.rewind(0)
    log.append(record(10))
    assert (tmp_path / "metrics/00000000.jsonl").read_text() == json.dumps(record(10)) + "\n"


def test_remote_segments_are_durable_before_the_checkpoint_commits() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    tracker, _ = silent(MetricLog(storage))
    tracker.log_.rewind(0)
    tracker.log(10, "evaluate", EVALUATE)
    assert texts(storage) == {}
    tracker.cut(10)
    tracker.log(20, "evaluate", EVALUATE)
    tracker.flush()  # what a save does first
    assert [json.loads(text)["step"] for text in texts(storage).values()] == [10, 20]


class Slow(Storage):
    """Holds the first write back until it is let go."""

    held: threading.Event
    go: threading.Event

    def write(self, name: str, data: bytes, **options: Any) -> None:
        if not self.held.is_set():
            self.held.set()
            assert self.go.wait(10)
        super().write(name, data, **options)


def test_an_upload_that_is_overtaken_does_not_put_older_content_back() -> None:
    storage = Slow(f"memory://{uuid.uuid4().hex}")
    storage.held, storage.go = threading.Event(), threading.Event()
    log = MetricLog(storage)
    log.rewind(0)
    log.append(record(10))
    threads = [threading.Thread(target=log.flush) for _ in range(2)]
    threads[0].start()
    assert storage.held.wait(10)
    log.append(record(20))
    threads[1].start()
    time.sleep(0.1)
    storage.go.set()
    for thread in threads:
        thread.join(10)
    assert log.read(0) == [record(10), record(20)]


def test_a_metric_folder_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("not a folder")
    tracker, stream = silent(MetricLog(Storage(str(tmp_path))))
    tracker.log_.rewind(0)
    for step in (10, 20, 30):
        tracker.log(step, "evaluate", EVALUATE)
    tracker.cut(30)
    tracker.flush()
    tracker.flush()
    warnings = [line for line in stream.getvalue().splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warnings] == ["the metric log cannot be written", "the metric log"]
    (tmp_path / "metrics").unlink()  # somebody makes room
    tracker.close({}, False)
    assert [r["step"] for r in tracker.log_.read(0)] == [10, 20, 30]


def test_a_full_disk_is_a_warning_and_its_segment_is_written_when_there_is_room_again(tmp_path: Path) -> None:
    tracker, stream = silent(MetricLog(Storage(str(tmp_path))))
    tracker.log_.rewind(0)
    segment = tmp_path / "metrics/00000000.jsonl"
    segment.parent.mkdir()
    segment.symlink_to("/dev/full")
    tracker.log(10, "evaluate", EVALUATE)
    tracker.log(20, "evaluate", EVALUATE)
    assert "warning: the metric log cannot be written: [Errno 28] No space left on device" in stream.getvalue()
    segment.unlink()
    tracker.cut(20)
    tracker.log(30, "evaluate", EVALUATE)
    tracker.flush()
    assert [r["step"] for r in tracker.log_.rewind(100)] == [10, 20, 30]


def test_a_run_whose_metrics_cannot_be_written_trains_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics").write_text("not a folder")
    output = run(["--duration", "30 steps", "--workload.network", "softmax", "--run.url", "run"], tmp_path)
    assert json.loads(output.splitlines()[-1])["status"] == "done"
    assert "warning: the metric log cannot be written" in output
    assert (tmp_path / "run/checkpoints/step-00000030/MANIFEST.json").exists()


class Remembering:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def past(self, records: list[dict[str, Any]]) -> None:
        self.calls.append(("past", [r["step"] for r in records]))

    def log(self, records: list[dict[str, Any]]) -> None:
        self.calls.append(("log", [r["step"] for r in records]))

    def image(self, step: int, name: str, png: bytes) -> None:
        self.calls.append(("image", name))

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        self.calls.append(("close", failed))


@pytest.mark.parametrize(("status", "rest"), [("done", [("log", [30])]), ("preempted", [])])
def test_sinks_get_what_is_committed_and_at_the_end_of_a_done_run_the_rest(
    storage: Storage, status: str, rest: list[Any]
) -> None:
    sink = Remembering()
    tracker, _ = silent(MetricLog(storage))
    tracker.records, tracker.sinks = [record(5)], (sink,)
    tracker.log_.rewind(5)
    for step in (10, 20, 30):
        tracker.log(step, "evaluate", EVALUATE)
        if step < 30:
            tracker.cut(step)
    tracker.committed(20)
    assert sink.calls == [("past", [5]), ("log", [10]), ("log", [20])]
    tracker.close({"status": status}, failed=False)
    assert sink.calls[3:] == [*rest, ("close", False)]


def test_the_best_evaluation_is_never_one_that_is_not_finite() -> None:
    tracker = Tracker(MetricLog(Storage("memory://best")), Console(None, stream=io.StringIO()))
    for step, accuracy in ((1, math.nan), (2, 0.5), (3, 0.7), (4, 0.6)):
        tracker.records.append({"step": step, "kind": "evaluate", "accuracy": accuracy})
    assert tracker.best("accuracy", maximise=True) == 3
    assert tracker.best("accuracy", maximise=True, among=[1, 2, 4]) == 4
    assert tracker.best("accuracy", maximise=False, among=[1, 2, 4]) == 2
    assert tracker.best("fid", maximise=False) is None


def test_without_a_terminal_every_record_is_a_line_of_at_most_80_columns() -> None:
    stream = io.StringIO()
    console = Console(28125, Workload.scalars, stream)
    console.start(0)
    console.log(75, "train", {**TRAIN, "epoch": 0.08})
    console.log(28125, "evaluate", EVALUATE)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"step    75/28125  epoch 0\.08  loss 0\.2458  accuracy 96\.4%  123\.5k/s  ETA [\d:]+", first)
    assert second == "step 28125/28125  epoch 30.00  loss 0.1883  accuracy 95.3%  held out"
    large = io.StringIO()
    console = Console(450360, Workload.scalars, large)
    console.start(0)
    console._begin -= 3600 * 12
    console.log(150000, "train", TRAIN)
    (line,) = large.getvalue().splitlines()
    assert line.startswith("step 150000/450360 epoch 29.99 loss 0.2458 accuracy 96.4% 123.5k/s ETA 24:01:4")
    assert len(line) <= 80


def test_an_output_that_cannot_be_written_does_not_end_a_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for stream in (Full(), Gone()):
        Console(10, stream=stream).note("something")


def test_a_terminal_of_few_characters_shows_the_others_by_their_number() -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, "ascii", write_through=True)
    Console(10, stream=terminal).note("Zürich 犬")
    assert raw.getvalue() == b"Z\\xfcrich \\u72ac\n"


SCRIPT = """
import sys, time
from trainer.tracking.console import Console
from trainer.workload import Workload
console = Console(2000, Workload.scalars)
console.start(0)
console.note("before")
for step in range(1, 2001):
    if step % 50 == 0:
        console.log(step, "train", {"epoch": step / 100, "loss": 100 / step, "accuracy": step / 2001,
                                    "samples_per_second": 12345.0})
    if step == 1000:
        console.log(step, "evaluate", {"epoch": 10.0, "accuracy": 0.5, "loss": 1.0})
    console.progress(step)
    time.sleep(0.0006)
console.close()
print("after")
"""


def on_a_terminal(script: str, columns: int = 80) -> str:
    """What a program writes to a terminal of this width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen([sys.executable, "-c", script], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    data = b""
    try:
        while part := os.read(master, 65536):
            data += part
    except OSError:  # a terminal that nobody holds open any more
        pass
    os.close(master)
    assert process.wait(30) == 0, data.decode()
    return data.decode()


def test_on_a_terminal_a_bar_of_one_line_shows_the_numbers_and_leaves_clean_lines_behind() -> None:
    raw = on_a_terminal(SCRIPT)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", raw).replace("\r", "\n")
    bars = [line for line in plain.split("\n") if "/2000" in line and "step" not in line]
    assert all(len(line) <= 80 for line in plain.split("\n"))
    late = [line for line in bars if "ETA" in line]
    assert re.search(r"\d+/2000  loss [\d.]+  accuracy [\d.]+%  12\.3k/s  ETA 0:0\d", late[-1])
    screen = ["", ""]  # the part of a terminal that counts here: lines that stay, and the one the cursor is in
    kept: list[str] = []
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", raw):
        if token == "\n":
            kept.append(screen[1])
            screen[1] = ""
        elif token == "\x1b[2K":
            screen[1] = ""
        elif token.endswith("A"):
            kept = kept[: -int(token[2:-1] or 1)]
        elif not token.startswith(("\x1b", "\r")):
            screen[1] += token
    assert [line for line in kept if line] == [
        "before", "step 1000/2000  epoch 10.00  loss 1.000  accuracy 50.0%  held out", "after",
    ]  # fmt: skip


def test_storage_errors_of_the_log_reach_who_asks_for_them() -> None:
    class Broken(Storage):
        def write(self, name: str, data: bytes, **options: Any) -> None:
            raise StorageError("cannot write")

    log = MetricLog(Broken(f"memory://{uuid.uuid4().hex}"))
    log.rewind(0)
    log.append(record(1))
    with pytest.raises(StorageError, match="cannot write"):
        log.flush()
