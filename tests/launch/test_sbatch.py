"""The batch scripts: equal to the golden files, and interpreted by bash as intended."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import sbatch
from launch.job import Job, Task
from launch.site import Container, Site

from ..golden_jobs import FOLDER, GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_a_script_is_equal_to_its_golden_file(name: str) -> None:
    assert sbatch.script(*GOLDEN[name]) == (FOLDER / f"{name}.sbatch").read_text(), (
        "the script has changed: review the difference, then run `python -m tests.golden_jobs`"
    )


def test_every_golden_file_belongs_to_a_job() -> None:
    assert {path.stem for path in FOLDER.glob("*.sbatch")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_script_asks_for_a_warning_and_appends_to_its_log(name: str) -> None:
    text = (FOLDER / f"{name}.sbatch").read_text()
    for needed in ("#SBATCH --signal=B:USR1@", "#SBATCH --open-mode=append", "trap", "-m launch after"):
        assert needed in text
    assert "#SBATCH --requeue" in text or "#SBATCH --no-requeue" in text
    assert "--kill-on-bad-exit=1" in text or "--no-kill" in text
    assert "CONT" not in text  # a trap of SIGCONT makes bash lose the signal that follows it
    if "torch.distributed.run" in text:
        assert "SIGUSR1" in text
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in text


STUB = """#!/bin/bash
case $(basename "$0") in
srun) if [ "$1" = --overlap ]; then echo "${DECISION:-done}"; exit; fi
    printf '%s\\0' "$PWD" "$@" > "$SEEN/srun"
    [ -n "${SRUN_SLEEPS:-}" ] && sleep "$SRUN_SLEEPS"; exit "${SRUN_CODE:-0}" ;;
