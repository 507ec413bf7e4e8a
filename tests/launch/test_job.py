"""The validation of a job, times, the grid of a sweep, the site file."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import Refused, sweep
from launch.job import Job, parse_minutes, time_text, validate
from launch.site import Container, Site, read_site

from ..golden_jobs import GOLDEN


def job(**options: object) -> Job:
    return Job(**{"name": "a", "run": "runs/a", "arguments": (), "folder": "runs/a/launch", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_jobs_can_work(name: str) -> None:
    golden, site, _ = GOLDEN[name]
    validate(golden, site)


@pytest.mark.parametrize(
    ("options", "site", "message"),
    [
        ({"name": "my run"}, {}, "--name: 'my run'"),
        ({"nodes": 0}, {}, "--nodes: 0"),
        ({"gpus_per_node": 4, "ranks_per_node": 2}, {}, "2 ranks for 4 GPUs"),
        ({"gpus_per_node": 8, "ranks_per_node": 8}, {"gpus_per_node": 4}, "a node has 4"),
        ({"ranks_per_node": 4, "cpus_per_rank": 8}, {"cpus_per_node": 16}, "make 32: a node has 16"),
        ({"minutes": 5, "save_seconds": 200, "signal_seconds": 250}, {}, "shorter than two saves"),
        ({"minutes": 2}, {}, "is the whole time limit"),
        ({"save_seconds": 115}, {}, "leaves the ranks 110 s, and a save takes 115 s: set it to 125 or more"),
        ({"requeue": False}, {}, "could not continue after a preemption"),
        ({"starter": "srun", "nodes": 2}, {"after_node_failure": "shrink"}, "use torchrun"),
        ({"run": "memory://a"}, {}, "is lost when the process ends"),
        ({"tasks": sweep.tasks("a", "runs/a", ["seed=1,2"]), "chain": 2}, {}, "cannot be a chain"),
        ({"arguments": ("a\0b",)}, {}, "zero byte"),
        ({"folder": "runs/a\nb/launch"}, {}, "line break"),
    ],
)
def test_a_job_that_cannot_work_is_refused(options: dict[str, object], site: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message.replace("(", r"\(")) as problem:
        validate(job(**options), Site(**site))  # type: ignore[arg-type]
    assert len(str(problem.value).splitlines()) == 1


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(Refused) as problem:
        validate(job(nodes=0, gpus_per_node=4, minutes=1, signal_seconds=20), Site())
    assert len(str(problem.value).splitlines()) == 3


def test_a_job_without_requeue_may_be_a_chain_or_give_up_at_once() -> None:
    validate(job(requeue=False, chain=3), Site())
    validate(job(requeue=False, crashes=0), Site())


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("01:30:00", 90), ("1-00", 1440), ("1-02:30", 1590), ("2-00:00:01", 2881)],
)
def test_times_are_read_as_slurm_reads_them(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes
    assert parse_minutes(time_text(minutes)) == minutes


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-5", "1.5"])
def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="--time"):
        parse_minutes(text)


def test_a_sweep_has_a_task_for_every_combination_and_one_group() -> None:
    tasks = sweep.tasks("lr", "runs/lr", ["optimizer.lr=1e-4,3e-4", "--data.name=digits"])
    assert [task.run for task in tasks] == ["runs/lr/000-lr=1e-4-name=digits", "runs/lr/001-lr=3e-4-name=digits"]
    assert tasks[1].arguments == ("--optimizer.lr=3e-4", "--data.name=digits", "--wandb.group=lr")


def test_the_folders_of_a_sweep_are_plain_names_whatever_the_values_are() -> None:
    (task,) = sweep.tasks("s", "s3://b/s", ["data.root=/a b/$c"])
    assert task.run == "s3://b/s/000-root=_a_b__c"
    assert task.arguments[0] == "--data.root=/a b/$c"


@pytest.mark.parametrize("grid", [["lr"], ["=1"], ["lr="], ["lr=1,,2"], ["lr=1,1"], ["lr=1", "lr=2"],
                                  ["l r=1"], [f"seed={','.join(map(str, range(2000)))}"]])  # fmt: skip
def test_an_invalid_grid_is_refused(grid: list[str]) -> None:
    with pytest.raises(Refused, match="--sweep"):
        sweep.tasks("s", "runs/s", grid)


def test_the_site_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/big")
    path = tmp_path / "site.yaml"
    path.write_text(
        "partition: gpu\naccount:\nmodules: [cuda/13.0]\n"
        "environment: {A: 1, B: yes, C: 'x y'}\nscratch: $SCRATCH/me\n"
        "container: {kind: apptainer, image: t.sif, mounts: ['/a:/b']}\nsignal_seconds: 60\n"
        "after_node_failure: shrink\n"
    )
    assert read_site(str(path)) == Site(
        partition="gpu", modules=("cuda/13.0",), environment={"A": "1", "B": "true", "C": "x y"}, scratch="/big/me",
        container=Container("apptainer", "t.sif", ("/a:/b",)), signal_seconds=60, after_node_failure="shrink",
    )  # fmt: skip


def test_the_site_file_of_the_project_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCH_SITE", raising=False)
    assert read_site(str(Path(__file__).parents[2] / "slurm" / "site.yaml")) == Site()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "partitoin: unknown setting; did you mean 'partition'"),
        ("partition: gpu\npartition: cpu", "duplicate key 'partition' in line 2: keep one"),
        ("modules: cuda", "modules: 'cuda' should be a list of strings"),
        ("signal_seconds: long", "signal_seconds: 'long' should be a whole number"),
        ("after_node_failure: hope", "should be one of wait, shrink"),
        ("container: {kind: apptainer}", "container.image: missing"),
        ("container: {kind: docker, image: x}", "should be one of apptainer, enroot"),
        ("container: x.sif", "a mapping with kind and image"),
        ("environment: {a b: 1}", "cannot be the name of a variable"),
        ("partition: [", "not valid YAML in line 1"),
        ("- partition", "is a mapping of settings, not a list"),
        ("partition: 7", "put it into quotes"),
    ],
)
def test_a_mistake_in_the_site_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as problem:
        read_site(str(path))
    assert message in str(problem.value)
    assert str(problem.value).startswith(str(path))
    assert "\n" not in str(problem.value)
