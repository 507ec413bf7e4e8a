"""Promise 1: the world size is no hyper-parameter."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from ..ranks import run
from ..results import final_tensors, largest_difference, records

STEPS = [
    "--duration", "30 steps", "--batch_size", "64", "--precision", "fp64", "--log.every", "1 step",
    "--evaluate.every", "15 steps", "--evaluate.samples", "501", "--checkpoint.every", "1000 steps",
    "--workload.ema", "0.9", "--data.pad_crop", "1", "--data.flip",
]  # fmt: skip


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_trains_the_same_network(
    data: str, world: int, tmp_path: Path, alone: dict[str, Path], real_data: str
) -> None:
    run([*STEPS, "--data.name", data, "--run.url", "run"], tmp_path, world, {"TRAINER_DATA": real_data})
    assert largest_difference(final_tensors(alone[data]), final_tensors(tmp_path / "run")) < 1e-9
    for one, many in zip(records(alone[data]), records(tmp_path / "run"), strict=True):
        assert one.keys() == many.keys()
        for name, value in one.items():
            assert many[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, real_data: str) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("alone")
    for data in ("digits", "fashion_mnist"):
        run([*STEPS, "--data.name", data, "--run.url", data], folder, environment={"TRAINER_DATA": real_data})
    return {data: folder / data for data in ("digits", "fashion_mnist")}


MIXED = ["--workload.mixup", "0.4", "--workload.cutmix", "1", "--workload.label_smoothing", "0.1",
         "--optimizer.clip_norm", "0.5", "--optimizer.weight_decay", "0.01", "--optimizer.name", "adamw",
         "--accumulation", "2", "--data.erase", "0.5"]  # fmt: skip


def test_mixing_clipping_and_accumulation_do_not_depend_on_the_ranks_either(tmp_path: Path) -> None:
    for world in (1, 3):
        run([*STEPS, *MIXED, "--run.url", f"run{world}"], tmp_path, world)
    assert largest_difference(final_tensors(tmp_path / "run1"), final_tensors(tmp_path / "run3")) < 1e-9


def test_dropout_does_not_depend_on_the_ranks_either(tmp_path: Path) -> None:
    """SqueezeNet has dropout, and no BatchNorm that could hide a difference."""
    arguments = shlex.split(
        "--workload.network torchvision:squeezenet1_1 --data.name fake --data.size 40 --data.samples 64 --batch_size 6 "
        "--duration '4 steps' --precision fp64 --optimizer.name sgd --optimizer.lr 0.01 --data.pad_crop 0"
    )
    for world in (1, 2):
        run([*arguments, "--run.url", f"run{world}"], tmp_path, world)
    assert largest_difference(final_tensors(tmp_path / "run1"), final_tensors(tmp_path / "run2")) < 1e-9


def test_streaming_with_workers_trains_the_same_network_bit_for_bit(tmp_path: Path) -> None:
    short = [*STEPS, "--duration", "8 steps", "--evaluate.every", "8 steps"]
    run([*short, "--run.url", "resident"], tmp_path)
    for workers in (0, 2):
        url = f"streamed{workers}"
        run([*short, "--data.resident", "no", "--data.workers", workers, "--run.url", url], tmp_path)
        assert records(tmp_path / url) == records(tmp_path / "resident")
        assert largest_difference(final_tensors(tmp_path / url), final_tensors(tmp_path / "resident")) == 0


def test_local_batch_norm_is_offered_and_differs(tmp_path: Path) -> None:
    for kind in ("sync", "local"):
        run([*STEPS, "--batch_norm", kind, "--run.url", kind], tmp_path, 2)
    assert largest_difference(final_tensors(tmp_path / "sync"), final_tensors(tmp_path / "local")) > 1e-3


def test_evaluation_counts_every_sample_once_though_ranks_have_uneven_shares(tmp_path: Path) -> None:
    arguments = ["--duration", "2 steps", "--evaluate.samples", "101", "--evaluate.batch_size", "33"]
    reports = []
    for world in (1, 2, 4):  # 101 = 3 * 33 + 2: two of four ranks get none of the last batch
        last = run([*arguments, "--precision", "fp64", "--run.url", f"run{world}"], tmp_path, world).splitlines()[-1]
        reports.append(json.loads(last))
    assert {report["accuracy"] * 101 % 1 for report in reports} == {0.0}
    assert [report["loss"] for report in reports] == [pytest.approx(reports[0]["loss"], rel=1e-12)] * 3
