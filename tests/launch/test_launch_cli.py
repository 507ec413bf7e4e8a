"""python -m launch as a user sees it: quick to start, clear about mistakes, and nothing is submitted after one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from launch.__main__ import main

ROOT = Path(launch.__file__).parent
SINFO = "low*|4|gpu:fake:2\nhigh|8|gpu:a100:4(S:0-1),tmp:1\ncpu|64|(null)"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, and programs on the PATH that answer like Slurm's and record how they were called."""
    programs = {
        "sinfo": f"echo '{SINFO}'",
        "sbatch": '[ "$1" = --version ] || { echo sbatch "$@" >> calls; echo 101; }',
        "squeue": "cat queue 2>/dev/null || true",
        "scancel": 'echo scancel "$@" >> calls',
        "scontrol": 'echo scontrol "$@" >> calls',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("LAUNCH_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("optimizer: {lr: 1.0e-3}\nbatch_size: 64\n")
    return tmp_path


def calls(cluster: Path) -> list[str]:
    path = cluster / "calls"
    return path.read_text().splitlines() if path.exists() else []


def refused(cluster: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that the command ends with; asserts code 2 and that nothing was submitted."""
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert calls(cluster) == []
    assert not (cluster / "runs").exists()
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_launch_imports_neither_torch_nor_what_is_slow() -> None:
    code = """
import contextlib, sys
from launch.__main__ import main
with contextlib.suppress(SystemExit):
    main(["--help"])
slow = {"torch", "pydantic", "numpy", "fsspec"}
print(sorted(module for module in sys.modules if module in slow or module.startswith("trainer.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    allowed = ["trainer.config", "trainer.config.status", "trainer.config.yaml_file"]
    assert done.stdout.splitlines()[-1] == str(allowed)


def test_launch_imports_nothing_of_the_trainer_but_its_config() -> None:
    allowed = ("trainer.config.options", "trainer.config.status", "trainer.config.yaml_file")
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module.partition(".")[0] != "torch", file
                assert module.partition(".")[0] != "trainer" or module in allowed, f"{file}: {module}"


def test_a_job_is_written_submitted_and_found_again(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--time", "10", "--partition", "high", "--", "c.yaml", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "job 101: log runs/c/launch/slurm-101.out" in out
    assert calls(cluster) == ["sbatch --parsable runs/c/launch/job.sbatch"]
    script = (cluster / "runs" / "c" / "launch" / "job.sbatch").read_text()
    assert "arguments=(c.yaml --seed 3)\nrun=runs/c\n" in script
    assert main(["status", "c"]) == 0
    assert "run runs/c  checkpoint at step 0  no outcome yet" in capsys.readouterr().out
    (cluster / "runs" / "c" / "launch" / "slurm-101.out").write_text("hello\n")
    assert main(["logs", "c"]) == 0
    assert capsys.readouterr().out == "==> runs/c/launch/slurm-101.out\nhello\n"
    (cluster / "queue").write_text("101|101|RUNNING|1:00|9:00|1|node1\n999|999|RUNNING|1:00|9:00|1|node1\n")
    assert main(["status", "runs/c"]) == 0
    assert "job 101  running" in capsys.readouterr().out
    assert main(["requeue", "c"]) == 0
    assert main(["cancel", "c"]) == 0
    assert calls(cluster)[1:] == ["scontrol requeue 101", "scancel 101"]
    (cluster / "queue").write_text("")
    assert main(["requeue", "c"]) == 0
    assert calls(cluster)[-1] == "sbatch --parsable runs/c/launch/job.sbatch"


def test_a_chain_is_a_number_of_jobs_each_after_the_previous_one(cluster: Path) -> None:
    assert main(["slurm", "--chain", "3", "--time", "10", "--", "c.yaml"]) == 0
    script = "runs/c/launch/job.sbatch"
    after = f"sbatch --parsable --dependency=afterany:101 {script}"
    assert calls(cluster) == [f"sbatch --parsable {script}", after, after]


def test_a_sweep_is_an_array(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--sweep", "optimizer.lr=1e-4,3e-4", "--name", "lr", "--time", "9", "--", "c.yaml"]) == 0
    assert "job 101, 2 tasks: log runs/lr/launch/slurm-101_*.out" in capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in (cluster / "runs" / "lr" / "launch" / "job.sbatch").read_text()
    assert main(["status", "lr"]) == 0
    assert "run runs/lr/001-lr=3e-4" in capsys.readouterr().out


def test_dry_runs_show_and_leave_nothing(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--dry-run", "--nodes", "2", "--", "c.yaml"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=c\n")
    assert main(["local", "--dry-run", "--ranks", "2", "--", "c.yaml", "--data.root", "a b"]) == 0
    assert capsys.readouterr().out.endswith("-m trainer c.yaml --data.root 'a b'\n")
    assert calls(cluster) == []
    assert not (cluster / "runs").exists()


def test_the_directory_of_a_run(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(*words: str) -> str:
        assert main(["slurm", "--dry-run", "--time", "9", *words]) == 0
        return capsys.readouterr().out

    assert "run=runs/digits_cnn\n" in script()
    assert "run=runs/other\n" in script("--name", "other", "--", "c.yaml")
    remote = script("--", "c.yaml", "--run.url", "s3://bucket/run7", "--seed=1")
    assert "arguments=(c.yaml --seed=1)\nrun=s3://bucket/run7\nrecord=runs/run7/launch/attempts.jsonl\n" in remote
    (cluster / "c.yaml").write_text("run: {url: /big/there}\n")
    assert "--job-name=there\n" in (text := script("--", "c.yaml"))
    assert "run=/big/there\nrecord=/big/there/launch/attempts.jsonl\n" in text
    (cluster / "site.yaml").write_text("scratch: /big\n")
    assert "run=/big/runs/digits_cnn\n" in script("--site", "site.yaml")


def test_without_sbatch_on_the_path(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(cluster))
    assert "sbatch: not on the PATH" in refused(cluster, capsys, "slurm", "--", "c.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["slurm", "--partition", "hihg", "--", "c.yaml"],
            "--partition: 'hihg' is not known here; did you mean 'high'?",
        ),
        (["slurm", "--partition", "xyz", "--", "c.yaml"], "known: cpu, high, low"),
        (["slurm", "--gpus-per-node", "3", "--", "c.yaml"], "a node of partition low has 2"),
        (["slurm", "--gpus-per-node", "5", "--partition", "high", "--", "c.yaml"], "a node of partition high has 4"),
        (["slurm", "--gpus-per-node", "1", "--partition", "cpu", "--", "c.yaml"], "a node of partition cpu has 0"),
        (["slurm", "--ranks-per-node", "5", "--", "c.yaml"], "make 5: a node of partition low has 4"),
        (["slurm", "--time", "1", "--save-seconds", "31", "--", "c.yaml"], "shorter than two saves"),
        (["slurm", "--time", "soon", "--", "c.yaml"], "--time: 'soon' is not a time"),
        (["slurm", "--", "missing.yaml"], "no config file 'missing.yaml'"),
        (["slurm", "--site", "missing.yaml", "--", "c.yaml"], "no config file 'missing.yaml'"),
        (["slurm", "--nods", "2"], "unrecognized arguments: --nods 2"),
        (["slurm", "--nodes", "two"], "invalid int value: 'two'"),
        (["sweep", "--sweep", "lr", "--", "c.yaml"], "is not a grid"),
        (["sweep", "--", "c.yaml"], "--sweep"),
        (["local", "--gpus", "2", "--ranks", "3"], "3 ranks for 2 GPUs"),
        (["local", "--ranks", "-1"], "--ranks: -1"),
        (["fly"], "invalid choice: 'fly'"),
        (["status", "nothing"], "nothing: no run of that name was submitted from here; known: none"),
        (["status", "c", "--", "c.yaml"], "takes nothing after --"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    cluster: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(cluster, capsys, *words)


def test_what_sbatch_says_is_passed_on(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "bin" / "sbatch").write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit\necho 'sbatch: error: Invalid account' >&2; exit 1\n"
    )
    assert main(["slurm", "--", "c.yaml"]) == 2
    assert capsys.readouterr().err == "error: sbatch: Invalid account\n"


def test_a_name_in_use_by_another_config_is_refused(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit = ["slurm", "--time", "10", "--"]
    run = cluster / "runs" / "c"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("optimizer: {lr: 0.001, betas: [0.9, 0.99]}\nbatch_size: 64\nduration: 5 epochs\n")

    def message(*words: str) -> str:
        assert main([*submit, *words]) == 2
        return capsys.readouterr().err

    assert "optimizer.lr is 0.001 there, now it is '3e-4': choose another --name" in message(
        "c.yaml", "--optimizer.lr", "3e-4"
    )
    (cluster / "other.yaml").write_text("batch_size: 32\n")
    assert "batch_size is 64 there, now it is 32" in message("other.yaml", "--run.url", "runs/c")
    assert calls(cluster) == []
    assert main([*submit, "c.yaml", "--duration", "9 epochs", "--optimizer.lr=1e-3"]) == 0
    assert len(calls(cluster)) == 1


def test_a_name_that_was_submitted_with_another_config_is_refused(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", "--time", "10", "--", "c.yaml"]) == 0
    assert main(["slurm", "--time", "10", "--", "c.yaml", "--seed", "2"]) == 2
    assert "--name: 'c' is in use: it was submitted with 'c.yaml'" in capsys.readouterr().err
    assert main(["slurm", "--time", "20", "--", "c.yaml"]) == 0


def test_a_run_that_is_in_the_queue_is_not_submitted_twice(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--time", "10", "--", "c.yaml"]) == 0
    (cluster / "queue").write_text("101|101|PENDING|0:00|9:00|1|(Resources)\n")
    assert main(["slurm", "--time", "10", "--", "c.yaml"]) == 2
    assert "'c' is in the queue as job 101" in capsys.readouterr().err
    assert len(calls(cluster)) == 1


@pytest.mark.parametrize("flag", ["--attempt", "--life"])  # --life: in scripts of jobs that are still in a queue
def test_the_batch_script_gets_a_decision_on_standard_output_and_the_log_the_reason(
    cluster: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (cluster / "run").mkdir()
    (cluster / "run" / "outcome.json").write_text('{"status": "preempted", "life": "101.0"}')
    words = ["after", "--run", "run", "--record", "attempts.jsonl", flag, "101.0", "--code", "143", "--crashes", "3"]
    assert main(words) == 0
    assert capsys.readouterr() == ("requeue\n", "launch: preempted at step 0: requeued\n")
    assert '"life": "101.0", "status": "preempted"' in (cluster / "attempts.jsonl").read_text()


def test_the_trainer_may_check_the_config_first(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(cluster, capsys, "slurm", "--check", "--time", "10", "--", "c.yaml", "--optimizer.lrr", "1")
    assert "--optimizer.lrr: unknown setting; did you mean --optimizer.lr?" in message
