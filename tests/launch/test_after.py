"""What a job does at the end of a life: go on, stop, or give up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from launch.after import Attempt, decide, judge, newest_step, read_attempts
from trainer.config.status import RESUMABLE, Status


def lives(*ends: tuple[Status, int]) -> list[Attempt]:
    return [Attempt(f"1.{index}", status, step) for index, (status, step) in enumerate(ends)]


def verdict(*ends: tuple[Status, int], crashes: int = 3, chained: bool = False) -> str:
    *before, last = lives(*ends)
    return decide(last, before, crashes, chained)[0]


def test_a_run_that_is_done_is_not_requeued() -> None:
    assert verdict(("done", 100)) == "done"
    assert verdict(("preempted", 50), ("done", 100)) == "done"


def test_what_was_stopped_goes_on() -> None:
    assert verdict(("preempted", 10)) == "requeue"
    assert verdict(("time_limit", 10)) == "requeue"
    assert verdict(("time_limit", 10), chained=True) == "next"
    assert verdict(("preempted", 10), chained=True) == "requeue"


@pytest.mark.parametrize("status", sorted({*get_args(Status)} - {"done", *RESUMABLE}))
def test_what_would_end_in_the_same_way_is_not_requeued(status: Status) -> None:
    assert verdict((status, 10)) == "failed"


def test_a_crash_loop_ends_after_so_many_lives_without_progress() -> None:
    crash: tuple[Status, int] = ("crashed", 0)
    assert [verdict(*[crash] * n) for n in (1, 2, 3)] == ["requeue", "requeue", "failed"]
    assert verdict(crash, crashes=1) == "failed"


def test_the_cap_is_reset_whenever_the_run_has_advanced() -> None:
    assert verdict(("crashed", 0), ("crashed", 0), ("crashed", 5)) == "requeue"
    assert verdict(*[("crashed", step) for step in range(1, 50)]) == "requeue"
    assert verdict(("crashed", 0), ("crashed", 5), ("crashed", 5), ("crashed", 5)) == "requeue"
    assert verdict(("crashed", 5), ("crashed", 5), ("crashed", 5), ("crashed", 5)) == "failed"


def test_being_preempted_without_progress_is_bad_luck_and_no_crash() -> None:
    assert verdict(*[("preempted", 5)] * 20) == "requeue"
    assert verdict(("crashed", 5), ("preempted", 5), ("crashed", 5), ("crashed", 5)) == "requeue"
    assert verdict(("crashed", 5), ("crashed", 5), ("preempted", 5), ("crashed", 5), ("crashed", 5)) == "failed"


def test_a_time_limit_too_short_for_any_progress_is_a_loop_as_well() -> None:
    assert verdict(*[("time_limit", 5)] * 4) == "failed"
    assert verdict(*[("time_limit", 5)] * 4, chained=True) == "failed"


def test_without_any_patience_a_crash_ends_the_job_and_the_time_limit_does_not() -> None:
    assert verdict(("crashed", 5), crashes=0) == "failed"
    assert verdict(("time_limit", 5), crashes=0) == "requeue"


def write_run(run: Path, outcome: dict[str, object] | str | None, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").write_text("{}")
    run.mkdir(exist_ok=True)
    if outcome is not None:
        (run / "outcome.json").write_text(outcome if isinstance(outcome, str) else json.dumps(outcome))


def test_an_outcome_counts_only_if_this_very_life_has_written_it(tmp_path: Path) -> None:
    run, record = tmp_path / "run", tmp_path / "launch" / "attempts.jsonl"
    write_run(run, {"status": "preempted", "life": "7.0"}, 4, 12)
    assert judge(str(run), record, "7.0", 1, 3, False)[0] == "requeue"
    judge(str(run), record, "7.1", 1, 3, False)  # died before it could begin: the outcome is the one of 7.0
    assert [(a.status, a.step) for a in read_attempts(record)] == [("preempted", 12), ("crashed", 12)]
    judge(str(run), record, "7.2", 1, 3, False)
    assert judge(str(run), record, "7.3", 1, 3, False)[0] == "failed"


def test_a_run_that_was_done_before_is_done(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"status": "done", "life": "3.0"}, 4)
    assert judge(str(tmp_path / "run"), tmp_path / "a", "9.0", 0, 3, False)[0] == "done"
    # ... but not if this life, which may have been asked to train longer, has failed
    assert judge(str(tmp_path / "run"), tmp_path / "a", "9.0", 1, 3, False)[0] == "requeue"


@pytest.mark.parametrize("outcome", [None, "{", "[]", ""])
def test_without_an_outcome_that_can_be_read_it_was_a_crash(tmp_path: Path, outcome: str | None) -> None:
    write_run(tmp_path / "run", outcome)
    judge(str(tmp_path / "run"), tmp_path / "a", "1.0", 1, 3, False)
    assert read_attempts(tmp_path / "a")[0].status == "crashed"


def test_a_torn_line_of_the_record_is_skipped(tmp_path: Path) -> None:
    write_run(tmp_path / "run", None)
    (tmp_path / "a").write_text('{"life": "1.0", "status": "cra\n')
    judge(str(tmp_path / "run"), tmp_path / "a", "1.1", 1, 3, False)
    assert [a.life for a in read_attempts(tmp_path / "a")] == ["1.1"]


def test_only_committed_checkpoints_count_and_any_url_will_do(tmp_path: Path) -> None:
    write_run(tmp_path / "run", None, 8, 16)
    (tmp_path / "run" / "checkpoints" / "step-00000024").mkdir()
    assert newest_step(str(tmp_path / "run")) == 16
    assert newest_step(f"file://{tmp_path}/run") == 16
    assert newest_step(str(tmp_path / "nothing")) == 0
