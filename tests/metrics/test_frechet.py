"""Scores of samples agree with scipy, torchmetrics, closed forms and plain numpy, however the rows are split."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from trainer.metrics import frechet
from trainer.metrics.frechet import (
    Gaussian,
    class_sums,
    diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    neighbours,
    spacing,
)

pytestmark = pytest.mark.filterwarnings("ignore:Metric:UserWarning", "ignore:std:UserWarning")  # of torchmetrics


class Features(nn.Identity):
    """What torchmetrics wants for an extractor, where the images are the features."""

    num_features = 12


def table(rows: int, columns: int = 12, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features with unequal variances, as networks give them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99)) / math.sqrt(columns)
    return torch.randn(rows, columns, generator=generator) @ mixing * scale + shift


def gaussian(features: Tensor) -> Gaussian:
    return Gaussian.from_moments(moments(features))


def pieces(rows: int, cuts: list[int]) -> list[slice]:
    edges = [0, *sorted(c % (rows + 1) for c in cuts), rows]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def test_mean_and_covariance_are_those_of_numpy() -> None:
    features = table(200, shift=3.0)
    fitted = gaussian(features)
    assert fitted.count == 200
    np.testing.assert_allclose(fitted.mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-12)


def test_six_digits_stay_where_the_mean_is_ten_thousand_standard_deviations_from_zero() -> None:
    features = torch.randn(5000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    np.testing.assert_allclose(gaussian(features).covariance, np.cov(features.numpy(), rowvar=False), atol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_of_fewer_than_two_samples_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 samples, not {count}"):
        gaussian(table(count))


@pytest.mark.parametrize(("rows", "scale", "shift"), [(500, 1.0, 0.0), (500, 1.7, 0.5), (13, 0.3, -2.0)])
def test_frechet_agrees_with_scipy_and_torchmetrics(rows: int, scale: float, shift: float) -> None:
    real, fake = table(500), table(rows, seed=1, scale=scale, shift=shift)
    a, b = real.double().numpy(), fake.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    by_scipy = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root)
    theirs = FrechetInceptionDistance(feature=Features(), normalize=True)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    score = frechet_distance(gaussian(real), gaussian(fake))
    assert score == pytest.approx(by_scipy, rel=1e-8)
    assert score == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_frechet_of_diagonal_gaussians_is_the_sum_over_the_axes() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    a = Gaussian(9, torch.zeros(3).double(), torch.tensor([1.0, 4.0, 9.0]).double().diag())
    b = Gaussian(9, mean, torch.tensor([4.0, 4.0, 0.0]).double().diag())
    assert frechet_distance(a, b) == pytest.approx(5.25 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 0) ** 2, rel=1e-12)


@pytest.mark.parametrize("rows", [5, 300])
def test_frechet_of_a_set_to_itself_is_0_also_with_fewer_samples_than_dimensions(rows: int) -> None:
    scores = [frechet_distance(gaussian(table(rows, seed=s)), gaussian(table(rows, seed=s))) for s in range(20)]
    assert scores == pytest.approx([0.0] * 20, abs=1e-6)
    assert min(scores) >= 0


def test_a_shift_of_the_mean_adds_its_square_and_the_order_does_not_matter() -> None:
    real, fake = gaussian(table(300)), gaussian(table(300, seed=1, scale=1.5))
    shift = torch.linspace(-2, 2, 12).double() + real.mean - fake.mean
    moved = Gaussian(300, fake.mean + shift, fake.covariance)
    level = Gaussian(300, real.mean, fake.covariance)
    expected = frechet_distance(real, level) + torch.linspace(-2, 2, 12).double().square().sum().item()
    assert frechet_distance(real, moved) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(moved, real) == pytest.approx(expected, rel=1e-10)


def test_features_that_are_not_finite_score_nan() -> None:
    broken = table(50).index_fill(0, torch.tensor([7]), math.inf)
    assert math.isnan(frechet_distance(gaussian(table(50)), gaussian(broken)))
    assert math.isnan(frechet_distance(gaussian(broken), gaussian(table(50))))
    assert math.isnan(kernel_distance(table(50), broken))


def test_diversity_is_the_ratio_of_spreads_and_0_when_all_samples_are_alike() -> None:
    real = table(300)
    assert diversity(gaussian(real), gaussian(0.25 * real + 3)) == pytest.approx(0.25, rel=1e-6)
    assert diversity(gaussian(real), gaussian(real)) == 1.0
    assert diversity(gaussian(real), gaussian(real[:1].expand(300, -1))) == pytest.approx(0.0, abs=1e-6)


def test_inception_score_agrees_with_torchmetrics() -> None:
    logits = 3 * table(400)
    theirs = InceptionScore(feature=Features(), splits=1)
    theirs.update(logits)
    score = inception_score(class_sums(logits.softmax(1)))
    assert score == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


def test_inception_score_is_the_number_of_classes_at_best_and_1_at_worst() -> None:
    assert inception_score(class_sums(torch.eye(10).repeat(5, 1))) == pytest.approx(10, rel=1e-12)
    assert inception_score(class_sums(torch.eye(10)[:1].repeat(5, 1))) == pytest.approx(1, rel=1e-12)
    assert inception_score(class_sums(torch.full((5, 10), 0.1))) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.5, 0.3), (0.2, 4.0)])
def test_kernel_distance_agrees_with_torchmetrics(scale: float, shift: float) -> None:
    real, fake = table(300).double(), table(300, seed=1, scale=scale, shift=shift).double()
    theirs = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=300)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert kernel_distance(real, fake) == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


def test_kernel_distance_is_the_mean_over_pairs_also_for_unequal_tables() -> None:
    real, fake = table(4, 3), table(2, 3, seed=1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x.double() @ y.double()) / 3 + 1) ** 3

    within_real = [kernel(x, y) for i, x in enumerate(real) for j, y in enumerate(real) if i != j]
    within_fake = [kernel(fake[0], fake[1])]
    across = [kernel(x, y) for x in real for y in fake]
    expected = np.mean(within_real) + np.mean(within_fake) - 2 * np.mean(across)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-10)


def test_a_table_against_itself_keeps_the_pairs_of_equal_rows_across_the_tables() -> None:
    real = table(20)
    assert kernel_distance(real, real) == kernel_distance(real, real.clone()) < 0


def test_kernel_distance_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows of each, not 5 real and 1 fake"):
        kernel_distance(table(5), table(1))


def naive(real: np.ndarray, fake: np.ndarray, k_recall: int, k_coverage: int) -> dict[str, float]:
    """The papers' definitions, every distance at once."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(a[:, None] - b[None]).sum(-1))

    def radii(rows: np.ndarray, k: int) -> np.ndarray:
        return np.sort(distances(rows, rows), axis=1)[:, k]

    across = distances(real, fake)
    dense = across < radii(real, k_coverage)[:, None]
    return {
        "precision": (across < radii(real, k_recall)[:, None]).any(0).mean(),
        "recall": (across < radii(fake, k_recall)[None]).any(1).mean(),
        "density": dense.sum(0).mean() / k_coverage,
        "coverage": (across.min(1) < radii(real, k_coverage)).mean(),
    }


