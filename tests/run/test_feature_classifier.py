"""The classifier that metrics.features names by its config: trained where it is missing, once, and never orphaned."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import psutil
import pytest
import yaml

from trainer.commands.common import read_config
from trainer.commands.doctor import _Doctor
from trainer.config.options import RunConfig, UserError
from trainer.distributed.process import first_error, without_launcher
from trainer.distributed.runtime import Runtime
from trainer.run.feature_classifier import Training, feature_classifier
from trainer.run.reference import Reference

from ..commands.test_bad_input import contents, refused
from ..ranks import Ranks, run, start, wait_for
from ..results import outcome, records
from ..workers import on_ranks

TINY = {"workload": {"network": "fnn", "hidden": 16}, "batch_size": 100, "duration": "2 epochs",
        "optimizer": {"lr": 0.01}}  # fmt: skip
GAN = ["--workload.name", "gan", "--workload.width", "8", "--workload.layers", "2", "--workload.latent", "8",
       "--duration", "2 steps", "--metrics.features", "tiny.yaml", "--run.url", "gan"]  # fmt: skip


def config(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def parsed(*words: str) -> RunConfig:
    return read_config([*GAN, *words], "trainer", "")[0]


# Training


def test_a_missing_classifier_is_trained_once_for_all_ranks_and_all_later_runs(tmp_path: Path) -> None:
    config(tmp_path / "tiny.yaml")
    said = run(GAN, tmp_path, 2)
    log = tmp_path / "runs" / "tiny" / "train.log"
    assert "training tiny.yaml" in said
    assert "runs/tiny/train.log" in said
    accuracy = outcome(tmp_path / "runs" / "tiny")["accuracy"]
    assert accuracy > 0.5
    assert f"accuracy {accuracy:.1%}" in said
    assert log.read_text().count("batch 100, 2 epochs, seed 0") == 1
    assert [name for name in records(tmp_path / "gan")[-1] if name.startswith("fid@tiny-")]

    before = contents(tmp_path / "runs" / "tiny")
    assert "training tiny.yaml" not in run([*GAN, "--run.url", "again"], tmp_path)
    assert contents(tmp_path / "runs" / "tiny") == before

    # Evaluated elsewhere, where the path leads nowhere.
    other = tmp_path / "other"
    other.mkdir()
    said = refused(["evaluate", str(tmp_path / "gan")], other, 1)
    assert said == (
        f"metrics.features: no config file 'tiny.yaml': check the path; it counts from {other}; "
        f"or name others with --features"
    )
    said = run(["evaluate", str(tmp_path / "gan"), "--features", str(tmp_path / "runs" / "tiny")], other)
    assert "fid@tiny-" in said
    assert refused(["evaluate", str(tmp_path / "runs" / "tiny"), "--features", "pixels"], other, 1) == (
        "--features: classifier generates nothing to compare: remove it"
    )


def test_what_the_training_complains_of_is_said_once(tmp_path: Path) -> None:
    config(tmp_path / "tiny.yaml", optimizer={"lr": -1})
    said = refused(GAN, tmp_path, 2)
    assert said.startswith("metrics.features: tiny.yaml: optimizer.lr: -1 should be greater than 0 (")
    assert not (tmp_path / "gan" / "config.yaml").exists()


# Stopping


def trainer_of(classifier: Path) -> psutil.Process:
    """The process that trains a classifier."""
    return psutil.Process(json.loads((classifier / "lease.json").read_text())["pid"])


def training(tmp_path: Path) -> tuple[Ranks, psutil.Process]:
    """A run whose classifier is being trained, and the process that does it."""
    classifier = tmp_path / "runs" / "tiny"
    before = len(list((classifier / "metrics").glob("*")))
    ranks = start(GAN, tmp_path)
    assert wait_for(lambda: len(list((classifier / "metrics").glob("*"))) > before, ranks)
    return ranks, trainer_of(classifier)


def test_a_training_ends_with_the_run_and_is_resumed_by_the_next(tmp_path: Path) -> None:
    config(
        tmp_path / "tiny.yaml", duration="100000 epochs", log={"every": "1 epoch"}, evaluate={"every": "1000 epochs"}
    )
    classifier = tmp_path / "runs" / "tiny"
    ranks, process = training(tmp_path)
    ranks.kill(0)  # SIGKILL: the kernel tells the other one
    process.wait(30)
    ended = outcome(classifier)
    assert ended["status"] == "preempted"

    ranks, process = training(tmp_path)
    assert f"resuming {classifier} at step {ended['step']}" in (classifier / "train.log").read_text()
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [0]
    assert not process.is_running()
    assert outcome(classifier)["status"] == "preempted"
    ended = outcome(tmp_path / "gan")
    assert (ended["status"], ended["step"]) == ("preempted", 0)
    assert json.loads(ranks.text().splitlines()[-1]) == {"status": "preempted", "step": 0, "run": str(tmp_path / "gan")}


def test_a_signal_ends_the_wait_for_another_process(tmp_path: Path) -> None:
    config(tmp_path / "tiny.yaml", run={"url": str(tmp_path / "elsewhere")})
    found = feature_classifier(parsed("--metrics.features", str(tmp_path / "tiny.yaml")))
    assert found
    with filelock.FileLock(found.temporary("lock")):
        ranks = start(GAN, tmp_path, 2)
        assert wait_for(lambda: "waiting for" in ranks.text(), ranks)
        ranks.kill(1, signal.SIGTERM)
        assert ranks.wait() == [0, 0]
    assert outcome(tmp_path / "gan")["status"] == "preempted"
    assert not (tmp_path / "elsewhere").exists()


def test_a_classifier_that_another_job_is_training_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config(tmp_path / "tiny.yaml", duration="5 seconds")
    by_hand = start(["tiny.yaml"], tmp_path)
    lease = tmp_path / "runs" / "tiny" / "lease.json"
    assert wait_for(lease.exists, by_hand)
    os.kill(by_hand.processes[0].pid or 0, signal.SIGSTOP)  # until the other one was refused
    said: list[str] = []
    monkeypatch.setattr("trainer.run.feature_classifier.AGAIN_SECONDS", 0.1)
    found = feature_classifier(parsed())
    assert found
    with Training(found, 1, said.append) as training:
        while len(said) < 2:
            assert training.poll() is None, said
            time.sleep(0.05)
        os.kill(by_hand.processes[0].pid or 0, signal.SIGCONT)
        assert by_hand.wait() == [0]
        training.next_look = 0.0
        while (state := training.poll()) is None:
            time.sleep(0.05)
    assert state == ""
    assert said[1] == "waiting for runs/tiny, which another process is training"


# What a user may get wrong


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        (None, "metrics.features: no config file 'tiny.yaml': check the path; it counts from {folder}"),
        ("a: b: c", "metrics.features: tiny.yaml: not valid YAML in line 1: mapping values are not allowed here; "
         "it counts from {folder}"),
        ("workload: {name: dcgan}", "metrics.features: tiny.yaml trains no classifier but dcgan: give the config of a "
         "classifier, such as configs/mnist_lenet5.yaml"),
        ("metrics: {features: tiny.yaml}", "metrics.features: tiny.yaml has features of its own"),
    ],
)  # fmt: skip
def test_a_config_of_no_classifier(tmp_path: Path, text: str | None, mistake: str) -> None:
    if text is not None:
        (tmp_path / "tiny.yaml").write_text(text)
    assert refused(GAN, tmp_path, 1).startswith(mistake.format(folder=tmp_path))
    assert not (tmp_path / "gan").exists()


def test_a_run_whose_own_config_is_its_classifier(tmp_path: Path) -> None:
    (tmp_path / "gan.yaml").write_text("workload: {name: gan}\nmetrics: {features: gan.yaml}")
    assert refused(["gan.yaml"], tmp_path, 1).startswith("metrics.features: gan.yaml trains no classifier but gan: ")


def different_features(runtime: Runtime) -> str:
    scores = SimpleNamespace(features=SimpleNamespace(label=f"tiny-{runtime.rank}"))
    try:
        Reference(scores, None).prepare(None, runtime)  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return ""


def test_ranks_whose_classifiers_differ_do_not_score_together() -> None:
    expected = (
        "metrics.features: rank 0 has tiny-0, rank 1 has tiny-1: use one run for all, in a shared folder or copied to "
        "every machine"
    )
    assert on_ranks(2, different_features) == [expected, expected]


# What it takes over


@pytest.mark.parametrize(
    ("text", "words", "flags"),
    [
        ("data: {name: mnist}", ["--data.name", "mnist"], ()),
        ("data: {name: mnist}", ["--data.name", "mnist", "--data.root", "d"], ("--data.root", "d")),
        ("data: {name: mnist}", ["--data.name", "stacked_mnist", "--data.root", "d"], ("--data.root", "d")),
        ("data: {name: mnist, root: own}", ["--data.name", "mnist", "--data.root", "d"], ()),
        ("data: {name: cifar10}", ["--data.name", "folder", "--data.root", "d"], ()),
        ("data: {name: mnist}", ["--device", "cpu"], ("--device", "cpu")),
        ("device: auto", ["--device", "cpu"], ()),
    ],
)
def test_the_data_folder_and_the_device_of_a_run_are_handed_over(
    tmp_path: Path, text: str, words: list[str], flags: tuple[str, ...]
) -> None:
    (tmp_path / "tiny.yaml").write_text(text)
    found = feature_classifier(parsed("--metrics.features", str(tmp_path / "tiny.yaml"), *words))
    assert found
    assert (found.url, found.flags) == ("runs/tiny", flags)


def test_no_rank_and_no_setting_of_the_run_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"TRAINER_DATA": "data", "HOME": "/home", "MASTER": "x", "RANKING": "x", "CUDA_VISIBLE_DEVICES": "1"}
    dropped = "TRAINER_BATCH_SIZE TRAINER_RUN__URL RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_PROCID"
    dropped += " TORCHELASTIC_RUN_ID GROUP_WORLD_SIZE ROLE_RANK LAUNCH_END"
    monkeypatch.setattr(os, "environ", {**kept, **dict.fromkeys(dropped.split(), "1")})
    assert without_launcher() == kept


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("loss 1\nerror: a: b\nerror: c\nbye\n", "a: b"),
        ("Traceback\nKeyError: 1\n\n", "KeyError: 1"),
        ("", "no output"),
    ],
)
def test_what_a_process_complains_of(output: str, reason: str) -> None:
    assert first_error(output) == reason


def test_the_doctor_says_that_a_classifier_will_be_trained_and_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config(tmp_path / "tiny.yaml")
    doctor = _Doctor(parsed(), "gan", 2)
    checks = doctor.checks()
    for title, work in checks:
        if title == "features":
            break
        work()
    assert work() == "tiny.yaml is not trained yet: the run will do that first, into runs/tiny"
    assert doctor.trial_config().metrics.features == "pixels"
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
