"""Replayed steps, with a stand-in for the CUDA graph that computes a step again; tests/gpu has the real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer import graphs
from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime
from trainer.engine import Engine
from trainer.graphs import Computed, Graphs

from .engines import engine_of
from .test_engine import difference
from .workloads.test_contract import configure

RATE = {"lr": 2.0**-10}  # which single precision holds exactly


def computed_again(compute: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
    results: Computed = ([], {})

    def replay() -> None:
        means, inputs = compute()
        results[0][:] = means
        results[1].update(inputs)

    return replay, results


def trained(case: str, replayed: bool, steps: int = 16) -> tuple[dict[str, Tensor], Engine, list[str]]:
    config = configure(case)
    optimizer = config.optimizer.model_copy(update=RATE)
    notes: list[str] = []
    with Runtime(ProcessInfo(), device="cpu", precision="fp32", threads=1) as runtime:
        changes = {"precision": "fp32", "duration": f"{steps} steps", "optimizer": optimizer}
        engine, _ = engine_of(runtime, config.model_copy(update=changes))
        if replayed:
            engine.graphs = Graphs(engine.compute, [phase.optimizer for phase in engine.workload.phases], notes.append)
        assert engine.train().status == "done"
        return {name: tensor.clone() for name, tensor in engine.workload.state_dict().items()}, engine, notes


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("classifier", 1), ("dcgan", 1), ("dcgan, noisy", 0), ("dcgan, constrained", 2), ("stylegan", 3), ("began", 1),
        ("wgan_gp, accumulating", 1), ("infogan", 1), ("biggan", 1), ("pix2pix", 1), ("cyclegan", 0), ("r3gan", 0),
    ],
)  # fmt: skip
def test_replayed_steps_give_the_same_bits(case: str, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of step has a graph; where steps depend on more than their inputs, there is none."""
    monkeypatch.setattr(graphs, "captured", computed_again)
    eager, _, _ = trained(case, replayed=False)
    weights, engine, notes = trained(case, replayed=True)
    if case == "stylegan":  # its learning rate is one that single precision rounds
        assert difference(eager, weights) < 1e-3
    else:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in eager.items())
    assert engine.graphs is not None
    assert engine.graphs.usable == (kinds > 0)
    assert len(engine.graphs.replays) == kinds
    assert not notes


def test_steps_go_on_where_the_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(compute: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", refuse)
    eager, _, _ = trained("dcgan", replayed=False)
    weights, _, notes = trained("dcgan", replayed=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in eager.items())
    assert "operation not permitted" in notes[0]
