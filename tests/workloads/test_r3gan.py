"""R3GAN: its loss of pairs, its penalties, what its blocks begin as, and what moves over the ramp."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config.options import OptimizerOptions
from trainer.data.description import Batch, ImageDescription
from trainer.randomness import Draws
from trainer.workloads.r3gan import Block, Options, R3Gan, Resample, build

DATA = ImageDescription("noise", 16, 8, 3, 16, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3)


def r3gan(optimizer: str = "adam", data: ImageDescription = DATA, **options: object) -> R3Gan:
    torch.manual_seed(0)
    chosen = Options.model_validate({"name": "r3gan", "width": 8, "latent": 6, "group_channels": 4, **options})
    workload = build(chosen, data, OptimizerOptions.model_validate({"name": optimizer, "betas": (0.0, 0.9)}))
    assert isinstance(workload, R3Gan)
    for block in workload.modules():
        if isinstance(block, Block):
            torch.nn.init.normal_(block.narrow.weight, 0, 0.3)  # so that all of a block counts
    return workload.double()


def draws(step: int = 0) -> Draws:
    return Draws(0, (step, "discriminator", 0, 0), slice(0, 6), torch.device("cpu"), torch.float64)


def batch() -> Batch:
    images = torch.rand(6, *DATA.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    return {"image": images, "label": torch.tensor([0, 1, 2, 2, 1, 0]), "id": torch.arange(6)}


def squared_norm_by_hand(workload: R3Gan, images: Tensor, labels: Tensor, name: str) -> Tensor:
    """Of each image's gradient on its own, through what the discriminator sees of it."""
    images = images.detach().requires_grad_()
    scores = workload.discriminator(*workload.augment_inputs((images,), draws(), name), labels)
    gradients = [torch.autograd.grad(score, images, retain_graph=True)[0] for score in scores]
    return torch.stack([gradient[row].square().sum() for row, gradient in enumerate(gradients)])


@pytest.mark.parametrize("augmentation", [{}, {"augment": "color,translation"}, {"augment_p": 0.8, "ramp": 0}])
def test_the_discriminator_has_the_loss_of_pairs_and_both_penalties(augmentation: dict[str, object]) -> None:
    workload, data = r3gan(gamma=(0.4, 0.4), **augmentation), batch()
    loss, scalars = workload.discriminator_loss(data, draws())
    fakes = workload.generate_fakes(data, draws()).views[0].detach()
    real, fake = (
        workload.discriminator(*workload.augment_inputs((x,), draws(), name), data["label"])
        for x, name in ((data["image"], "real"), (fakes, "fake"))
    )
    pairs = F.softplus(-(real - fake)).mean()
    r1, r2 = (
        0.2 * squared_norm_by_hand(workload, x, data["label"], name).mean()
        for x, name in ((data["image"], "real"), (fakes, "fake"))
    )
    torch.testing.assert_close(loss, pairs + r1 + r2)
    torch.testing.assert_close(scalars["discriminator_loss"], pairs.detach())
    torch.testing.assert_close((scalars["r1"], scalars["r2"]), (r1.detach(), r2.detach()))
    assert min(float(r1.detach()), float(r2.detach())) > 1e-3


def test_the_penalties_move_the_weights_as_their_definition_says() -> None:
    workload, data = r3gan(gamma=(2.0, 2.0)), batch()
    weights = list(workload.discriminator.parameters())
    loss, _ = workload.discriminator_loss(data, draws())
    gradients = torch.autograd.grad(loss, weights)
    step, moved = 1e-5, []
    for sign in (1, -1):  # along the gradient itself
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(sign * step * gradient)
        moved.append(float(workload.discriminator_loss(data, draws())[0].detach()))
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(sign * step * gradient)
    slope = sum(float(gradient.square().sum()) for gradient in gradients)
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_each_real_image_is_held_against_its_own_fake() -> None:
    workload, data = r3gan(gamma=(0.0, 0.0)), batch()
    other = {name: value.roll(1, 0) for name, value in data.items()}  # other pairs, of the same images
    fakes = workload.detached_fakes(data, draws())
    workload.detached_fakes = lambda *_: fakes  # type: ignore[method-assign]
    workload.generate_fakes = lambda *_: fakes  # type: ignore[method-assign]
    for loss in (workload.discriminator_loss, workload.generator_loss):
        first, second = (float(loss(chosen, draws())[0].detach()) for chosen in (data, other))
        assert first != pytest.approx(second, rel=1e-4)


def test_the_generators_loss_is_that_of_pairs_the_other_way_round() -> None:
    workload, data = r3gan(), batch()
    loss, _ = workload.generator_loss(data, draws())
    fakes = workload.generate_fakes(data, draws()).views[0]
    real, fake = (workload.discriminator(x, data["label"]) for x in (data["image"], fakes))
    torch.testing.assert_close(loss, F.softplus(-(fake - real)).mean())


