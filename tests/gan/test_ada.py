"""ADA's augmentation: each operation does what it says, as often as it says, and can be differentiated twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.gan import ada
from trainer.gan.ada import augment
from trainer.randomness import Draws

MANY = 4096


def draws(rows: slice = slice(0, 12), step: int = 3) -> Draws:
    return Draws(0, (step, "discriminator", 0, 0), rows, torch.device("cpu"), torch.float64)


def images(count: int = 12, channels: int = 3, size: int = 8) -> Tensor:
    shape = (count, channels, size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


class Only(ada._Chances):
    """Chances of some operations alone."""

    def __init__(self, operations: tuple[str, ...], p: float = 1.0, count: int = MANY) -> None:
        super().__init__(p, draws(slice(0, count)), "real")
        self.operations = operations

    def _where(self, operation: str, values: Tensor, p: Tensor | float) -> Tensor:
        return super()._where(operation, values, p if operation.startswith(self.operations) else 0.0)


def alike(image: Tensor, batch: Tensor) -> Tensor:
    """Which images of a batch equal one."""
    return (batch - image).abs().flatten(1).amax(1) < 1e-9


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("p", [0.0, torch.zeros(())])
def test_nothing_happens_at_a_probability_of_zero(channels: int, p: float | Tensor) -> None:
    x = images(channels=channels)
    torch.testing.assert_close(augment(x, p, draws(), "real"), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_any_split_over_ranks_gives_the_same_images(channels: int) -> None:
    x = images(channels=channels)
    whole = augment(x, 0.6, draws(), "real")
    parts = [augment(x[rows], 0.6, draws(rows), "real") for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    assert not torch.equal(augment(x, 0.6, draws(), "fake"), whole)
    assert not torch.equal(augment(x, 0.6, draws(step=4), "real"), whole)


def test_flips_and_quarter_turns_are_exact_and_all_equally_likely() -> None:
    x = images(1)[0]
    moved = ada._move(x.expand(MANY, -1, -1, -1), Only(("flip", "quarters")))
    shares = [
        float(alike(flipped.rot90(turns, (1, 2)), moved).double().mean())
        for flipped in (x, x.flip(2))
        for turns in range(4)
    ]
    assert sum(shares) == 1
    assert shares == pytest.approx([1 / 8] * 8, abs=0.02)


def test_a_translation_is_whole_pixels_up_to_an_eighth_and_mirrors_the_edge() -> None:
    x = images(1, 1, 16)[0]
    moved = ada._move(x.expand(MANY, -1, -1, -1), Only(("translation",)))
    mirrored = torch.tensor([1, 0, *range(16), 15, 14])
    padded = x[:, mirrored][:, :, mirrored]
    shares = [
        float(alike(padded[:, down : down + 16, right : right + 16], moved).double().mean())
        for down in range(5)
        for right in range(5)
    ]
    assert sum(shares) == 1
    assert shares == pytest.approx([1 / 25] * 25, abs=0.02)


def of_plane(operations: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The map (N, 2, 2) and the shift (N, 2), in sides of the image, of some operations: how they move a ramp."""
    along = torch.linspace(-7 / 8, 7 / 8, 8, dtype=torch.float64)
    ramp = torch.stack(torch.meshgrid(along, along, indexing="xy"))[None]
    # Four pixels in the middle are not near an edge, where the lookup is mirrored, as long as nothing moves far.
    moved = ada._move(ramp.expand(MANY, -1, -1, -1), Only(operations))[:, :, 3:5, 3:5]
    right, down = moved[..., 1] - moved[..., 0], moved[:, :, 1] - moved[:, :, 0]
    return torch.stack([right.mean(2), down.mean(2)], 2) * 4, moved.mean((2, 3)) / 2


def test_scaling_is_log_normal_and_stretching_keeps_the_area() -> None:
    scaled, shift = of_plane(("scale",))
    octaves = scaled[:, 0, 0].log2()
    assert float(octaves.std()) == pytest.approx(0.2, rel=0.05)
    assert float(octaves.mean()) == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(scaled, scaled[:, :1, :1] * torch.eye(2, dtype=torch.float64))
    assert shift.abs().max() < 1e-9
    stretched, _ = of_plane(("stretch",))
    assert float(stretched[:, 0, 0].log2().std()) == pytest.approx(0.2, rel=0.05)
    torch.testing.assert_close(torch.linalg.det(stretched), torch.ones(MANY, dtype=torch.float64))


@pytest.mark.parametrize("which", ["rotation/1", "rotation/2", "rotation"])
def test_rotations_are_by_any_angle(which: str) -> None:
    turned, _ = of_plane((which,))
    identity = torch.eye(2, dtype=torch.float64).expand(MANY, -1, -1)
    torch.testing.assert_close(turned @ turned.mT, identity)
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0])
    assert float(angles.std()) == pytest.approx(math.pi / math.sqrt(3), rel=0.05)


