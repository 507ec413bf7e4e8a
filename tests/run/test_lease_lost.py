"""A job that another one took for dead stops, and touches nothing of what is the other's by then."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..ranks import free_port

SCRIPT = """
import sys
from trainer.storage import lease
lease.HEARTBEAT_SECONDS = 0.2
from trainer.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
WORDS = ["--duration", "100000 steps", "--checkpoint.every", "50 steps", "--log.every", "5 steps", "--evaluate.every",
         "100000 steps", "--wandb.mode", "disabled", "--run.url", "run"]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "lives"  # each attempt has a file of its own there
    }


@pytest.mark.parametrize("world", [2])  # of one, tests/test_engine.py has the rest
def test_a_run_whose_lease_was_taken_over_stops_and_writes_nothing_more(world: int, tmp_path: Path) -> None:
    port = str(free_port())
    root = str(Path(__file__).parents[2])
    ranks = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        if world > 1:
            environment |= {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *WORDS], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    run, lease = tmp_path / "run", tmp_path / "run" / "lease.json"
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/*/MANIFEST.json")):
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
        time.sleep(0.05)
    for _ in range(200):  # until no heartbeat of the run comes between
        other = {**json.loads(lease.read_text()), "id": "another job's"}
        lease.write_text(json.dumps(other))
        time.sleep(0.3)
        if json.loads(lease.read_text())["id"] == "another job's":
            break
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert "warning: lease_lost at step" in outputs[0]
    assert json.loads(outputs[0].splitlines()[-1])["status"] == "lease_lost"
    assert json.loads(lease.read_text())["id"] == "another job's"
    assert not (run / "outcome.json").exists()
    assert not list(run.glob("samples/*"))
    before = contents(run)
    time.sleep(0.5)
    assert contents(run) == before