def test_blocks_begin_as_the_identity_and_the_rest_keeps_the_variance() -> None:
    chosen = Options(name="r3gan", width=256, full_width_until=16)
    torch.manual_seed(0)
    workload = build(chosen, DATA, OptimizerOptions())
    for network in (workload.generator, workload.discriminator):
        blocks = [block for block in network.modules() if isinstance(block, Block)]
        assert len(blocks) == 6  # two at 4, 8 and 16 pixels
        x = torch.randn(2, 256, 4, 4)
        assert all(torch.equal(block(x), x) for block in blocks)
        gain = math.sqrt(2 / 1.04) * 6**-0.25
        assert float(blocks[0].widen.weight.detach().std()) == pytest.approx(gain / 256**0.5, rel=0.02)
        assert float(blocks[0].mix.weight.detach().std()) == pytest.approx(gain / (16 * 9) ** 0.5, rel=0.02)
        assert blocks[0].mix.groups == 32
    images = workload.generator(torch.randn(64, 64), torch.arange(64) % 3).detach()
    assert 0.3 < float(images.std()) < 3
    named = [name for name, _ in workload.named_parameters() if name.endswith("bias") and "average" not in name]
    assert all(name.endswith(("widen.bias", "mix.bias")) for name in named)
    assert len(named) == 2 * 2 * 6


def test_resampling_spreads_a_pixel_as_the_filter_says() -> None:
    x = torch.zeros(1, 2, 6, 6)
    x[0, 0, 3, 3] = 1
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    up = Resample(2, 2, up=True)(x)
    torch.testing.assert_close(up[0, 0, 5:9, 5:9], torch.outer(taps, taps) / 16)
    assert float(up.sum()) == pytest.approx(4)
    assert not up[0, 1].any()
    torch.testing.assert_close(Resample(2, 2, up=False)(torch.ones(1, 2, 8, 8))[0, :, 1:3, 1:3], torch.ones(2, 2, 2))


def test_what_moves_over_the_ramp_follows_half_a_cosine_and_then_stays() -> None:
    workload = r3gan(gamma=(1.0, 0.2), beta2=0.99, ramp=100, ema=0.99)
    options = workload.options
    assert [options.ramped(step, *options.gamma) for step in (0, 50, 100, 1000)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert options.ramped(25, 0, 1) == pytest.approx(0.5 - 0.5 * math.sqrt(0.5))
    assert r3gan(ramp=0).options.progress(0) == 1
    assert torch.equal(*(r3gan(augment_p=p).augment_inputs((batch()["image"],), draws(), "real")[0] for p in (0, 1)))
    seen = []
    for step in (0, 50, 1000):
        workload.discriminator_loss(batch(), draws(step))
        seen += [group["betas"] for phase in workload.phases for group in phase.optimizer.param_groups]
    assert seen == [(0.0, 0.9)] * 2 + [pytest.approx((0.0, 0.945))] * 2 + [pytest.approx((0.0, 0.99))] * 2
    assert workload.decay(0) == 0
    half_life = [math.log(0.5) / math.log(workload.decay(step)) for step in (50, 100, 1000)]
    assert half_life == pytest.approx([half_life[2] / 2, half_life[2], math.log(0.5) / math.log(0.99)])
    workload.after_step(10_000, {})
    assert workload.average is not None
    assert workload.average.decay == 0.99


def test_without_a_last_beta2_that_of_the_optimizer_stays() -> None:
    workload = r3gan()
    workload.discriminator_loss(batch(), draws(10_000))
    assert {group["betas"] for phase in workload.phases for group in phase.optimizer.param_groups} == {(0.0, 0.9)}


def test_a_larger_image_gets_fewer_channels_where_it_is_asked_for() -> None:
    workload = r3gan(full_width_until=4, width=16)
    widths = [block.narrow.out_features for block in workload.generator.modules() if isinstance(block, Block)]
    assert widths == [16, 16, 8, 8, 4, 4]
    odd = ImageDescription("noise", 16, 8, 1, 56, ("a", "b"), (0.5,), (0.25,))
    assert r3gan(data=odd, width=16).generator(torch.randn(2, 6).double(), torch.tensor([0, 1])).shape == (2, 1, 56, 56)


def test_it_runs_under_autocast_with_scores_in_full_precision() -> None:
    workload = r3gan(augment_p=0.9, ramp=0).float()
    narrow = Draws(0, (0, "discriminator", 0, 0), slice(0, 6), torch.device("cpu"))
    data = {name: value.float() if value.is_floating_point() else value for name, value in batch().items()}
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = workload.discriminator_loss(data, narrow)
            assert workload.discriminator(data["image"], data["label"]).dtype == torch.float32
            losses += [loss, workload.generator_loss(data, narrow)[0]]
        losses[-2].backward()
        losses[-1].backward()
    rough, exact = ([float(loss.detach()) for loss in part] for part in (losses[2:], losses[:2]))
    assert rough == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        (
            {"width": 5},
            r"workload\.group_channels: 4 do not divide the 10 channels in a block at 4 pixels: use a divisor",
        ),
        (
            {"width": 6, "full_width_until": 4, "group_channels": 1},
            r"workload\.width: 6 channels cannot be halved down to those at 16 pixels: use a multiple of 4",
        ),
        ({"gamma": (1, -1)}, r"workload\.gamma: \[1\.0, -1\.0\] has a negative weight: use zero or more"),
        ({"optimizer": "sgd", "beta2": 0.99}, r"workload\.beta2: sgd has none: remove it, or use optimizer\.name adam"),
        ({"r1": 1.0}, r"workload\.r1: 1\.0 is no setting of r3gan, whose penalties .* weight gamma: remove it"),
        ({"discriminator_steps": 2}, r"workload\.discriminator_steps: 2 is no setting of r3gan, whose networks take "),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, object], mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake):
        r3gan(**options)  # type: ignore[arg-type]
