"""pix2pix: its networks, its losses, the inputs that it derives, what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.options import OptimizerOptions
from trainer.data.description import ImageDescription
from trainer.gan.patch import PatchDiscriminator
from trainer.nn.dropout import Dropout
from trainer.randomness import Draws
from trainer.workloads.pix2pix import Options, Pix2Pix, UNet, build, edges, levels

DATA = ImageDescription("noise", 16, 8, 1, 16, ("a",), (0.5,), (0.5,))
BATCH = 4


def pix2pix(data: ImageDescription = DATA, **options: Any) -> Pix2Pix:
    torch.manual_seed(0)
    return build(Options.model_validate({"pairs": "edges", "width": 4, **options}), data, OptimizerOptions())


def draws(seed: int = 0) -> Draws:
    return Draws(seed, (0, "generator", 0, 0), slice(0, BATCH), torch.device("cpu"))


def images(size: int = 16, channels: int = 1) -> Tensor:
    return torch.rand((BATCH, channels, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_networks_are_those_of_the_paper() -> None:
    """An eighth as wide. By hand: 16 weights a pair of channels, a bias where no norm follows, two numbers a norm's."""
    generator, discriminator = UNet(3, Options(width=8), levels(256, None)), PatchDiscriminator(6, 8)
    down = [3, 8, 16, 32, 64, 64, 64, 64, 64]
    up = [64, 64, 64, 64, 64, 32, 16, 8, 3]
    into = [64, *(2 * width for width in up[1:-1])]
    weights = sum(16 * a * b for a, b in (*itertools.pairwise(down), *zip(into, up[1:], strict=True)))
    biases, norms = 8 + 64 + 3, 2 * (sum(down[2:-1]) + sum(up[1:-1]))
    assert count(generator) == weights + biases + norms
    assert [module.probability for module in generator.modules() if isinstance(module, Dropout)] == [0.5] * 3
    weights = sum(16 * a * b for a, b in itertools.pairwise((6, 8, 16, 32, 64, 1)))
    assert count(discriminator) == weights + 8 + 1 + 2 * (16 + 32 + 64)


@pytest.mark.parametrize(("size", "depth", "times"), [(256, None, 8), (32, None, 5), (96, None, 5), (80, None, 4),
                                                     (28, 2, 2), (256, 3, 3)])  # fmt: skip
def test_the_u_net_halves_down_to_a_few_pixels(size: int, depth: int | None, times: int) -> None:
    assert levels(size, depth) == times
    if size <= 32:
        assert UNet(1, Options(width=2), times).eval()(torch.zeros(2, 1, size, size)).shape == (2, 1, size, size)


def test_what_was_halved_reaches_the_output_past_the_innermost_layer() -> None:
    network = UNet(1, Options(width=4), 4).eval()
    for parameter in network.encoder[-1].parameters():
        nn.init.zeros_(parameter)
    assert not torch.allclose(network(images()), network(-images()))


def test_the_losses_follow_their_formulas() -> None:
    workload = pix2pix(l1=100.0, adversarial=2.0).eval()  # so that a second pass gives the same
    assert workload.discriminator is not None
    batch = {"image": images()}
    inputs = edges(batch["image"])
    outputs = workload.generate(inputs, draws())
    real, fake = (workload.discriminator(torch.cat([inputs, shown], 1)) for shown in (batch["image"], outputs))
    loss, scalars = workload.discriminator_loss(batch, draws())
    halves = [F.binary_cross_entropy_with_logits(x, torch.full_like(x, t)) for x, t in ((real, 1.0), (fake, 0.0))]
    torch.testing.assert_close(loss, (halves[0] + halves[1]) / 2)
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    assert float(scalars["discriminator_accuracy"]) == pytest.approx(float(right))
    loss, scalars = workload.generator_loss(batch, draws())
    fooled = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    error = (outputs.detach() - batch["image"]).abs().mean()
    torch.testing.assert_close(loss, 100 * error + 2 * fooled)
    assert float(scalars["l1"]) == pytest.approx(float(error) / 2)


def test_the_generator_learns_from_the_outputs_that_were_just_judged() -> None:
    workload, batch = pix2pix(), {"image": images()}
    first, last = (replace(draws(), scope=(0, "phase", 0, micro_batch)) for micro_batch in (0, 1))
    passes: list[int] = []
    workload.generator.register_forward_hook(lambda *_: passes.append(1))
    for micro_batch, so_far in ((first, 1), (last, 2)):
        workload.discriminator_loss(batch, micro_batch)
        assert len(passes) == so_far
    for micro_batch, so_far in ((first, 3), (last, 3)):  # only those of the last micro-batch are still there
        workload.generator_loss(batch, micro_batch)
        assert len(passes) == so_far
    assert workload.newest.kept is None


