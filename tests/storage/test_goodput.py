"""Where the time of a run went: the account of its attempts, and the files that real attempts write."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from trainer.storage.goodput import Attempt, account
from trainer.storage.objects import Storage

from ..ranks import run, start, wait_for
from ..results import outcome, records

FIRST = Attempt(job="7.0", submitted=0, started=100, process=105, training=120, heard=230, step=50, before=0,
                seconds=100, checkpoint=3, evaluate=7, status="preempted")  # fmt: skip


def test_an_undisturbed_run() -> None:
    result = account([FIRST])
    assert (result.queue, result.restart, result.replay) == (100, 20 + 10, 0)
    assert (result.training, result.evaluation, result.checkpoint_stall) == (90, 7, 3)
    assert result.total == 230
    assert result.share == pytest.approx(97 / 230)


def test_what_a_killed_attempt_had_not_saved_is_replay() -> None:
    second = Attempt(
        job="7.1", started=300, process=301, training=310, heard=410, before=60, seconds=160, status="done"
    )
    result = account([FIRST, second])
    assert result.replay == 40
    assert result.queue == 100 + 70
    assert result.restart == 30 + 10
    assert result.training == 200 - 40 - 10
    assert result.total == 410
    assert result.attempts == 2


def test_a_restart_within_one_job_is_no_time_in_the_queue() -> None:
    again = Attempt(job="7.0", started=100, process=240, training=250, heard=270, before=100, seconds=120)
    result = account([FIRST, again])
    assert result.queue == 100
    assert result.restart == 30 + 10 + 10


def test_clocks_that_differ_make_no_part_negative() -> None:
    early = Attempt(job="8.0", started=200, process=190, training=195, heard=205, before=100, seconds=110)
    result = account([FIRST, early])
    assert min(result.queue, result.restart, result.replay, result.training) >= 0


def test_no_attempts_and_the_table() -> None:
    assert account([]).share == 1
    lines = account([FIRST]).table()
    assert lines[0] == "goodput 42.2% of 3:50.0 in 1 attempt"
    assert lines[4] == "  replay               0:00.0    0.0%"
    assert len({len(line) for line in lines[1:]}) == 1
    assert sum(account([FIRST]).summary()[part] for part in ("training", "evaluation", "checkpoint_stall", "replay",
                                                             "restart", "queue")) == 230  # fmt: skip


SETTINGS = ["--duration", "300 steps", "--log.every", "20 steps", "--checkpoint.every", "100 steps", "--run.url", "run"]


def test_the_attempts_of_a_run_are_counted_over_kills(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    run(SETTINGS, tmp_path / "alone")
    ranks = start(SETTINGS, tmp_path)
    assert wait_for(lambda: (tmp_path / "run" / "checkpoints" / "step-00000100" / "MANIFEST.json").exists(), ranks)
    ranks.kill(0, signal.SIGKILL)
    ranks.wait()
    text = run(SETTINGS, tmp_path)
    attempts = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "lives").iterdir())]
    assert [attempt["status"] for attempt in attempts] == ["", "done"]
    assert attempts[1]["first_step"] in (100, 200)
    goodput = outcome(tmp_path / "run")["goodput"]
    assert goodput["lives"] == 2
    assert 0 < goodput["goodput"] < 1
    assert "in 2 attempts" in text
    assert records(tmp_path / "run") == records(tmp_path / "alone" / "run"), "the metric log is the same"
    assert "goodput" not in json.loads(text.splitlines()[-1])


def test_a_corrupt_file_of_an_attempt_does_not_stop_the_run(tmp_path: Path) -> None:
    Storage(str(tmp_path / "run")).write("lives/00000.json", b"{")
    Storage(str(tmp_path / "run")).write("lives/00001.json", b'{"unknown": 1}')
    run([*SETTINGS, "--duration", "20 steps"], tmp_path)
    assert outcome(tmp_path / "run")["status"] == "done"
