"""The three ways to run: directly, under torchrun, under srun. One code path, one result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.distributed.process import LaunchError, ProcessInfo, first_host, threads_per_rank

from ..ranks import free_port, run
from ..results import final_tensors, largest_difference, outcome, records

TORCHRUN = [str(Path(sys.executable).with_name("torchrun"))]
SHORT = ["--duration", "24 steps", "--log.every", "8 steps", "--checkpoint.every", "4 steps", "--run.url", "run"]


def environment(**more: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TRAINER_")) and k != "OMP_NUM_THREADS"}
    return {**plain, "TRAINER_WANDB__MODE": "disabled", **more}


def test_the_default_run_learns_to_read_digits(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "trainer"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["accuracy"] >= 0.98
    assert result["status"] == "done"
    assert {"loss", "samples_per_second", "run"} <= result.keys()
    run_folder = tmp_path / "runs" / "digits_cnn"
    assert {p.name for p in (run_folder / "samples").iterdir()} >= {
        "learning_curves.png",
        "confusion.png",
        "mistakes.png",
    }
    for line in ("checkpoint", "metrics", "pictures"):
        assert f"  {line}" in process.stdout
    assert max(map(len, process.stdout.splitlines()[:-1])) <= 80 + len(str(tmp_path))


def test_torchrun_without_arguments_trains_the_default_run(tmp_path: Path) -> None:
    process = subprocess.run(
        [*TORCHRUN, "--nproc_per_node=2", "-m", "trainer"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=environment(TRAINER_DURATION="24 steps", TRAINER_LOG__EVERY="8 steps"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "2 ranks x 1 thread" in process.stdout
    assert json.loads(process.stdout.splitlines()[-1])["step"] == 24


def test_torchrun_restarts_a_run_whose_worker_was_killed(tmp_path: Path) -> None:
    """In place, from the last checkpoint, with the result of an uninterrupted run."""
    (tmp_path / "alone").mkdir()
    arguments = [*SHORT, "--duration", "400 steps", "--checkpoint.every", "20 steps"]
    run(arguments, tmp_path / "alone", 2)
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=2", "-m", "trainer", *arguments],
        cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    first = tmp_path / "run" / "checkpoints" / "step-00000020" / "MANIFEST.json"
    while not first.exists():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.005)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "trainer" in p.cmdline()]
    workers[-1].send_signal(signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "resuming" in text
    assert outcome(tmp_path / "run")["status"] == "done"
    assert largest_difference(final_tensors(tmp_path / "alone" / "run"), final_tensors(tmp_path / "run")) == 0
    assert records(tmp_path / "run") == records(tmp_path / "alone" / "run")


def test_srun_directly_gives_rank_and_world_from_slurm(tmp_path: Path) -> None:
    """The variables of a job step of two tasks on one node, as Slurm 22.05 sets them."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", *SHORT], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
            env=environment(
                SLURM_JOB_ID="77", SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS="2",
                SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1", SLURM_STEP_NODELIST="node1", MASTER_PORT=port,
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "2 ranks x 1 thread" in texts[0]
    assert json.loads(texts[0].splitlines()[-1])["status"] == "done"
    assert texts[1] == ""


def test_the_rank_of_a_process_is_read_from_its_launcher() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1",
                "MASTER_PORT": "1234", "TORCHELASTIC_RESTART_COUNT": "2",
                "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    assert ProcessInfo.from_environment(torchrun) == ProcessInfo(5, 8, 1, 4, "node1", 1234, "2", True)
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
             "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "20001"}  # fmt: skip
    assert ProcessInfo.from_environment(slurm) == ProcessInfo(3, 8, 3, 4, "gpu07", 20001, "20001.0.1")
    assert ProcessInfo.from_environment({}) == ProcessInfo()
    in_a_batch_script = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}
    assert ProcessInfo.from_environment(in_a_batch_script) == ProcessInfo()


def test_an_incomplete_environment_of_a_launcher_is_named() -> None:
    with pytest.raises(LaunchError, match="incomplete"):
        ProcessInfo.from_environment({"RANK": "one", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node1,node2", "node1"), ("gpu[03-05,9],login1", "gpu03"), ("a-b[7]", "a-b7"),
     ("rack[1-2]-n[3-4]", "rack1-n")],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes).startswith(first)


def test_threads_are_cores_over_ranks_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.distributed.process.cores", lambda: 8)
    assert threads_per_rank(ProcessInfo(), None, {}) == 8
    assert threads_per_rank(ProcessInfo(world=4, local_world=4), None, {}) == 2
    assert threads_per_rank(ProcessInfo(world=4, local_world=4), None, {"OMP_NUM_THREADS": "3"}) == 3
    # torchrun sets 1 where nothing is set
    assert threads_per_rank(ProcessInfo(world=4, local_world=4, agent=True), None, {"OMP_NUM_THREADS": "1"}) == 2
    assert threads_per_rank(ProcessInfo(world=4, local_world=4, agent=True), 1, {"OMP_NUM_THREADS": "1"}) == 1