def test_without_the_adversary_there_is_one_phase_and_one_network() -> None:
    workload = pix2pix(adversarial=0)
    assert [phase.name for phase in workload.phases] == ["generator"]
    assert workload.discriminator is None
    loss, scalars = workload.generator_loss({"image": images()}, draws())
    assert scalars.keys() == {"l1"}
    assert float(loss.detach()) == pytest.approx(200 * float(scalars["l1"]), rel=1e-5)


def test_the_noise_is_dropout_that_stays_at_test() -> None:
    workload = pix2pix().eval()
    inputs = workload.input_of(images())
    one, same, other = (workload.translate(inputs, draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    exported = workload.inference()  # has no draws, and so no noise
    assert torch.equal(exported(inputs), exported(inputs))
    assert torch.equal(pix2pix(dropout=0).eval().translate(inputs, draws(0)), exported(inputs))


def test_given_pairs_are_taken_as_they_are() -> None:
    workload = pix2pix(replace(DATA, paired=True), pairs="given")
    batch = {"image": images(), "input": -images()}
    assert workload.pair(batch) == (batch["input"], batch["image"])
    assert torch.equal(workload.input_of(images()), images())


# What inputs are derived


def test_the_edges_of_a_square_are_its_outline_and_do_not_depend_on_the_batch() -> None:
    square = -torch.ones(1, 1, 16, 16)
    square[:, :, 4:12, 4:12] = 1
    drawn = edges(square)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    lines = (drawn[0, 0] < 0).nonzero()
    assert int(lines.min()) in (3, 4)
    assert int(lines.max()) in (11, 12)
    inside = drawn[0, 0, 6:10, 6:10]
    assert (inside == 1).all()
    assert (drawn[0, 0, :2] == 1).all()
    assert 24 <= len(lines) <= 36  # a pixel wide
    assert (edges(torch.full((1, 1, 8, 8), 0.3)) == 1).all()
    assert torch.equal(edges(images())[2:3], edges(images()[2:3]))


def test_an_input_is_the_image_in_grey_or_in_fewer_pixels() -> None:
    colour = replace(DATA, channels=3)
    grey = pix2pix(colour, pairs="grey").input_of(images(channels=3))
    assert grey.shape == (BATCH, 3, 16, 16)
    assert torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(
        grey[0, 0, 0, 0], (images(channels=3)[0, :, 0, 0] * torch.tensor([0.299, 0.587, 0.114])).sum()
    )
    low = pix2pix(pairs="low_resolution", factor=4).input_of(images())
    torch.testing.assert_close(low[:, :, ::4, ::4], F.avg_pool2d(images(), 4))
    assert torch.equal(low[:, :, 1, 2], low[:, :, 0, 0])


# What it refuses


@pytest.mark.parametrize(
    ("data", "options", "mistake"),
    [
        (
            DATA, {"pairs": "given"},
            "workload.pairs: noise holds no pairs: derive an input from each image by edges, grey or low_resolution, "
            "or use data.name pairs",
        ),
        (
            replace(DATA, paired=True), {"pairs": "edges"},
            "workload.pairs: noise holds pairs, so nothing is left to derive: use given",
        ),
        (DATA, {"pairs": "grey"}, "workload.pairs: grey needs colours to make, and noise is grey: use edges"),
        (
            DATA, {"pairs": "low_resolution", "factor": 3},
            "workload.factor: 3 is no divisor of data.size, 16: use one",
        ),
        (
            replace(DATA, size=28), {},
            "data.size: a U-Net cannot make images of 28 pixels: use 1, 3 or 5 times a power of two, such as 32, 64, "
            "96 or 256, or set workload.depth, to 2 at most",
        ),
        (
            replace(DATA, size=33), {},
            "data.size: a U-Net cannot make images of 33 pixels: use 1, 3 or 5 times a power of two, such as 32, 64, "
            "96 or 256",
        ),
        (
            replace(DATA, size=48), {"depth": 5},
            "workload.depth: images of 48 pixels cannot be halved 5 times: use 4 or less, or a data.size that is a "
            "multiple of 32",
        ),
        (
            replace(DATA, size=8), {"patch_layers": 2},
            "workload.patch_layers: 2 halvings leave no patch of images of 8 pixels: use 1 or less, or a larger "
            "data.size",
        ),
        (
            replace(DATA, size=4), {},
            "workload.patch_layers: 1 halvings leave no patch of images of 4 pixels: use a data.size of 6 or more",
        ),
        (
            DATA, {"l1": 0, "adversarial": 0},
            "workload.l1: 0 leaves nothing to learn where workload.adversarial is 0 too: raise one",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_be(data: ImageDescription, options: dict[str, Any], mistake: str) -> None:
    with pytest.raises(ValueError) as error:
        pix2pix(data, **options)
    assert mistake in str(error.value)
