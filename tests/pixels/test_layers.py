"""Layers of networks as functions of an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from trainer.pixels.layers import LayeredNetwork, ends_of_stages
from trainer.workloads.classifier import OWN, Options, network

from ..workloads.test_networks import description

CPU = torch.device("cpu")


def layered(module: nn.Module, size: int = 32, mean: float = 0.0, std: float = 1.0) -> LayeredNetwork:
    return LayeredNetwork(module, (3, size, size), [mean] * 3, [std] * 3, CPU)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(5 * 13 * 13, 7),
    )  # fmt: skip


def image(height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_a_layer_is_read_as_it_left_it_though_the_next_works_in_place() -> None:
    module = small()
    outputs = layered(module, mean=0.5, std=0.25)(image(), ["0", "3", "6"])
    inputs = (image() - 0.5) / 0.25
    with torch.no_grad():
        assert (module[0](inputs) < 0).any()
        torch.testing.assert_close(outputs["0"], module[0](inputs))
        torch.testing.assert_close(outputs["3"], module[:4](inputs))
        torch.testing.assert_close(outputs["6"], module(inputs))


def test_nothing_is_computed_after_the_last_layer_so_images_of_other_sizes_will_do() -> None:
    reader = layered(small())
    assert reader(image(20, 50), ["0", "3"])["3"].shape == (1, 5, 7, 22)
    assert reader.takes(20, 50, ["3"]) == ""
    assert "shapes cannot be multiplied" in reader.takes(20, 50, ["6"])
    assert "too small" in reader.takes(3, 50, ["3"])
    assert not any(module._forward_hooks for module in reader.network.modules())


def test_layers_are_listed_in_the_order_of_computation_with_their_channels() -> None:
    assert [(layer.name, layer.shape) for layer in layered(small()).layers] == [
        ("0", (4, 30, 30)), ("1", (4, 30, 30)), ("2", (4, 15, 15)), ("3", (5, 13, 13)), ("4", (5, 13, 13)),
        ("5", (845,)), ("6", (7,)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg_small", ["relu1_1", "relu2_1", "relu3_2", "relu4_2"]),
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("cnn", ["0.2", "1.2"]),
        ("lenet5", ["1", "4"]),
        ("fnn", []),
    ],
)
def test_a_stage_ends_with_the_last_layer_at_a_resolution_that_has_convolutions(name: str, expected: list[str]) -> None:
    module = network(Options(name="classifier", network=name), description(3, 32))
    assert ends_of_stages(layered(module).layers) == expected


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_a_network_of_any_kind_has_layers(name: str) -> None:
    reader = layered(get_model(name), 64)
    assert len(ends_of_stages(reader.layers)) > 2
    assert reader.layers[-1].shape[0] == 1000


def test_every_own_network_can_be_read() -> None:
    for name in OWN:
        assert layered(network(Options(name="classifier", network=name), description(3, 32))).layers[-1].shape == (7,)
