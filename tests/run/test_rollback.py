"""What a run does once it is not healthy: it warns, stops or goes back, on all ranks, and is still never lost."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..ranks import Ranks, run, start, wait_for
from ..results import final_tensors, largest_difference, outcome, records
from ..wandb_tools import as_row, read_runs, values

# A discriminator that learns 130 times as fast as its generator has won after ten steps, for ten records in a row.
RATE, BEST, WON, STEPS = 0.013, 9, 20, 36  # with five evaluations, it would also be said to make no progress
RUN = [
    "--workload.name", "gan", "--workload.width", "8", "--workload.layers", "2", "--workload.latent", "8",
    "--data.name", "digits", "--batch_size", "32", "--optimizer.lr", "1e-4", "--workload.discriminator_lr", str(RATE),
    "--duration", f"{STEPS} steps", "--log.every", "1 steps", "--evaluate.every", "9 steps", "--evaluate.samples", "60",
    "--checkpoint.every", "9 steps", "--checkpoint.keep", "20", "--samples.every", "12 steps", "--samples.count", "4",
    "--seed", "3", "--run.url", "run",
]  # fmt: skip
BACK = [*RUN, "--health.action", "rollback"]
CURED = [*BACK, "--health.lr_factor", "0.01"]
BROKEN = [
    *BACK, "--optimizer.name", "sgd", "--optimizer.lr", "1e30", "--workload.discriminator_lr", "1e30",
]  # fmt: skip
WORLDS = pytest.mark.parametrize("world", [1, 2])


def finished(folder: Path, words: list[str], world: int = 1, code: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    run(words, folder, world, code=code)
    return folder / "run"


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("warned"), RUN)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    words = [*RUN, "--health.action", "stop"]
    return {world: finished(tmp_path_factory.mktemp("stopped"), words, world, 1) for world in (1, 2)}


@pytest.fixture(scope="module")
def cured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that went back once and then came to their end."""
    return {world: finished(tmp_path_factory.mktemp("cured"), CURED, world) for world in (1, 2)}


def rollbacks(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "rollbacks.json").read_text())


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/step-*/MANIFEST.json"))


def trained(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["kind"] == "train"]


def same(a: Path, b: Path) -> None:
    """Two runs that ended bit for bit alike."""
    expected, actual = final_tensors(a), final_tensors(b)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert records(a) == records(b)
    assert rollbacks(a) == rollbacks(b)
    one, other = outcome(a), outcome(b)
    assert {k: one[k] for k in ("status", "step", "health", "rollbacks", "metrics")} == {
        k: other[k] for k in ("status", "step", "health", "rollbacks", "metrics")
    }


# warn and stop


def test_warn_goes_on_to_the_end_and_the_outcome_says_what_was_wrong(warned: Path) -> None:
    end = outcome(warned)
    assert (end["status"], end["step"], end["rollbacks"]) == ("done", STEPS, [])
    assert (end["health"]["state"], end["health"]["step"]) == ("convergence_failure", WON)
    assert end["health"]["reason"].startswith("the discriminator has won: accuracy 1.0000, loss ")
    assert trained(warned)[-1]["step"] == STEPS
    assert not (warned / "rollbacks.json").exists()


@WORLDS
def test_stop_ends_the_run_where_it_was_noticed(world: int, stopped: dict[int, Path], warned: Path) -> None:
    end = outcome(stopped[world])
    assert (end["status"], end["step"]) == ("convergence_failure", WON)
    assert end["reason"] == end["health"]["reason"]
    assert end["health"]["state"] == "convergence_failure"
    assert max(steps_saved(stopped[world])) == WON  # so that it can go on, should the user wish so
    last = trained(stopped[world])[-1]
    assert last["step"] == WON
    if world == 1:
        assert last in trained(warned)


