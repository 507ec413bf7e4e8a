"""Promise 2: a run cannot be lost. Real kills of real processes; the result must be that of the run left alone."""

from __future__ import annotations

import json
import random
import shlex
import signal
from pathlib import Path

import pytest
import s3fs
import torch

from ..ranks import Ranks, run, start, wait_for
from ..results import final_tensors, largest_difference, outcome, records

STEPS = 150
RUN = [
    "--duration", f"{STEPS} steps", "--batch_size", "48", "--log.every", "5 steps", "--checkpoint.every", "13 steps",
    "--evaluate.every", "20 steps", "--workload.ema", "0.99", "--workload.mixup", "0.2", "--data.flip",
    "--data.pad_crop", "1", "--schedule.name", "cosine", "--optimizer.clip_norm", "1", "--run.url", "run",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    for world, folder in folders.items():
        run(RUN, folder, world)
    return {world: folder / "run" for world, folder in folders.items()}


def interrupt(ranks: Ranks, folder: Path, step: int, how: str, chance: random.Random) -> bool:
    """Stop the ranks once the metric log has come to a step; False when they were done before."""

    def reached() -> bool:
        if "held out" not in ranks.text():  # the life before may have come further than this one yet has
            return False
        logs = sorted((folder / "run" / "metrics").glob("*.jsonl"))
        lines = [line for log in logs[-2:] for line in log.read_text().splitlines() if line.endswith("}")]
        return bool(lines) and json.loads(lines[-1])["step"] >= step

    if not wait_for(reached, ranks):
        return False
    everyone = range(len(ranks.processes))
    number = signal.SIGTERM if how == "SIGTERM to one" else signal.SIGKILL
    for rank in everyone if how == "SIGKILL to all" else [chance.choice(everyone)]:
        ranks.kill(rank, number)
    codes = ranks.wait(40)  # nobody may hang because another is gone
    if number == signal.SIGTERM:
        assert codes == [0] * len(codes), ranks.text()
    return True


@pytest.mark.parametrize("how", ["SIGKILL to one", "SIGKILL to all", "SIGTERM to one"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_stopped_three_times_ends_as_the_run_left_alone(
    how: str, world: int, tmp_path: Path, uninterrupted: dict[int, Path]
) -> None:
    chance = random.Random(f"{how} {world}")
    stops = sorted(chance.sample(range(5, STEPS - 20), 3))
    stopped = 0
    for step in stops:
        stopped += interrupt(start(RUN, tmp_path, world), tmp_path, step, how, chance)
        if how == "SIGTERM to one":
            assert outcome(tmp_path / "run")["status"] in ("preempted", "done")
    run(RUN, tmp_path, world)
    assert stopped >= 2, "the run was over before it could be stopped"
    expected = final_tensors(uninterrupted[world])
    actual = final_tensors(tmp_path / "run")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert records(tmp_path / "run") == records(uninterrupted[world])
    assert outcome(tmp_path / "run")["status"] == "done"


@pytest.mark.parametrize("world", [1, 3])
def test_two_ranks_go_on_as_another_number_of_ranks(world: int, tmp_path: Path) -> None:
    arguments = [*RUN, "--precision", "fp64", "--duration", "60 steps"]
    (tmp_path / "alone").mkdir()
    run(arguments, tmp_path / "alone", 2)
    ranks = start(arguments, tmp_path, 2)
    assert interrupt(ranks, tmp_path, 20, "SIGTERM to one", random.Random(0))
    assert "preempted" in ranks.text()
    run(arguments, tmp_path, world)
    alone = tmp_path / "alone" / "run"
    assert largest_difference(final_tensors(alone), final_tensors(tmp_path / "run")) < 1e-9
    for one, other in zip(records(alone), records(tmp_path / "run"), strict=True):
        for name, value in one.items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), name


def test_local_batch_norm_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    """Each rank has running statistics of its own there, so they are part of the checkpoint."""
    arguments = [*RUN, "--batch_norm", "local", "--duration", "40 steps"]
    (tmp_path / "alone").mkdir()
    run(arguments, tmp_path / "alone", 2)
    assert interrupt(start(arguments, tmp_path, 2), tmp_path, 15, "SIGKILL to all", random.Random(0))
    run(arguments, tmp_path, 2)
    assert largest_difference(final_tensors(tmp_path / "alone" / "run"), final_tensors(tmp_path / "run")) == 0
    assert records(tmp_path / "run") == records(tmp_path / "alone" / "run")


def test_a_stop_during_evaluation_saves_and_evaluates_again_later(tmp_path: Path) -> None:
    arguments = ["--duration", "20 steps", "--evaluate.every", "10 steps", "--evaluate.batch_size", "1",
                 "--log.every", "1 step", "--run.url", "run", "--checkpoint.every", "5 steps"]  # fmt: skip
    (tmp_path / "alone").mkdir()
    run(arguments, tmp_path / "alone")
    ranks = start(arguments, tmp_path)
    step_10 = tmp_path / "run" / "checkpoints" / "step-00000010" / "MANIFEST.json"
    assert wait_for(step_10.exists, ranks)  # the evaluation of 599 batches has begun
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [0]
    assert outcome(tmp_path / "run")["status"] == "preempted"
    run(arguments, tmp_path)
    assert records(tmp_path / "run") == records(tmp_path / "alone" / "run")


def test_the_same_command_says_that_the_run_is_done_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    short = shlex.split("--duration '10 steps' --log.every '5 steps' --schedule.name constant --run.url run")
    first = run(short, tmp_path).splitlines()[-1]
    again = run(short, tmp_path)
    assert "is done" in again
    assert again.splitlines()[-1] == first
    longer = run([*short, "--duration", "20 steps"], tmp_path)
    assert "duration: '10 steps' -> '20 steps'" in longer
    assert "resuming" in longer
    (tmp_path / "straight").mkdir()
    run([*short, "--duration", "20 steps"], tmp_path / "straight")
    assert largest_difference(final_tensors(tmp_path / "straight" / "run"), final_tensors(tmp_path / "run")) == 0


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path: Path) -> None:
    arguments = shlex.split(
        "--duration '40 steps' --checkpoint.every '10 steps' --log.every '5 steps' --evaluate.every '10 steps' "
        "--schedule.name constant --run.url run"
    )
    (tmp_path / "alone").mkdir()
    run(arguments, tmp_path / "alone")
    run([*arguments, "--duration", "30 steps"], tmp_path)
    weights = tmp_path / "run" / "checkpoints" / "step-00000030" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    output = run(arguments, tmp_path)
    assert "step-00000030 is corrupt (weights.safetensors has other content" in output
    assert "at step 20" in output
    alone = tmp_path / "alone" / "run"
    assert largest_difference(final_tensors(alone), final_tensors(tmp_path / "run")) == 0
    assert records(tmp_path / "run") == records(alone)


def test_time_limits_and_timed_checkpoints_work_on_two_ranks(tmp_path: Path) -> None:
    arguments = shlex.split(
        "--duration '3 seconds' --checkpoint.every '1 second' --checkpoint.keep 9 --schedule.name constant "
        "--run.url run"
    )
    run(arguments, tmp_path, 2)
    assert outcome(tmp_path / "run")["status"] == "done"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 2
    assert "is done" in run(arguments, tmp_path, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(world: int, tmp_path: Path) -> None:
    arguments = shlex.split(
        "--workload.network fnn --optimizer.name sgd --optimizer.lr 1e30 --duration '200 steps' --log.every '5 steps' "
        "--checkpoint.every '20 steps' --run.url run"
    )
    text = run(arguments, tmp_path, world, code=1)
    assert "the loss is not a finite number" in text
    assert outcome(tmp_path / "run")["status"] == "non_finite"
    assert not list((tmp_path / "run").glob("checkpoints/*/MANIFEST.json"))


def test_a_run_on_s3_is_killed_and_resumed_bit_for_bit(tmp_path: Path, s3_server: dict[str, str]) -> None:
    arguments = shlex.split("--duration '120 steps' --checkpoint.every '15 steps' --log.every '5 steps'")
    (tmp_path / "alone").mkdir()
    run([*arguments, "--run.url", "run"], tmp_path / "alone", 2)
    url = "s3://warm-up/resumed"
    ranks = start([*arguments, "--run.url", url], tmp_path, 2, s3_server)
    bucket = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"], secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"], use_listings_cache=False,
    )  # fmt: skip
    assert wait_for(lambda: bucket.exists(f"{url}/checkpoints/step-00000030/MANIFEST.json"), ranks)
    ranks.kill(0)
    ranks.wait(40)
    assert "resuming" in run([*arguments, "--run.url", url], tmp_path, 2, s3_server)
    bucket.get(url, str(tmp_path / "run"), recursive=True)
    alone = tmp_path / "alone" / "run"
    assert largest_difference(final_tensors(alone), final_tensors(tmp_path / "run")) == 0
    assert records(tmp_path / "run") == records(alone)
    assert outcome(tmp_path / "run")["status"] == "done"


def test_a_last_checkpoint_that_cannot_be_saved_is_rescued_to_the_local_disk(tmp_path: Path) -> None:
    arguments = shlex.split(
        "--duration '4 seconds' --checkpoint.every '1 second' --schedule.name constant --log.every '5 steps' "
        "--run.url run"
    )
    ranks = start(arguments, tmp_path)
    assert wait_for(lambda: bool(list((tmp_path / "run").glob("checkpoints/*/MANIFEST.json"))), ranks)
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "run").write_text("the disk of the run has gone away")
    assert ranks.wait() == [1]
    text = ranks.text()
    assert "warning: a checkpoint was not saved, training continues" in text
    assert "the last checkpoint could not be saved" in text
    (rescued,) = (tmp_path / "runs" / "digits_cnn-rescued" / "checkpoints").iterdir()
    assert (rescued / "MANIFEST.json").exists()
    assert "Traceback" not in text
