"""`python -m trainer doctor` on a valid config and on ones that would fail."""

from __future__ import annotations

from pathlib import Path

from ..ranks import run


def test_a_valid_config_passes_every_check(tmp_path: Path) -> None:
    text = run(["doctor", "--ranks", "2", "--schedule.warmup", "1 epoch"], tmp_path)
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["ok", name] for name in ("versions", "data", "storage", "network", "memory", "2")
    ]
    assert "killed half-way and resumed: weights and optimizer equal bit for bit" in text
    assert not list((tmp_path / "runs" / "digits_cnn").iterdir()), "the doctor leaves nothing behind"


def test_what_would_fail_is_named_and_the_other_checks_continue(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = run(["doctor", "--data.name", "folder", "--run.url", "file/run"], tmp_path, code=1)
    verdicts = {line.split()[1]: line for line in text.splitlines()}
    assert verdicts["versions"].startswith("ok")
    assert verdicts["data"].startswith("FAIL")
    assert "no folder 'train'" in verdicts["data"]
    assert verdicts["storage"].startswith("FAIL")
    assert "network" not in verdicts


def test_more_ranks_than_the_batch_can_feed(tmp_path: Path) -> None:
    text = run(["doctor", "--ranks", "4", "--batch_size", "3"], tmp_path, code=1)
    assert "FAIL  network   batch_size: 3" in text