squeue) echo "${END:-4000000000} 1000000000" ;;
scontrol) if [ "$1" = show ]; then echo node1; else printf '%s\\0' "$@" > "$SEEN/scontrol"; kill "$PPID"; fi ;;
scancel) printf '%s\\0' "$@" > "$SEEN/scancel" ;;
the-python) printf '%s\\0' "$@" > "$SEEN/after"; echo "${DECISION:-done}" ;;
apptainer | module) printf '%s\\0' "$@" > "$SEEN/$(basename "$0")"; shift 3; "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that record how they were called, in place of Slurm's."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("srun", "squeue", "scontrol", "scancel", "the-python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return folder


def start(script: str, stubs: Path, **environment: str) -> subprocess.Popen[str]:
    for seen in ("srun", "scontrol", "scancel", "after"):
        (stubs / f"seen-{seen}").unlink(missing_ok=True)
    seen = stubs / "seen"
    seen.mkdir(exist_ok=True)
    for old in seen.iterdir():
        old.unlink()
    (stubs / "script").write_text(script, encoding="utf-8", newline="")
    variables = {"PATH": f"{stubs}:{os.environ['PATH']}", "SEEN": str(seen), "SLURM_JOB_ID": "12345",
                 "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "HOME": "/nonexistent",
                 "LC_ALL": "C.UTF-8"}  # fmt: skip
    return subprocess.Popen(
        ["bash", str(stubs / "script")], cwd=stubs, env={**variables, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def seen(stubs: Path, program: str) -> list[str]:
    """The arguments that a program was last called with; empty where it was not."""
    path = stubs / "seen" / program
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1] if path.exists() else []


def job(**options: object) -> Job:
    return Job(**{"name": "a", "run": "runs/a", "arguments": (), "folder": "runs/a/launch", **options})  # type: ignore[arg-type]


def words(script: str, stubs: Path, **environment: str) -> list[str]:
    """What follows `-m trainer` in the step that a script starts."""
    code, errors = finish(start(script, stubs, **environment))
    assert (code, errors) == (0, "")
    step = seen(stubs, "srun")
    return step[step.index("trainer") + 1 :]


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NASTY = st.one_of(
    TEXT,
    st.text("'\"\\$`!*?[]{}();&|<>~# \t\n%=-", max_size=20),
    st.text("a \\\n'", min_size=100, max_size=150),  # longer than a line of the script
    st.sampled_from(
        ["$(touch hacked)", "`touch hacked`", "'; touch hacked; '", '"$HOME"', "a\nb", "", "-n", "\\'", "!!"]
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(NASTY, max_size=6), run=NASTY, value=NASTY, nodes=st.sampled_from([1, 2]))
def test_nothing_that_a_user_writes_is_interpreted_by_the_shell(
    stubs: Path, arguments: list[str], run: str, value: str, nodes: int
) -> None:
    site = Site(environment={"VALUE": value})
    script = sbatch.script(job(arguments=tuple(arguments), run=run, nodes=nodes), site, "the-python")
    assert words(script, stubs) == [*arguments, "--run.url", run]
    after = seen(stubs, "after")
    assert after[after.index("--run") + 1] == run
    assert not (stubs / "hacked").exists()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(NASTY, max_size=3), run=NASTY, folder=st.text("ab '\"$`\\#%;", min_size=1, max_size=10))
def test_nothing_that_a_task_of_an_array_adds_is_interpreted_by_the_shell(
    stubs: Path, arguments: list[str], run: str, folder: str
) -> None:
    tasks = (Task("other", ("no",)), Task(run, tuple(arguments)))
    script = sbatch.script(job(tasks=tasks, arguments=("c.yaml",), folder=folder), Site(), "the-python")
    assert words(script, stubs, SLURM_ARRAY_TASK_ID="1") == ["c.yaml", *arguments, "--run.url", run]
    after = seen(stubs, "after")
    assert after[after.index("--record") + 1] == f"{folder}/attempts-1.jsonl"


def test_srun_directly_and_a_container_quote_as_well(stubs: Path) -> None:
    arguments = ("a 'b' \"c\"", "$HOME")
    direct = sbatch.script(job(arguments=arguments, starter="srun", nodes=2, ranks_per_node=2), Site(), "the-python")
    assert words(direct, stubs) == [*arguments, "--run.url", "runs/a"]
    site = Site(container=Container("enroot", "an image.sqsh", ("/a b:/c",)))
    assert words(sbatch.script(job(arguments=arguments), site, "the-python"), stubs) == [
        *arguments,
        "--run.url",
        "runs/a",
    ]
    assert "--container-image=an image.sqsh" in (step := seen(stubs, "srun"))
    assert "--container-mounts=/a b:/c" in step


@pytest.mark.parametrize(
    ("decision", "srun_code", "code", "requeued"),
    [("done", "1", 0, False), ("next", "143", 0, False), ("failed", "3", 3, False), ("failed", "0", 1, False),
     ("", "7", 7, False), ("requeue", "1", -15, True)],
)  # fmt: skip
def test_the_decision_and_not_the_exit_code_of_the_step_counts(
    stubs: Path, decision: str, srun_code: str, code: int, requeued: bool
) -> None:
    process = start(sbatch.script(job(), Site(), "the-python"), stubs, DECISION=decision or " ", SRUN_CODE=srun_code)
    assert finish(process)[0] == code
    assert seen(stubs, "scontrol") == (["requeue", "12345"] if requeued else [])
    after = seen(stubs, "after")
    assert after[after.index("--attempt") + 1] == "12345.0"
    assert after[after.index("--code") + 1] == srun_code


def until_started(stubs: Path) -> None:
    while not (stubs / "seen" / "srun").exists():
        pass


def test_the_warning_is_passed_to_the_steps_while_they_run(stubs: Path) -> None:
    process = start(
        sbatch.script(job(), Site(), "the-python"), stubs, SRUN_SLEEPS="1", SRUN_CODE="9", DECISION="failed"
    )
    until_started(stubs)
    process.send_signal(10)
    assert finish(process)[0] == 9, "the code of the step is not lost by the trap"
    assert seen(stubs, "scancel") == ["--signal=USR1", "12345"]


@pytest.mark.parametrize(("end", "requeued"), [("4000000000", False), ("N/A", False), ("1000000000", True)])
def test_a_cancelled_job_is_not_requeued_and_one_at_its_time_limit_is(stubs: Path, end: str, requeued: bool) -> None:
    process = start(sbatch.script(job(), Site(), "the-python"), stubs, SRUN_SLEEPS="1", END=end, DECISION="requeue")
    until_started(stubs)
    process.send_signal(15)
    assert finish(process)[0] == (-15 if requeued else 143)
    assert bool(seen(stubs, "scontrol")) == requeued


def test_a_job_that_may_not_be_requeued_says_so(stubs: Path) -> None:
    process = start(sbatch.script(job(requeue=False, crashes=0), Site(), "the-python"), stubs, DECISION="requeue")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not requeued" in output
    assert seen(stubs, "scontrol") == []
