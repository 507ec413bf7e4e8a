"""Scores of pairs against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.metrics import pairs


def images(count: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth ones in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=generator, dtype=torch.float64) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def scores(outputs: Tensor, truths: Tensor) -> dict[str, float]:
    return pairs.report(pairs.totals(outputs, truths))


def test_a_perfect_copy() -> None:
    assert scores(images(), images()) == pytest.approx({"l1": 0, "psnr": 100, "ssim": 1, "sharpness": 1})


def test_a_constant_error_has_the_l1_and_the_decibels_that_it_should_have() -> None:
    truths = images() * 0.5
    result = scores(truths + 0.2, truths)  # a tenth of the range
    assert result["l1"] == pytest.approx(0.1)
    assert result["psnr"] == pytest.approx(20)
    assert result["sharpness"] == pytest.approx(1)


def test_psnr_is_the_mean_of_the_images_own() -> None:
    truths = torch.zeros(2, 1, 12, 12)
    outputs = truths + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert scores(outputs, truths)["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-4)


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    truths = images(size=32)
    blurred = F.avg_pool2d(F.pad(truths, [2] * 4, mode="replicate"), 5, 1)
    noisy = truths + 0.1 * torch.randn(truths.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert scores(blurred, truths)["sharpness"] < 0.9
    assert scores(noisy, truths)["sharpness"] > 1.5
    flat = torch.zeros_like(truths)
    assert scores(flat, truths)["sharpness"] == 0
    assert math.isfinite(scores(truths, flat)["sharpness"])


def test_ssim_is_that_of_the_paper() -> None:
    """By its definition: Gaussian windows of 11 pixels and deviation 1.5 around every pixel, mirrored at the edges."""
    made, true = (images(1, 14, seed)[:, :1] / 2 + 0.5 for seed in (0, 1))
    line = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    weights = (line[:, None] * line / line.sum() ** 2).flatten()

    def mean(values: Tensor) -> Tensor:
        return F.unfold(F.pad(values, [5] * 4, mode="reflect"), 11)[0].T @ weights

    a, b = mean(made), mean(true)
    variances = mean(made**2) - a**2 + mean(true**2) - b**2
    covariance = mean(made * true) - a * b
    expected = (2 * a * b + 1e-4) * (2 * covariance + 9e-4) / ((a**2 + b**2 + 1e-4) * (variances + 9e-4))
    assert scores(made * 2 - 1, true * 2 - 1)["ssim"] == pytest.approx(float(expected.mean()))


def test_images_that_are_smaller_than_the_window_have_no_ssim() -> None:
    assert "ssim" not in scores(images(size=10), images(size=10))


def test_scores_are_sums_over_images_and_do_not_mind_bfloat16() -> None:
    outputs, truths = images(5), images(5, seed=1)
    whole = pairs.totals(outputs, truths)
    first, second = (pairs.totals(outputs[part], truths[part]) for part in (slice(0, 2), slice(2, 5)))
    for name, value in whole.items():
        assert float(first[name] + second[name]) == pytest.approx(float(value), rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert scores(outputs.float(), truths.float()) == pytest.approx(pairs.report(whole), rel=1e-4)