@pytest.mark.parametrize(("k_recall", "k_coverage"), [(3, 5), (5, 5), (1, 2), (4, 1)])
@pytest.mark.parametrize(("rows", "scale", "shift"), [(300, 1.0, 0.0), (170, 0.6, 0.2), (410, 1.4, 0.0)])
def test_neighbours_agree_with_plain_numpy(
    rows: int, scale: float, shift: float, k_recall: int, k_coverage: int
) -> None:
    real, fake = table(300, 5), table(rows, 5, seed=1, scale=scale, shift=shift)
    expected = naive(real.numpy(), fake.numpy(), k_recall, k_coverage)
    scores = neighbours(real, fake, k_recall, k_coverage)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert all(0 < value < 1.5 for value in scores.values())


@given(seed=st.integers(0, 1000), rows=st.integers(7, 60), levels=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_ties_and_copies_are_counted_as_in_plain_numpy(seed: int, rows: int, levels: int) -> None:
    """Rows on a small grid: many are equal, at equal distances, or exactly on a ball's edge."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = (torch.randint(levels, (n, 2), generator=generator).float() for n in (rows, 30))
    assert neighbours(real, fake) == pytest.approx(naive(real.numpy(), fake.numpy(), 3, 5), abs=1e-12)


def test_copies_of_the_real_samples_score_1_exactly() -> None:
    """Far from zero, where a distance made of squares would lose its digits; the k-th neighbour lies on the edge."""
    real = table(500, 33, shift=100.0)
    assert neighbours(real, real.clone()) == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}


def test_samples_of_the_same_distribution_score_as_the_papers_say() -> None:
    """Density 1 and coverage 1 - (N-1)...(N-k) / (2N-1)...(2N-k) in expectation (Naeem et al. 2020, lemmas 1 and 2)."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 2000, 8, generator=generator)
    scores = neighbours(real, fake)
    assert scores["density"] == pytest.approx(1.0, abs=0.05)
    assert scores["coverage"] == pytest.approx(1 - math.prod((2000 - i) / (4000 - i) for i in range(1, 6)), abs=0.012)
    assert scores["precision"] == pytest.approx(scores["recall"], abs=0.06)


def test_a_lost_mode_lowers_recall_and_coverage_but_not_precision() -> None:
    left, right = table(400, 4, seed=1), table(400, 4, seed=2, shift=50.0)
    scores = neighbours(torch.cat([left, right]), table(800, 4, seed=3))
    assert scores["precision"] > 0.9
    assert scores["recall"] == pytest.approx(0.5, abs=0.05)
    assert scores["coverage"] == pytest.approx(0.5, abs=0.05)


def test_fakes_that_repeat_have_no_spacing_and_real_ones_have_that_of_real_ones() -> None:
    real = table(400, 6)
    assert spacing(real, table(400, 6, seed=1)) == pytest.approx(1.0, abs=0.05)
    assert spacing(real, real[:200].repeat(2, 1)) == 0
    assert spacing(real, table(400, 6, seed=1, scale=0.1)) == pytest.approx(0.1, abs=0.01)


def test_noise_scores_0_on_all_four() -> None:
    scores = neighbours(table(100), table(100, seed=1, shift=1000.0))
    assert scores == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


@pytest.mark.parametrize(("real", "fake"), [(5, 100), (100, 5), (4, 4)])
def test_a_table_without_a_kth_neighbour_is_refused(real: int, fake: int) -> None:
    with pytest.raises(ValueError, match=f"5-th neighbour needs more than 5 rows, not {real} real and {fake} fake"):
        neighbours(table(real), table(fake))
    neighbours(table(6), table(6))


@pytest.mark.parametrize("block", [1, 50, 1000, 10**9])
def test_the_size_of_a_block_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = table(61), table(47, seed=1, scale=1.2)
    kernel, near = kernel_distance(real, fake), neighbours(real, fake)
    monkeypatch.setattr(frechet, "BLOCK", block)
    assert kernel_distance(real, fake) == pytest.approx(kernel, rel=1e-10)
    assert neighbours(real, fake) == near


@given(cuts=st.lists(st.integers(0, 1000), max_size=8), rows=st.integers(2, 60), shift=st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_sums_do_not_depend_on_how_rows_are_split_over_batches_and_ranks(
    cuts: list[int], rows: int, shift: float
) -> None:
    fake = table(rows, seed=1, shift=shift)
    real = gaussian(table(100))
    parts = pieces(rows, cuts)
    split = Gaussian.from_moments(summed([moments(fake[p]) for p in parts]))
    assert frechet_distance(real, split) == pytest.approx(frechet_distance(real, gaussian(fake)), rel=1e-6)
    assert diversity(real, split) == pytest.approx(diversity(real, gaussian(fake)), rel=1e-6)
    probabilities = fake.softmax(1)
    totals = summed([class_sums(probabilities[p]) for p in parts])
    assert inception_score(totals) == pytest.approx(inception_score(class_sums(probabilities)), rel=1e-6)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_scores_of_tables_do_not_depend_on_the_order_that_ranks_put_rows_in(seed: int) -> None:
    real, fake = table(60), table(50, seed=1, scale=1.3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    assert kernel_distance(real, fake[order]) == pytest.approx(kernel_distance(real, fake), rel=1e-6)
    assert neighbours(real, fake[order]) == neighbours(real, fake)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.0, 0.1), tuple(2.0 ** -(i / 4) for i in range(20))])
def test_the_distance_to_expect_of_two_samples_is_what_many_pairs_have_on_average(scales: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor(scales, dtype=torch.float64)

    def sample() -> frechet.Gaussian:
        rows = torch.randn(500, len(scales), generator=generator, dtype=torch.float64) * deviation
        return frechet.Gaussian.from_moments(frechet.moments(rows))

    pairs = [(sample(), sample()) for _ in range(200)]
    mean = sum(frechet.frechet_distance(a, b) for a, b in pairs) / len(pairs)
    assert frechet.expected_distance(pairs[0][0]) == pytest.approx(mean, rel=0.15)
