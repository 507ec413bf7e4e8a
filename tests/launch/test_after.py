"""What a job does at the end of an attempt: continue, stop, or give up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from launch.after import Attempt, decide, newest_step, read_attempts, requeue_policy
from trainer.config.status import RESUMABLE, Status


def attempts(*ends: tuple[Status, int]) -> list[Attempt]:
    return [Attempt(f"1.{index}", status, step) for index, (status, step) in enumerate(ends)]


def decision(*ends: tuple[Status, int], crashes: int = 3, chained: bool = False) -> str:
    *earlier, last = attempts(*ends)
    return requeue_policy(last, earlier, crashes, chained)[0]


def test_a_run_that_is_done_is_not_requeued() -> None:
    assert decision(("done", 100)) == "done"
    assert decision(("preempted", 50), ("done", 100)) == "done"


def test_a_run_that_was_stopped_is_continued() -> None:
    assert decision(("preempted", 10)) == "requeue"
    assert decision(("time_limit", 10)) == "requeue"
    assert decision(("time_limit", 10), chained=True) == "next"
    assert decision(("preempted", 10), chained=True) == "requeue"


@pytest.mark.parametrize("status", sorted({*get_args(Status)} - {"done", *RESUMABLE}))
def test_a_run_that_would_end_in_the_same_way_is_not_requeued(status: Status) -> None:
    assert decision((status, 10)) == "failed"


def test_a_crash_loop_ends_after_so_many_attempts_without_progress() -> None:
    crash: tuple[Status, int] = ("crashed", 0)
    assert [decision(*[crash] * n) for n in (1, 2, 3)] == ["requeue", "requeue", "failed"]
    assert decision(crash, crashes=1) == "failed"


def test_the_count_starts_again_whenever_the_run_has_advanced() -> None:
    assert decision(("crashed", 0), ("crashed", 0), ("crashed", 5)) == "requeue"
    assert decision(*[("crashed", step) for step in range(1, 50)]) == "requeue"
    assert decision(("crashed", 0), ("crashed", 5), ("crashed", 5), ("crashed", 5)) == "requeue"
    assert decision(("crashed", 5), ("crashed", 5), ("crashed", 5), ("crashed", 5)) == "failed"


def test_being_preempted_without_progress_is_bad_luck_and_not_a_crash() -> None:
    assert decision(*[("preempted", 5)] * 20) == "requeue"
    assert decision(("crashed", 5), ("preempted", 5), ("crashed", 5), ("crashed", 5)) == "requeue"
    assert decision(("crashed", 5), ("crashed", 5), ("preempted", 5), ("crashed", 5), ("crashed", 5)) == "failed"


def test_a_time_limit_too_short_for_any_progress_is_a_loop_as_well() -> None:
    assert decision(*[("time_limit", 5)] * 4) == "failed"
    assert decision(*[("time_limit", 5)] * 4, chained=True) == "failed"


def test_with_crashes_0_a_crash_ends_the_job_and_the_time_limit_does_not() -> None:
    assert decision(("crashed", 5), crashes=0) == "failed"
    assert decision(("time_limit", 5), crashes=0) == "requeue"


def write_run(run: Path, outcome: dict[str, object] | str | None, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").write_text("{}")
    run.mkdir(exist_ok=True)
    if outcome is not None:
        (run / "outcome.json").write_text(outcome if isinstance(outcome, str) else json.dumps(outcome))


def test_an_outcome_counts_only_if_this_attempt_has_written_it(tmp_path: Path) -> None:
    run, record = tmp_path / "run", tmp_path / "launch" / "attempts.jsonl"
    write_run(run, {"status": "preempted", "life": "7.0"}, 4, 12)
    assert decide(str(run), record, "7.0", 1, 3, False)[0] == "requeue"
    decide(str(run), record, "7.1", 1, 3, False)  # died before it could begin: the outcome is the one of 7.0
    assert [(a.status, a.step) for a in read_attempts(record)] == [("preempted", 12), ("crashed", 12)]
    decide(str(run), record, "7.2", 1, 3, False)
    assert decide(str(run), record, "7.3", 1, 3, False)[0] == "failed"


def test_a_run_that_was_done_before_is_done(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"status": "done", "life": "3.0"}, 4)
    assert decide(str(tmp_path / "run"), tmp_path / "a", "9.0", 0, 3, False)[0] == "done"
    # ... but not if this attempt, which may have been asked to train longer, has failed
    assert decide(str(tmp_path / "run"), tmp_path / "a", "9.0", 1, 3, False)[0] == "requeue"


@pytest.mark.parametrize("outcome", [None, "{", "[]", ""])
def test_without_an_outcome_that_can_be_read_it_was_a_crash(tmp_path: Path, outcome: str | None) -> None:
    write_run(tmp_path / "run", outcome)
    decide(str(tmp_path / "run"), tmp_path / "a", "1.0", 1, 3, False)
    assert read_attempts(tmp_path / "a")[0].status == "crashed"


def test_an_incomplete_line_of_the_record_is_skipped(tmp_path: Path) -> None:
    write_run(tmp_path / "run", None)
    (tmp_path / "a").write_text('{"life": "1.0", "status": "cra\n')
    decide(str(tmp_path / "run"), tmp_path / "a", "1.1", 1, 3, False)
    assert [a.id for a in read_attempts(tmp_path / "a")] == ["1.1"]


def test_an_attempt_is_a_line_of_json_with_the_keys_of_earlier_runs(tmp_path: Path) -> None:
    line = '{"life": "1.0", "status": "crashed", "step": 4, "code": 1, "at": 1700000000}\n'
    (tmp_path / "a").write_text(line)
    (attempt,) = read_attempts(tmp_path / "a")
    assert attempt == Attempt("1.0", "crashed", 4, 1, 1700000000)
    assert attempt.to_json() + "\n" == line


def test_only_committed_checkpoints_count_and_any_url_will_do(tmp_path: Path) -> None:
    write_run(tmp_path / "run", None, 8, 16)
    (tmp_path / "run" / "checkpoints" / "step-00000024").mkdir()
    assert newest_step(str(tmp_path / "run")) == 16
    assert newest_step(f"file://{tmp_path}/run") == 16
    assert newest_step(str(tmp_path / "nothing")) == 0
