"""On a real Slurm, with the real trainer on real data: whatever happens to a job, the run ends with the right weights.

The right weights are those of an uninterrupted run of one process, in float64 to 1e-9.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ..ranks import run as run_here
from ..results import final_tensors, largest_difference, outcome, records
from ..slurm_cluster import Cluster, Unavailable, wait_until
from ..wandb_tools import read_runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STEPS = 400
SETTINGS = ["--precision", "fp64", "--batch_size", "48", "--duration", f"{STEPS} steps", "--checkpoint.every",
            "10 steps", "--log.every", "20 steps", "--evaluate.every", "100 steps"]  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    try:
        with Cluster(nodes=3) as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Three idle nodes; jobs that the test leaves are cancelled."""
    yield shared_cluster
    subprocess.run(
        ["scancel", "--full", "--user", str(os.getuid())], env={**os.environ, **shared_cluster.environment}, check=True
    )
    wait_until(lambda: shared_cluster.ask("squeue", "-h") == "", "an empty queue")
    shared_cluster.restore_all()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("reference")
    run_here([*SETTINGS, "--run.url", "run"], folder)
    return folder / "run"


class Submitted:
    """A run that `python -m launch` has submitted to Slurm."""

    def __init__(
        self, cluster: Cluster, folder: Path, *words: str, settings: tuple[str, ...] = (), **site: object
    ) -> None:
        self.cluster, self.folder = cluster, folder
        values = {"python": sys.executable, "signal_seconds": 40, "save_seconds": 10, **site}
        (folder / "site.yaml").write_text(json.dumps(values))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TRAINER_", "WANDB"))}
        self._environment = {
            **kept, **cluster.environment, "OMP_NUM_THREADS": "1", "TRAINER_WANDB__MODE": "disabled",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        if "--wandb.mode=offline" in settings:
            del self._environment["TRAINER_WANDB__MODE"]
        text = self.launch(*words, "--site", "site.yaml", "--", *SETTINGS, *settings)
        self.jobs = re.findall(r"^job (\d+)", text, re.M)
        self.run = folder / "runs" / "digits_cnn"

    def launch(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words], cwd=self.folder, env=self._environment, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def show(self, key: str, job: str | None = None) -> str:
        text = self.cluster.ask("scontrol", "show", "job", "-o", job or self.jobs[0])
        match = re.search(rf"\b{key}=(\S*)", text)
        assert match, text
        return match[1]

    def log(self) -> str:
        files = sorted(self.folder.rglob("slurm-*.out"))
        return "\n".join(f"==> {file.name}\n{file.read_text(errors='replace')[-6000:]}" for file in files)

    def until_state(self, *states: str, job: str | None = None, seconds: float = 120) -> str:
        def reached() -> bool:
            state = self.show("JobState", job)
            assert state in states or state not in ENDED, f"{state}:\n{self.log()}"
            return state in states

        try:
            wait_until(reached, f"job {job or self.jobs[0]} to be {' or '.join(states)}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        return self.show("JobState", job)

    def until_step(self, step: int, run: Path | None = None) -> None:
        """Until a checkpoint of that step or a later one is committed."""

        def reached() -> bool:
            assert self.show("JobState") not in ENDED, self.log()
            manifests = ((run or self.run) / "checkpoints").glob("step-*/MANIFEST.json")
            return any(int(path.parent.name[5:]) >= step for path in manifests)

        wait_until(reached, f"step {step}", 90)

    def attempts(self) -> list[tuple[str, int]]:
        lines = (self.run / "launch" / "attempts.jsonl").read_text().splitlines()
        return [(entry["status"], entry["step"]) for entry in map(json.loads, lines)]

    def check(self, reference: Path, run: Path | None = None, steps: int = STEPS) -> None:
        """The run is done, with the weights and the metrics of the uninterrupted one."""
        run = run or self.run
        end = outcome(run)
        assert (end["status"], end["step"]) == ("done", steps), self.log()
        assert largest_difference(final_tensors(reference), final_tensors(run)) < 1e-9
        expected = records(reference)
        assert [(r["step"], r["kind"]) for r in records(run)] == [(r["step"], r["kind"]) for r in expected]
        assert [r["loss"] for r in records(run)] == pytest.approx([r["loss"] for r in expected], rel=1e-9)


def test_two_nodes_of_two_ranks_give_the_weights_of_one_process(
    cluster: Cluster, tmp_path: Path, reference: Path
) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--nodes", "2", "--ranks-per-node", "2", "--time", "5")
    job.until_state("COMPLETED")
    job.check(reference)
    assert "4 ranks" in job.log()
    assert job.attempts() == [("done", STEPS)]
    assert "done: the duration is reached" in job.launch("status", "digits_cnn")


def test_a_cancelled_run_is_not_requeued_and_resumes_when_it_is_requeued_by_hand(
    cluster: Cluster, tmp_path: Path, reference: Path
) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--nodes", "2", "--time", "5")
    job.until_step(20)
    job.launch("cancel", "digits_cnn")
    job.until_state("CANCELLED")
    wait_until(lambda: cluster.ask("squeue", "-h") == "", "an empty queue")
    assert job.show("Restarts") == "0"
    stopped = outcome(job.run)
    assert stopped["status"] == "preempted"
    assert 20 <= stopped["step"] < STEPS
    requeued = job.launch("requeue", "digits_cnn").split()[-1]
    job.until_state("COMPLETED", job=requeued)
    job.check(reference)


@pytest.mark.timeout(600)  # a slow machine needs ten of its half minutes
def test_a_job_is_warned_before_its_time_limit_and_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    """The real limit of a minute: Slurm's warning comes between 30 and 60 seconds before it."""
    longer = ["--duration", "3000 steps", "--checkpoint.every", "100 steps"]
    job = Submitted(cluster, tmp_path, "slurm", "--starter", "srun", "--ranks-per-node", "2", "--time", "1",
                    settings=tuple(longer), signal_seconds=30)  # fmt: skip
    (tmp_path / "reference").mkdir()
    run_here([*SETTINGS, *longer, "--run.url", "run"], tmp_path / "reference")
    job.until_state("COMPLETED", seconds=500)
    job.check(tmp_path / "reference" / "run", steps=3000)
    assert job.attempts()[0][0] == "time_limit", job.log()
    assert int(job.show("Restarts")) >= 1


def test_a_job_of_a_higher_partition_preempts_and_the_run_resumes_after_it(
    cluster: Cluster, tmp_path: Path, reference: Path
) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--nodes", "3", "--cpus-per-rank", "4", "--time", "5",
                    settings=("--wandb.mode=offline",))  # fmt: skip
    job.until_step(20)
    other = cluster.ask(
        "sbatch", "--parsable", "-p", "high", "-N3", "-c4", "-o", f"{tmp_path}/other", "--wrap", "sleep 1"
    )
    job.until_state("COMPLETED", seconds=180)
    job.check(reference)
    assert job.show("JobState", other) == "COMPLETED"
    assert job.attempts()[0][0] == "preempted"
    assert 20 <= job.attempts()[0][1] < STEPS
    assert job.show("Restarts") == "1"
    segments = read_runs(job.run)
    assert len({segment.id for segment in segments}) == 1, "one run, in any number of segments"
    rows = [row for segment in segments for row in segment.rows]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == [r["step"] for r in records(reference) if r["kind"] == "train"], "no step twice, none missing"
    goodput = outcome(job.run)["goodput"]
    assert goodput["lives"] == 2
    assert goodput["queue"] > 0
    parts = ("training", "evaluation", "checkpoint_stall", "replay", "restart", "queue")
    assert sum(goodput[part] for part in parts) == pytest.approx(goodput["total"], abs=0.5)
    assert re.search(r"^goodput \d+\.\d% of [\d:.]+ in 2 attempts$", job.log(), re.M)
    assert any(key.startswith("goodput") for key in segments[-1].summary)


def test_a_requeued_job_resumes(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--starter", "srun", "--nodes", "2", "--time", "5")
    job.until_step(20)
    job.launch("requeue", "digits_cnn")
    job.until_state("COMPLETED")
    job.check(reference)
    assert job.show("Restarts") == "1"
    assert "resuming" in job.log()


def test_a_failed_node_is_replaced_and_the_run_resumes(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--nodes", "2", "--time", "5")
    job.until_step(20)
    failed = next(node for node in cluster.nodes if node in _nodes(cluster, job) and node != job.show("BatchHost"))
    cluster.fail(failed)
    job.until_state("COMPLETED", seconds=180)
    job.check(reference)
    assert int(job.show("Restarts")) >= 1
    assert failed not in _nodes(cluster, job)


def test_a_run_continues_without_a_failed_node_where_the_site_says_shrink(
    cluster: Cluster, tmp_path: Path, reference: Path
) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--nodes", "3", "--time", "5", after_node_failure="shrink")
    job.until_step(20)
    failed = next(node for node in reversed(cluster.nodes) if node != job.show("BatchHost"))
    cluster.fail(failed)
    job.until_state("COMPLETED", seconds=180)
    job.check(reference)
    assert job.show("Restarts") == "0", "the job kept its other nodes"
    worlds = [json.loads(path.read_text())["world_size"] for path in sorted((job.run / "lives").iterdir())]
    assert worlds[0] == 3
    assert worlds[-1] == 2


def test_a_sweep_trains_every_combination_in_a_run_of_its_own(
    cluster: Cluster, tmp_path: Path, reference: Path
) -> None:
    lr = "5e-3"  # that of the default run
    job = Submitted(cluster, tmp_path, "sweep", "--starter", "srun", "--sweep", f"optimizer.lr={lr},1e-3", "--name",
                    "digits_cnn", "--time", "5", settings=("--wandb.mode=offline",))  # fmt: skip
    for index in range(2):
        job.until_state("COMPLETED", job=f"{job.jobs[0]}_{index}")
    first, second = (job.run / f"{index:03d}-lr={value}" for index, value in enumerate((lr, "1e-3")))
    job.check(reference, first)
    assert outcome(second)["status"] == "done"
    assert largest_difference(final_tensors(first), final_tensors(second)) > 0.01
    assert [[stored.group for stored in read_runs(run)] for run in (first, second)] == [["digits_cnn"]] * 2


def test_each_job_of_a_chain_resumes_the_run(cluster: Cluster, tmp_path: Path, reference: Path) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--starter", "srun", "--nodes", "1", "--ranks-per-node", "2", "--chain",
                    "3", "--no-requeue", "--time", "5")  # fmt: skip
    first, second, third = job.jobs
    job.until_step(20)
    cluster.ask("scancel", "--batch", "--signal=USR1", first)  # what Slurm itself sends before the time limit
    job.until_state("COMPLETED", job=first)
    job.until_state("COMPLETED", job=second)
    job.check(reference)
    assert [status for status, _ in job.attempts()][:2] == ["time_limit", "done"]
    job.until_state("COMPLETED", job=third)
    assert "is done" in job.log()


def test_a_crash_loop_ends(cluster: Cluster, tmp_path: Path) -> None:
    job = Submitted(cluster, tmp_path, "slurm", "--time", "5", "--restarts", "0", "--crashes", "2",
                    settings=("--data.name=mnist", "--data.download=false"))  # fmt: skip
    job.until_state("FAILED")
    assert job.attempts() == [("crashed", 0), ("crashed", 0)]
    assert "2 attempts in a row without a new checkpoint: not requeued" in job.log()


def test_options_with_quotes_reach_slurm_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "here" #1 100%'
    folder.mkdir()
    job = Submitted(cluster, folder, "slurm", "--time", "5", "--starter", "srun", "--crashes", "1",
                    settings=("--run.url", f"{folder}/the run", "--data.name=nothing"))  # fmt: skip
    job.until_state("FAILED")
    assert "'nothing'" in (folder / "the run" / "launch" / f"slurm-{job.jobs[0]}.out").read_text()


def test_an_error_of_slurm_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"^error: --partition: 'none' is not known here; known: high, low"):
        Submitted(cluster, tmp_path, "slurm", "--partition", "none")
    with pytest.raises(AssertionError, match=r"^error: --gpus-per-node: 3: a node of partition low has 2"):
        Submitted(cluster, tmp_path, "slurm", "--gpus-per-node", "3")
    with pytest.raises(AssertionError, match=r"^error: sbatch: Batch job.* Invalid feature"):
        Submitted(cluster, tmp_path, "slurm", "--constraint", "no-such-feature")
    assert cluster.ask("squeue", "-h") == ""


def _nodes(cluster: Cluster, job: Submitted) -> list[str]:
    return cluster.ask("scontrol", "show", "hostnames", job.show("NodeList")).split()


def test_the_cluster_leaves_nothing_behind() -> None:
    def sleeps() -> set[str]:
        return {words[1] for process in cluster.processes() if (words := _command(process))[:1] == ["sleep"]}

    try:
        with Cluster(nodes=1) as cluster:
            cluster.ask("sbatch", "-o", "/dev/null", "--wrap", "sleep 1000 & setsid sleep 1001 & wait")
            wait_until(lambda: sleeps() == {"1000", "1001"}, "the processes of the job")
            processes = cluster.processes()
            folder = Path(cluster.environment["SLURM_CONF"]).parents[1]
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not folder.exists()
    assert not [process for process in processes if _is_alive(process)]


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
