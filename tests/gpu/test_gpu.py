"""What a GPU alone can show: `bash gpu/run.sh` runs these there. Without one they rehearse the same lines on the CPU.

The contract of all workloads, at 1, 2 and 3 ranks, runs on the GPU as well: it takes the device that is there.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime
from trainer.randomness import Draws

from ..engines import engine_of, metrics_of
from ..ranks import run, start, wait_for
from ..results import final_tensors, records
from ..test_engine import difference
from ..workloads.test_contract import CASES, configure

pytestmark = pytest.mark.gpu
ON_GPU = torch.accelerator.is_available()
STEPS = 20 if ON_GPU else 2
STEPWISE = ("r3gan", "cyclegan", "dcgan, noisy")  # whose steps depend on their number
REHEARSED = CASES if ON_GPU else ["classifier", "dcgan, noisy", "stylegan"]
DETERMINISTIC = [
    "--deterministic", "--precision", "bf16", "--batch_size", "48", "--duration", "60 steps", "--log.every", "5 steps",
    "--checkpoint.every", "10 steps", "--evaluate.every", "30 steps", "--samples.every", "100 steps",
    "--run.url", "run", "--data.name", "fake", "--data.samples", "400", "--data.size", "16",
]  # fmt: skip
NETWORK = "resnet18" if ON_GPU else "cnn"
KINDS = {
    "classifier": ["--workload.network", NETWORK, "--data.pad_crop", "2"],
    "dcgan": ["--workload.name", "dcgan", "--workload.width", "8", "--workload.augment", "translation"],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_workload_trains(precision: str) -> None:
    changes = {"precision": precision, "duration": f"{STEPS} steps"}
    with Runtime(ProcessInfo(), precision=precision, threads=1) as runtime:
        for case in REHEARSED:
            engine, _ = engine_of(runtime, configure(case).model_copy(update=changes))
            before = {name: tensor.clone() for name, tensor in engine.workload.state_dict().items()}
            assert engine.train().status == "done", case
            weights = engine.workload.state_dict()
            assert difference(before, weights) > 0, case
            assert all(tensor.isfinite().all() for tensor in weights.values()), case
            assert all(map(math.isfinite, engine.boundary.metrics.values())) or precision == "bf16", case
        assert (runtime.memory() > 0) == ON_GPU


@pytest.mark.parametrize("case", REHEARSED)
def test_the_curve_is_that_of_the_cpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with noise from the CPU's generators: weights, metrics and scores."""
    for method in ("normal", "uniform", "integers"):
        monkeypatch.setattr(Draws, method, drawn_on_the_cpu(getattr(Draws, method)))
    results: list[tuple[dict[str, Tensor], dict[str, float]]] = []
    for device in ("auto", "cpu"):
        with Runtime(ProcessInfo(), device=device, precision="fp64", threads=1) as runtime:
            engine, _ = engine_of(runtime, configure(case))
            assert engine.train().status == "done"
            weights = {name: tensor.cpu() for name, tensor in engine.workload.state_dict().items()}
            results.append((weights, metrics_of(engine)))
    (here, scores), (cpu, expected) = results
    # R3GAN begins on the kink of its activations: on a CPU, weights that differ by 1e-16 end as far apart.
    assert difference(here, cpu) < (1e-2 if case == "r3gan" else 1e-8)
    assert case == "r3gan" or scores == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", REHEARSED)
