"""StyleGAN2's parts, each held against its formula written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.options import OptimizerOptions
from trainer.data.description import ImageDescription
from trainer.gan.ada import augment
from trainer.nn.dropout import drawing
from trainer.randomness import Draws
from trainer.workloads import stylegan
from trainer.workloads.stylegan import Blur, ModulatedConv, Noise, Options, StyleGan

CPU = torch.device("cpu")


def description(size: int) -> ImageDescription:
    return ImageDescription("fake", 64, 64, 1, size, tuple("0123456789"), (0.5,), (0.5,))


def workload(size: int = 8, dtype: torch.dtype = torch.float64, **options: Any) -> StyleGan:
    torch.manual_seed(0)
    small = {"name": "stylegan", "latent": 8, "width": 4, "max_width": 8, "mapping_layers": 2, "deviation_group": 2}
    made = StyleGan(Options(**{**small, **options}), description(size), OptimizerOptions())
    return made.to(dtype)


def draws(step: int = 0, rows: slice = slice(0, 6), dtype: torch.dtype = torch.float64) -> Draws:
    return Draws(0, (step, "some phase", 0, 0), rows, CPU, dtype)


def batch(size: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    images = torch.randn(6, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype).clamp(-1, 1)
    return {"image": images, "label": torch.arange(6)}


# The generator


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [True, False])
def test_a_modulated_convolution_is_one_with_a_weight_for_each_sample(up: bool, demodulate: bool) -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(5, 3, 4, 3, up, demodulate, gain=1.3).double()
    x, w = torch.randn(6, 3, 8, 8).double(), torch.randn(6, 5).double()
    outputs = []
    for image, style in zip(x, layer.style(w), strict=True):
        weight = layer.conv.weight * style[None, :, None, None]
        if demodulate:
            weight = 1.3 * weight / weight.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()
        if up:
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 4
            spread = F.conv_transpose2d(image[None], weight.transpose(0, 1), stride=2)
            outputs.append(F.conv2d(spread, taps.outer(taps).expand(4, 1, 4, 4), padding=1, groups=4))
        else:
            outputs.append(F.conv2d(image[None], weight, padding=1))
    torch.testing.assert_close(layer(x, w), torch.cat(outputs))


def test_demodulation_gives_unit_variance_whatever_the_style() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(16, 32, 32, 3)
    nn.init.constant_(layer.style.bias, 7.0)
    x, w = torch.randn(32, 32, 16, 16), 3 * torch.randn(32, 16)
    inside = layer(x, w)[:, :, 1:-1, 1:-1]
    assert float(inside.detach().var()) == pytest.approx(1, abs=0.03)
    layer.demodulate = False
    assert float(layer(x, w).detach().var()) > 20


def test_every_weight_has_the_scale_of_its_fan_in_and_moves_at_one_rate() -> None:
    layer = stylegan.equalised(nn.Linear(256, 300), rate=0.01)
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.randn(8, 256)).sum().backward()
    optimizer.step()
    moved = (layer.weight - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * 0.01 * math.sqrt(2 / 256)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(layer.bias.abs(), torch.full_like(layer.bias, 0.1 * 0.01), rtol=1e-3, atol=1e-6)


def test_the_filter_keeps_a_constant_and_halves_by_one_three_three_one() -> None:
    line = torch.arange(16.0).square().expand(1, 2, 16, 16)
    halved = Blur(1, 2)(line)[0, 0, 3]
    expected = [(line[0, 0, 0, 2 * i - 1 : 2 * i + 3] * torch.tensor([1, 3, 3, 1])).sum() / 8 for i in range(1, 7)]
    torch.testing.assert_close(halved[1:-1], torch.stack(expected))
    torch.testing.assert_close(Blur(2)(torch.ones(1, 3, 9, 9))[:, :, 2:-2, 2:-2], torch.ones(1, 3, 6, 6))


def test_styles_are_of_one_latent_up_to_a_crossover_and_of_another_after_it() -> None:
    network = workload(32, style_mixing=0.75).generator
    rows = slice(0, 512)
    z = draws(rows=rows).normal("z", (8,))
    plain = network.mapping(z)
    with drawing(network, draws(rows=rows)):
        styles = network.styles(z)
    own = (styles == plain[:, None]).all(2)
    assert styles.shape == (512, 8, 8)
    assert own[:, 0].all()
    assert (own[:, 1:] <= own[:, :-1]).all(), "a layer after the crossover has its own style again"
    assert float((~own[:, -1]).double().mean()) == pytest.approx(0.75, abs=0.05)
    assert set(own.sum(1).tolist()) == set(range(1, 9))
    with drawing(network, draws(rows=slice(100, 110))):
        torch.testing.assert_close(network.styles(z[100:110]), styles[100:110])
    torch.testing.assert_close(network.styles(z), plain[:, None].expand(-1, 8, -1))


def test_noise_is_drawn_while_training_and_the_same_ever_after() -> None:
    noise = Noise(4, "noise").double()
    x = torch.zeros(6, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(noise(x), x)
    nn.init.constant_(noise.strength, 2.0)
    torch.testing.assert_close(noise(x), (2 * noise.constant).expand_as(x))
    with drawing(noise, draws()):
        drawn = noise(x)
    torch.testing.assert_close(drawn, 2 * draws().normal("noise", (1, 4, 4)).expand_as(drawn))


@pytest.mark.parametrize(("size", "expected"), [(8, [8, 4]), (32, [8, 8, 8, 4]), (256, [8] * 6 + [4])])
def test_the_channels_double_up_to_the_most(size: int, expected: list[int]) -> None:
    options = workload(8).options
    assert stylegan.widths(options, description(size)) == expected


@pytest.mark.parametrize("size", [1, 4, 28, 48, 2048])
def test_sizes_that_do_not_halve_to_four(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^data.size: stylegan cannot make images of {size} pixels: use a power"):
        workload(size)


# The discriminator


def test_the_deviation_is_that_of_each_group_of_consecutive_samples() -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    channel = stylegan.with_deviation(x, 2)[:, 3]
    for first in (0, 2, 4):
        expected = x[first : first + 2].std(0, correction=0).mean()
        torch.testing.assert_close(channel[first : first + 2], expected.expand(2, 4, 4), rtol=1e-5, atol=1e-6)
    assert torch.equal(stylegan.with_deviation(x, 2)[:, :3], x)


# Penalties


def test_the_path_length_and_its_gradient() -> None:
    """Of a linear map from styles (6, 2, 3) to images: |J^T y| can be written out."""
    torch.manual_seed(0)
    matrix = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    styles = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def lengths(matrix: Tensor) -> Tensor:
        return stylegan.path_lengths(torch.einsum("bld,ldchw->bchw", styles, matrix), styles, draws())

    noise = draws().normal("path_length", (1, 4, 4)) / 4
    by_hand = torch.einsum("bchw,ldchw->bld", noise, matrix).square().sum(2).mean(1).sqrt()
    torch.testing.assert_close(lengths(matrix), by_hand)
    assert torch.autograd.gradcheck(lambda matrix: (lengths(matrix) - 0.5).square().mean(), matrix)


def test_the_mean_path_length_begins_at_the_first_and_then_forgets_slowly() -> None:
    made = workload(ada_target=0, path_length_every=4)
    for step, length in ((0, 3.0), (1, None), (4, 5.0)):
        made.after_step(step, {} if length is None else {"path_length": torch.tensor(length)})
    assert float(made.mean_path_length) == 4.0
    made.after_step(100_000, {"path_length": torch.tensor(104.0)})
    assert float(made.mean_path_length) == pytest.approx(5.0)


def test_the_penalty_is_of_the_images_before_their_augmentation() -> None:
    made = workload(r1=3.0, r1_every=4)
    made.ada_p.fill_(0.8)
    images = batch()["image"].requires_grad_()
    logits = made.discriminator(augment(images, 0.8, draws(4), "real"))
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    loss, scalars = made.discriminator_loss(batch(), draws(4))
    torch.testing.assert_close(scalars["r1"], 4 * 3 / 2 * gradient.square().sum((1, 2, 3)).mean())
    loss.backward()  # through the augmentation, twice
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.discriminator.parameters())
    assert "r1" not in made.discriminator_loss(batch(), draws(5))[1]


def test_settings_of_adam_make_up_for_the_steps_without_a_penalty() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    adam = torch.optim.Adam(parameters, lr=0.0025, betas=(0.0, 0.99))
    stylegan.correct_for_lazy_penalty(adam, 16)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.0025 * 16 / 17)
    assert adam.param_groups[0]["betas"] == pytest.approx((0.0, 0.99 ** (16 / 17)))
    stylegan.correct_for_lazy_penalty(adam, 0)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.0025 * 16 / 17)
    stylegan.correct_for_lazy_penalty(torch.optim.SGD(parameters, lr=1.0), 4)


def test_penalties_are_in_full_precision_under_autocast() -> None:
    values = []
    for enabled in (True, False):
        made = workload(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first, scalars = made.discriminator_loss(batch(dtype=torch.float32), draws(dtype=torch.float32))
            second, more = made.generator_loss(batch(dtype=torch.float32), draws(dtype=torch.float32))
        (first + second).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in made.generator.parameters())
        values.append({**scalars, **more})
    for name in ("r1", "path_length"):
        torch.testing.assert_close(values[0][name], values[1][name])
    assert not torch.equal(values[0]["generator_loss"], values[1]["generator_loss"]), "autocast did nothing"


# ADA


@pytest.mark.parametrize(
    ("sign", "moves"), [(0.9, [0.25, 0.5, 0.75, 1.0, 1.0]), (0.3, [0.0]), (0.6, [0.0]), (0.6 + 1e-7, [0.0])]
)
def test_the_probability_follows_the_sign_of_the_logits_and_stays_one(sign: float, moves: list[float]) -> None:
    made = workload(ada_steps=4)
    for step, expected in enumerate(moves):
        made.after_step(step, {"real_sign": torch.tensor(sign)})
        assert float(made.ada_p) == expected


def test_the_discriminator_sees_augmented_images_of_both_kinds() -> None:
    made = workload()
    seen: list[Tensor] = []
    made.discriminator.register_forward_pre_hook(lambda _, views: seen.append(views[0].detach()))
    losses = {}
    for p in (0.0, 1.0):
        made.ada_p.fill_(p)
        made.discriminator_loss(batch(), draws(1))
        losses[p] = made.generator_loss(batch(), draws(1))[0]
    for plain, augmented in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(augmented, augment(plain, 1.0, draws(1), "real" if plain is seen[0] else "fake"))
    losses[1.0].backward()
    assert all(p.grad is not None for p in made.generator.parameters())


# Samples


def test_truncation_pulls_styles_to_their_mean() -> None:
    made = workload().eval()
    whole = made.samples(draws())
    torch.testing.assert_close(made.samples(draws(), truncation=1.0), whole)
    nearly_mean = made.samples(draws(), truncation=1e-6)
    assert float((nearly_mean - nearly_mean[:1]).abs().max()) < 1e-4 < float((whole - whole[:1]).abs().max())
    mean = made.inference().synthesise(made.mean_style().expand(1, made.generator.style_count, -1))  # type: ignore[operator]
    torch.testing.assert_close(nearly_mean[:1], mean.clamp(-1, 1), rtol=0, atol=1e-4)


def test_a_class_has_images_and_a_logit_of_its_own() -> None:
    made = workload(conditional=True).eval()
    threes, by_turns = made.samples(draws(), label=3), made.samples(draws())
    torch.testing.assert_close(by_turns[3], threes[3])
    assert not torch.allclose(by_turns[4], threes[4])
    assert not torch.allclose(*(made.samples(draws(), label, truncation=0.5) for label in (3, 4)))
    images = batch()["image"]
    every = torch.stack([made.discriminator(images, torch.full((6,), label)) for label in range(10)], 1)
    torch.testing.assert_close(made.discriminator(images, torch.arange(6)), every[:, :6].diag())
    assert len(every[0].unique()) == 10


def test_a_mixed_image_has_the_coarse_styles_of_its_row_and_the_fine_ones_of_its_column() -> None:
    made = workload(32).eval()
    with torch.no_grad():
        grid = made.mixed(draws(), 2, 3)
    images = grid.images.unflatten(0, (3, 4))
    assert (images[0, 0] == 1).all()
    network = made.inference()
    assert isinstance(network, stylegan.Generator)
    styles = network.styles(made.latents(draws().of(5)))
    torch.testing.assert_close(images[0, 1:], network.synthesise(styles[:3]).detach().float() / 2 + 0.5)
    torch.testing.assert_close(images[1:, 0], network.synthesise(styles[3:]).detach().float() / 2 + 0.5)
    crossed = network.synthesise(torch.cat([styles[4:, :4], styles[1:2, 4:]], 1))
    torch.testing.assert_close(images[2, 2], crossed[0].detach().float() / 2 + 0.5)


def test_the_walk_ends_where_it_began_and_is_small_for_large_images() -> None:
    made = workload(128).eval()
    with torch.no_grad():
        frames = made.walk(draws(), 1).frames
    assert frames.shape == (32, 1, 1, 64, 64)
    steps = (frames - frames.roll(-1, 0)).abs().mean((1, 2, 3, 4))
    assert float(steps[-1]) < 3 * float(steps.median())