def test_the_verdict_outlives_a_restart_and_a_patient_user_may_go_on(stopped: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(stopped[1], tmp_path / "run")
    text = run([*RUN, "--health.action", "stop"], tmp_path, code=1)
    assert json.loads(text.splitlines()[-1])["status"] == "convergence_failure"
    assert max(steps_saved(tmp_path / "run")) == WON
    run(RUN, tmp_path)
    end = outcome(tmp_path / "run")
    assert (end["status"], end["step"], end["health"]["state"]) == ("done", STEPS, "convergence_failure")


def test_a_run_that_goes_on_with_a_shorter_duration_than_it_has_trained_is_over(
    stopped: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(stopped[1], tmp_path / "run")
    ranks = start([*RUN, "--duration", "15 steps"], tmp_path)
    assert ranks.wait(30) == [0]
    assert (outcome(tmp_path / "run")["status"], outcome(tmp_path / "run")["step"]) == ("done", WON)


# rollback


def test_a_run_goes_back_to_its_best_checkpoint_and_ends_well(cured: dict[int, Path], warned: Path) -> None:
    end = outcome(cured[1])
    (back,) = rollbacks(cured[1])
    assert end["rollbacks"] == [back]
    assert (end["status"], end["step"], end["health"]["state"]) == ("done", STEPS, "healthy")
    assert (back["from"], back["state"]) == (WON, "convergence_failure")
    assert back["reason"].startswith("the discriminator has won: ")
    fids = {r["step"]: r["fid@pixels"] for r in records(warned) if r["kind"] == "evaluate" and r["step"] < WON}
    assert set(fids) == {9, 18}
    assert back["to"] == min(fids, key=lambda step: fids[step]) == BEST


def test_what_came_after_the_checkpoint_is_gone_and_made_again(cured: dict[int, Path], warned: Path) -> None:
    assert steps_saved(cured[1]) == [9, 18, 27, 36]  # and none of step 20, where it was stopped
    steps = [record["step"] for record in trained(cured[1])]
    assert steps == list(range(1, STEPS + 1))
    before = [record for record in records(warned) if record["step"] <= BEST]
    assert records(cured[1])[: len(before)] == before


def test_the_learning_rate_is_lower_after_a_rollback(cured: dict[int, Path]) -> None:
    assert {r["lr"] for r in trained(cured[1]) if r["step"] <= BEST} == {RATE}
    assert {r["lr"] for r in trained(cured[1]) if r["step"] > BEST} == {RATE * 0.01}


def test_the_noise_is_another_after_a_rollback(tmp_path: Path, warned: Path) -> None:
    """At the same learning rate the discriminator wins again, but not in the same way."""
    once = finished(tmp_path, [*BACK, "--health.lr_factor", "1", "--health.rollbacks", "1"], code=1)
    (back,) = rollbacks(once)
    assert outcome(once)["status"] == "convergence_failure"
    first, second = ({r["step"]: r for r in trained(folder)} for folder in (warned, once))
    for step in second:
        assert first[step]["lr"] == second[step]["lr"]
        assert (first[step] == second[step]) == (step <= back["to"])


def test_a_run_that_cannot_be_cured_stops_after_so_many_rollbacks(tmp_path: Path) -> None:
    folder = finished(tmp_path, [*BACK, "--health.rollbacks", "3", "--health.lr_factor", "0.9"], 2, code=1)
    end = outcome(folder)
    assert end["status"] == end["health"]["state"] == "convergence_failure"
    assert len(rollbacks(folder)) == 3
    assert end["rollbacks"] == rollbacks(folder)
    assert trained(folder)[-1]["lr"] == pytest.approx(RATE * 0.9**3, rel=1e-12)
    assert all(back["to"] < back["from"] for back in rollbacks(folder))


def test_a_run_never_goes_back_to_where_it_was_already_sick(tmp_path: Path) -> None:
    """Here the only evaluation, and so the best one, is at the step of the verdict."""
    words = [*CURED, "--evaluate.every", "20 steps", "--checkpoint.every", "20 steps"]
    folder = finished(tmp_path, words)
    assert [(back["from"], back["to"]) for back in rollbacks(folder)] == [(WON, 0)]
    assert outcome(folder)["status"] == "done"


def test_all_ranks_go_back_together_and_the_world_size_changes_nothing(tmp_path: Path) -> None:
    alone, both = (finished(tmp_path / str(w), [*CURED, "--precision", "fp64"], w) for w in (1, 2))
    assert largest_difference(final_tensors(alone), final_tensors(both)) < 1e-9
    assert [(b["from"], b["to"]) for b in rollbacks(alone)] == [(b["from"], b["to"]) for b in rollbacks(both)]
    for one, other in zip(records(alone), records(both), strict=True):
        assert other.pop("kind") == one.pop("kind")
        assert other == pytest.approx(one, rel=1e-6, abs=1e-9)


# Values that are not finite


def test_a_run_whose_loss_is_not_finite_goes_back_to_its_start_and_is_cured_by_a_lower_rate(tmp_path: Path) -> None:
    folder = finished(tmp_path, [*BROKEN, "--health.lr_factor", "1e-33"], 2)
    (back,) = rollbacks(folder)
    assert (back["from"], back["to"], back["state"]) == (1, 0, "non_finite")
    end = outcome(folder)
    assert (end["status"], end["health"]["state"]) == ("done", "healthy")
    assert all(tensor.isfinite().all() for tensor in final_tensors(folder).values())


def test_a_run_whose_loss_stays_not_finite_stops_and_saves_nothing(tmp_path: Path) -> None:
    folder = finished(tmp_path, BROKEN, code=1)
    end = outcome(folder)
    assert end["status"] == end["health"]["state"] == "non_finite"
    assert [back["to"] for back in rollbacks(folder)] == [0, 0]
    assert steps_saved(folder) == []


def test_weights_that_are_not_finite_between_two_records_are_a_sickness_too(tmp_path: Path) -> None:
    """The save notices before the log does."""
    words = [*BROKEN, "--log.every", "50 steps", "--checkpoint.every", "5 steps", "--health.action", "stop"]
    folder = finished(tmp_path, words, code=1)
    end = outcome(folder)
    assert end["status"] == end["health"]["state"] == "non_finite"


# Never lost


def offline(folder: Path) -> dict[str, str]:
    """An environment with W&B offline and without anybody's key."""
    return {"HOME": str(folder / "home"), "NETRC": str(folder / "none"), "WANDB_API_KEY": "",
            "WANDB_CONFIG_DIR": str(folder / "home"), "WANDB_CACHE_DIR": str(folder / "home"),
            "TRAINER_WANDB__MODE": "offline", "WANDB_INIT_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT": "60"}  # fmt: skip


@pytest.mark.parametrize("lives", [1, 2])
def test_wandb_has_both_what_a_rollback_made_void_and_what_came_instead(lives: int, tmp_path: Path) -> None:
    """The second life begins between the verdict and the rollback."""
    environment = offline(tmp_path)
    if lives == 2:
        run([*RUN, "--health.action", "stop"], tmp_path, environment=environment, code=1)
        time.sleep(1)  # W&B names its files by the second
    run(CURED, tmp_path, environment=environment)
    rows = [row for stored in read_runs(tmp_path / "run") for row in stored.rows]
    log = [as_row(record) for record in records(tmp_path / "run", timing=True)]
    before = sum(row["step"] <= BEST for row in log) - 1  # the evaluation at this step came after its checkpoint
    kept = log[before:]
    assert [values(row) for row in rows[-len(kept) :]] == kept
    assert rows[-len(kept) - 1]["step"] == WON  # the last one that the rollback made void
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def interrupted(words: list[str], folder: Path, world: int, when: Callable[[Ranks], bool], victim: int) -> bool:
    """Kill a rank at a moment; False where the run was over before."""
    ranks = start(words, folder, world)
    if not wait_for(lambda: when(ranks), ranks, 120):
        return False
    ranks.kill(victim)
    ranks.wait(60)
    return True


@pytest.mark.parametrize(("moment", "world"), [("decided", 2), ("trains again", 1), ("saves again", 2)])
def test_a_run_killed_around_a_rollback_ends_as_the_run_left_alone(
    moment: str, world: int, tmp_path: Path, cured: dict[int, Path]
) -> None:
    folder = tmp_path / "run"

    def decided(ranks: Ranks) -> bool:
        return (folder / "rollbacks.json").exists()

    def trains_again(ranks: Ranks) -> bool:
        return decided(ranks) and (folder / "metrics" / f"{BEST:08d}.jsonl").exists()

    def saves_again(ranks: Ranks) -> bool:
        return decided(ranks) and any(step > BEST for step in steps_saved(folder))

    when = {"decided": decided, "trains again": trains_again, "saves again": saves_again}[moment]
    killed = interrupted(CURED, tmp_path, world, when, world - 1)
    assert killed
    run(CURED, tmp_path, world)
    same(cured[world], folder)


@pytest.mark.parametrize(("deleted", "world"), [([], 1), ([WON], 2)])
def test_a_run_killed_before_it_has_decided_comes_to_the_same_decision(
    deleted: list[int], world: int, tmp_path: Path, stopped: dict[int, Path], cured: dict[int, Path]
) -> None:
    """As a kill leaves it that came after the last checkpoint, or amid the deletion of those after the best one."""
    shutil.copytree(stopped[world], tmp_path / "run")
    for step in deleted:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    run(CURED, tmp_path, world)
    same(cured[world], tmp_path / "run")
