"""Optimizers from settings: weight decay spares norms and biases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config.options import OptimizerOptions
from trainer.nn import optim


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_spares_norms_and_biases(name: str) -> None:
    net = network()
    names = {parameter: key for key, parameter in net.named_parameters()}
    optimizer = optim.build(OptimizerOptions.model_validate({"name": name, "weight_decay": 0.25}), net)
    groups = {group["weight_decay"]: [names[p] for p in group["params"]] for group in optimizer.param_groups}
    assert groups == {0.25: ["0.weight", "3.weight"], 0.0: ["0.bias", "1.weight", "1.bias", "3.bias"]}


def test_without_weight_decay_there_is_one_group_of_all_that_is_trained() -> None:
    net = network()
    net[0].requires_grad_(False)  # type: ignore[index]
    optimizer = optim.build(OptimizerOptions(), net)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    assert all(group["weight_decay"] == 0.0 for group in optimizer.param_groups)


def test_each_optimizer_gets_its_settings() -> None:
    sgd = optim.build(OptimizerOptions(name="sgd", lr=0.5, momentum=0.9, nesterov=True), network())
    assert type(sgd) is torch.optim.SGD
    assert {key: sgd.defaults[key] for key in ("lr", "momentum", "nesterov")} == {
        "lr": 0.5, "momentum": 0.9, "nesterov": True,
    }  # fmt: skip
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        options = OptimizerOptions.model_validate({"name": name, "lr": 0.5, "betas": (0.5, 0.75), "eps": 0.1})
        built = optim.build(options, network())
        assert type(built) is kind
        assert {key: built.defaults[key] for key in ("lr", "betas", "eps")} == {
            "lr": 0.5, "betas": (0.5, 0.75), "eps": 0.1,
        }  # fmt: skip


def test_adamw_decays_the_weights_by_lr_times_decay_and_nothing_else() -> None:
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = optim.build(OptimizerOptions(name="adamw", lr=0.5, weight_decay=0.25), net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 1 - 0.5 * 0.25 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)