def test_one_of_two_rotations_takes_place_with_probability_p() -> None:
    turned = ada._move(images(1, 1).expand(MANY, -1, -1, -1), Only(("rotation",), 0.3))
    still = alike(images(1, 1)[0], turned)
    assert float(still.double().mean()) == pytest.approx(0.7, abs=0.02)


def test_shifts_are_by_fractions_of_pixels() -> None:
    matrix, shift = of_plane(("shift",))
    near = shift.abs().amax(1) < 1 / 8  # further ones see the mirrored edge
    torch.testing.assert_close(matrix[near], torch.eye(2, dtype=torch.float64).expand(int(near.sum()), -1, -1))
    normal = torch.distributions.Normal(0.0, 1 / 8)
    inside = float((normal.cdf(torch.tensor(1 / 8)) - normal.cdf(torch.tensor(-1 / 8))) ** 2)
    assert float(near.double().mean()) == pytest.approx(inside, abs=0.02)


def recoloured(operations: tuple[str, ...], channels: int = 3) -> tuple[Tensor, Tensor]:
    """Some pixels before and after: (N, C, 4)."""
    x = images(1, channels, 2).expand(MANY, -1, -1, -1)
    return x.flatten(2), ada._recolour(x, Only(operations)).flatten(2)


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_adds_and_contrast_multiplies(channels: int) -> None:
    before, after = recoloured(("brightness",), channels)
    added = after - before
    torch.testing.assert_close(added, added[:, :1, :1].expand_as(added))
    assert float(added[:, 0, 0].std()) == pytest.approx(0.2, rel=0.05)
    before, after = recoloured(("contrast",), channels)
    times = after / before
    torch.testing.assert_close(times, times[:, :1, :1].expand_as(times))
    assert float(times[:, 0, 0].log2().std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_luma_is_inverted_in_half_of_the_images(channels: int) -> None:
    before, after = recoloured(("luma",), channels)
    inverted = before - 2 * before.mean(1, keepdim=True)
    other = alike(inverted[0], after)
    assert (other | alike(before[0], after)).all()
    assert float(other.double().mean()) == pytest.approx(0.5, abs=0.02)


def test_hue_turns_around_grey_and_saturation_moves_away_from_it() -> None:
    before, after = recoloured(("hue",))
    torch.testing.assert_close(after.mean(1), before.mean(1))
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    grey = before.mean(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(before - grey, after - grey, dim=1)
    assert float(cosine.mean()) == pytest.approx(0, abs=0.03)
    assert float(cosine.std()) == pytest.approx(math.sqrt(0.5), rel=0.05)
    before, after = recoloured(("saturation",))
    times = (after - grey) / (before - grey)
    torch.testing.assert_close(times, times[:, :1, :1].expand_as(times))
    assert float(times[:, 0, 0].log2().std()) == pytest.approx(1, rel=0.05)


OPERATIONS = ("flip", "quarters", "translation", "scale", "stretch", "shift", "brightness", "contrast", "luma", "hue",
              "saturation")  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_takes_place_with_probability_p(operation: str) -> None:
    x = images(1)[0]
    chances = Only((operation,), 0.25)
    same = alike(x, ada._recolour(ada._move(x.expand(MANY, -1, -1, -1), chances), chances))
    neutral = {"flip": 1 / 2, "quarters": 1 / 4, "translation": 1 / 9, "luma": 1 / 2}.get(operation, 0)
    assert float(same.double().mean()) == pytest.approx(1 - 0.25 * (1 - neutral), abs=0.02)


def test_autocast_moves_no_image_elsewhere() -> None:
    exact = augment(images(), 0.8, draws(), "real")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images(), 0.8, draws(), "real"), exact)


def test_gradients_are_right_twice() -> None:
    x = images(2, size=3).requires_grad_()

    def augmented(x: Tensor) -> Tensor:
        return augment(x, 0.8, draws(slice(0, 2)), "real").sin()

    assert torch.autograd.gradcheck(augmented, x)
    assert torch.autograd.gradgradcheck(augmented, x)


def test_the_adjoint_in_a_fixed_order_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(2)
    grid = torch.randn((3, 6, 5, 2), generator=generator, dtype=torch.float64) * 2  # far beyond the edges too
    grid[0, 0, 0], grid[0, 0, 1] = torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 3.0])  # and on them
    gradient = torch.randn((3, 2, 6, 5), generator=generator, dtype=torch.float64)
    shape = torch.Size((3, 2, 7, 9))
    theirs = torch.ops.aten.grid_sampler_2d_backward(
        gradient, torch.zeros(shape, dtype=torch.float64), grid, *ada._BILINEAR_REFLECTED, output_mask=[True, False]
    )[0]
    torch.testing.assert_close(ada._spread(gradient, grid, shape), theirs, rtol=0, atol=1e-12)
