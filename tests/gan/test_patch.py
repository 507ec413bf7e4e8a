from __future__ import annotations

import pytest
import torch

from trainer.gan.patch import PatchDiscriminator, patch_layers, receptive_field
from trainer.nn.norm import Norm


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_a_logit_sees_the_patch_that_the_convolutions_say(layers: int, field: int) -> None:
    network = PatchDiscriminator(1, 1, layers).double().eval()
    assert receptive_field(network) == field
    image = torch.zeros((1, 1, 256, 256), dtype=torch.float64).requires_grad_()
    logits = network(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == field


def test_the_networks_of_the_paper() -> None:
    network = PatchDiscriminator(6)
    widths = [m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]
    assert network(torch.zeros(1, 6, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_only_batch_norm_lets_an_image_depend_on_others(norm: Norm) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(1, 4, 2, norm)
    images = torch.randn(3, 1, 32, 32)
    assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-6) == (norm == "instance")
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images).isfinite().all()


@pytest.mark.parametrize(("size", "layers"), [(8, 1), (16, 1), (28, 1), (32, 2), (63, 2), (64, 3), (256, 3)])
def test_patches_are_not_much_larger_than_the_image(size: int, layers: int) -> None:
    assert patch_layers(size, None) == layers
    assert PatchDiscriminator(1, 2, layers)(torch.zeros(2, 1, size, size)).numel()


def test_patches_that_an_image_has_no_room_for() -> None:
    assert patch_layers(32, 3) == 3
    with pytest.raises(ValueError, match="patch_layers: 4 halvings leave no patch of images of 32 pixels: use 3 or"):
        patch_layers(32, 4)
    with pytest.raises(ValueError, match="1 halvings leave no patch of images of 5 pixels: use a data"):
        patch_layers(5, None)