def test_replayed_steps_are_the_steps(case: str) -> None:
    """CUDA graphs give the bits of steps that are launched one kernel after the other."""
    results = []
    for replayed in (False, True):
        with Runtime(ProcessInfo(), precision="fp32", deterministic=True, threads=1) as runtime:
            config = configure(case)
            optimizer = config.optimizer.model_copy(update={"lr": 2.0**-10})  # which single precision holds exactly
            changes = {"precision": "fp32", "duration": f"{STEPS} steps", "optimizer": optimizer}
            engine, _ = engine_of(runtime, config.model_copy(update={**changes, "cuda_graphs": replayed}))
            assert engine.train().status == "done"
            results.append({name: tensor.clone() for name, tensor in engine.workload.state_dict().items()})
            assert (engine.graphs is not None) == (ON_GPU and replayed)
    launched, replayed_ = results
    stepwise = case in STEPWISE or CASES[case]["name"] in STEPWISE
    assert engine.graphs is None or bool(engine.graphs.replays) != stepwise
    if CASES[case]["name"] == "stylegan":  # its learning rate is one that single precision rounds
        assert difference(launched, replayed_) < 1e-2
    else:
        assert all(torch.equal(tensor, replayed_[name]) for name, tensor in launched.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_bit_for_bit_as_one_left_alone(kind: str, tmp_path: Path) -> None:
    (alone := tmp_path / "alone").mkdir()
    (killed := tmp_path / "killed").mkdir()
    words = [*DETERMINISTIC, *KINDS[kind]]
    run(words, alone)
    ranks = start(words, killed)
    assert wait_for(lambda: len(list((killed / "run").glob("checkpoints/*/MANIFEST.json"))) >= 2, ranks, 120)
    ranks.kill(0, signal.SIGKILL)
    ranks.wait()
    run(words, killed)
    expected, actual = final_tensors(alone / "run"), final_tensors(killed / "run")
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert records(killed / "run") == records(alone / "run")


def test_the_commands_take_a_run_of_the_gpu_anywhere(tmp_path: Path) -> None:
    run([*DETERMINISTIC, *KINDS["classifier"]], tmp_path)
    here, cpu = (run(["evaluate", "run", "--device", device], tmp_path) for device in ("auto", "cpu"))
    assert metric(here, "accuracy") == pytest.approx(metric(cpu, "accuracy"), abs=0.02)
    assert metric(here, "loss") == pytest.approx(metric(cpu, "loss"), rel=0.02)
    run(["export", "run", "--to", "out", "--format", "safetensors", "torch", "onnx"], tmp_path, timeout=240)
    assert len(list((tmp_path / "out").iterdir())) >= 3
    line = records(tmp_path / "run", timing=True)[0]
    assert ("gpu_memory_bytes" in line) == ON_GPU


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_share_a_gpu(kind: str, tmp_path: Path) -> None:
    """Over gloo, since NCCL takes one rank a GPU."""
    words = [*DETERMINISTIC, *KINDS[kind], "--precision", "fp64", "--duration", "10 steps"]
    texts = {}
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        texts[world] = run(words, tmp_path / str(world), world)
    one, two = (final_tensors(tmp_path / str(world) / "run") for world in (1, 2))
    assert difference(one, two) < 1e-9
    assert ("over gloo" in texts[2]) == ON_GPU


@pytest.mark.skipif(not ON_GPU, reason="torch.compile takes minutes on a CPU, where it does not pay off")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_networks_learn_as_others_do(kind: str, tmp_path: Path) -> None:
    words = [*DETERMINISTIC, *KINDS[kind], "--precision", "fp32", "--no-deterministic"]
    for name, flags in {"eager": [], "compiled": ["--compile"]}.items():
        (tmp_path / name).mkdir()
        run([*words, *flags], tmp_path / name, timeout=280)
    eager, compiled = (
        next(r for r in records(tmp_path / name / "run") if r["kind"] == "train") for name in ("eager", "compiled")
    )
    for name, value in eager.items():
        assert compiled[name] == (value if isinstance(value, str) else pytest.approx(value, rel=0.05, abs=0.02)), name


def drawn_on_the_cpu(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(draws: Draws, *arguments: Any, **named: Any) -> Tensor:
        return method(replace(draws, device=torch.device("cpu")), *arguments, **named).to(draws.device)

    return draw


def metric(output: str, name: str) -> float:
    return float(json.loads(output.splitlines()[-1])[name])
