"""Scores of generated samples from features: tensor math that knows nothing of networks, files or ranks.

What a batch adds is a dict of float64 sums, to be added over batches and ranks and turned into a score once; KID and
the neighbour scores need every row at once and take tables, `(N, d)`, one row a sample. Hence no score depends on
how the samples were split. Features that are not finite make a score nan, or lie outside every ball: a generator that
diverged scores badly and stops nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**20  # pairs of rows that KID and the neighbour scores hold at once
WIDE = 256  # dimensions from which on distances are computed by a matrix product


def moments(features: Tensor) -> dict[str, Tensor]:
    """Sums over `(B, d)` features that a Gaussian is made from: count (), sum (d,), outer (d, d), float64.

    They are sums about zero, which can be added without knowing the mean; the covariance is then off by about 1e-16 of
    the squared mean, so it keeps six digits while the mean is less than 1e4 standard deviations from zero.
    """
    rows = features.double()
    return {"count": rows.new_tensor(len(rows)), "sum": rows.sum(0), "outer": rows.T @ rows}


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution fitted to `count` samples: mean (d,) and unbiased covariance (d, d), float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def from_moments(cls, totals: dict[str, Tensor]) -> Gaussian:
        """The totals are `moments`, summed. ValueError below two samples; fewer samples than dimensions are fine."""
        count = int(totals["count"])
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {count}: score more samples")
        mean = totals["sum"] / count
        return cls(count, mean, (totals["outer"] - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982); FID on Inception features (Heusel 2017).

    S1^(1/2) S2 S1^(1/2) has the eigenvalues of S1 S2 and is symmetric: real roots, also when the covariances are
    singular. nan where a moment is not finite.
    """
    if not (a.covariance.isfinite().all() and b.covariance.isfinite().all()):
        return math.nan
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(distance.item(), 0.0)


def expected_distance(real: Gaussian) -> float:
    """The Fréchet distance to expect between two samples of this size from one normal distribution, to first order.

    The means add 2 tr(S) / N. The covariances add half the sum of their squared differences over a + b, for all pairs
    of eigenvalues a and b, and these differences have the variance 2 ab / N, twice that on the diagonal.
    """
    values = torch.linalg.eigvalsh(real.covariance).clamp(min=1e-300)
    pairs = values[:, None] * values / (values[:, None] + values)
    return float(2 * values.sum() + pairs.sum() + pairs.diagonal().sum()) / real.count


def diversity(real: Gaussian, fake: Gaussian) -> float:
    """sqrt(Tr S_fake / Tr S_real): 1 when the fakes vary as much as the real samples, 0 when they are identical."""
    return (fake.covariance.trace() / real.covariance.trace()).clamp(min=0).sqrt().item()


def class_sums(probabilities: Tensor) -> dict[str, Tensor]:
    """Sums over `(B, classes)` probabilities: count (), sum (classes,), entropy () of each sample, in nats; float64."""
    rows = probabilities.double()
    return {"count": rows.new_tensor(len(rows)), "sum": rows.sum(0), "entropy": torch.special.entr(rows).sum()}


def inception_score(totals: dict[str, Tensor]) -> float:
    """exp of the mean KL(p(y|x), p(y)), 1 to the number of classes, over one split (Salimans et al. 2016).

    The totals are `class_sums`, summed; the mean KL is the entropy of the mean less the mean of the entropies.
    """
    mean = totals["sum"] / totals["count"]
    return (torch.special.entr(mean).sum() - totals["entropy"] / totals["count"]).exp().item()


def _kernel_sum(a: Tensor, b: Tensor, same: bool) -> Tensor:
    """Sum of (x.y/d + 1)^3 over the pairs of rows, float64; of a table with itself, no row with itself."""
    side = math.isqrt(BLOCK)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for i, x in enumerate(torch.split(a, side)):
        for j, y in enumerate(torch.split(b, side)):
            kernel = (x.double() @ y.double().T / a.shape[1] + 1).pow(3)
            if same and i == j:
                kernel.fill_diagonal_(0)
            total += kernel.sum()
    return total


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID: the unbiased squared MMD with the kernel (x.y/d + 1)^3 (Bińkowski et al. 2018); may be slightly negative.

    Every pair of rows counts, where the paper averages over random subsets: the score has no seed. ValueError below
    two rows.
    """
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 rows of each, not {n} real and {m} fake: score more")
    within = _kernel_sum(real, real, same=True) / (n * (n - 1)) + _kernel_sum(fake, fake, same=True) / (m * (m - 1))
    return (within - 2 * _kernel_sum(real, fake, same=False) / (n * m)).item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, from the differences: a matrix product would be off by rounding where distances tie or are 0.

    Of many dimensions, where that takes minutes and ties do not happen, by a matrix product in float64.
    """
    if a.shape[1] > WIDE:
        return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(table: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(N, len(ks)): from each row to its k-th nearest other row; the row itself, at distance 0, comes first."""
    side = max(BLOCK // len(table), 1)
    nearest = [_distances(rows, table).topk(max(ks) + 1, largest=False).values for rows in torch.split(table, side)]
    return torch.cat(nearest)[:, ks]


def neighbours(real: Tensor, fake: Tensor, k_recall: int = 3, k_coverage: int = 5) -> dict[str, float]:
    """Four scores from the distances of `(N, d)` real and `(M, d)` fake features, compared in float32.

    A row's ball reaches to its k-th nearest other row of the same table. Precision: fakes in any real ball;
    recall: real rows in any fake ball (Kynkäänniemi et al. 2019, k_recall). Density: real balls around a fake, over k;
    coverage: real balls with a fake inside (Naeem et al. 2020, k_coverage). Balls are open, as in the latter's `prdc`.
    All lie in [0, 1] but density, which is 1 on average for samples of the same distribution. ValueError where a table
    has no k-th neighbour.
    """
    needed = max(k_recall, k_coverage)
    if min(len(real), len(fake)) <= needed:
        raise ValueError(
            f"a {needed}-th neighbour needs more than {needed} rows, not {len(real)} real and {len(fake)} fake: "
            f"score more samples or lower k"
        )
    real, fake = real.float(), fake.float()
    real_radii, fake_radii = _radii(real, (k_recall, k_coverage)), _radii(fake, (k_recall,))
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled, pairs, covered = torch.zeros(3, dtype=torch.int64, device=fake.device)
    side = max(BLOCK // len(fake), 1)
    for rows, radii in zip(torch.split(real, side), torch.split(real_radii, side), strict=True):
        distances = _distances(rows, fake)
        precise |= (distances < radii[:, :1]).any(0)
        recalled += (distances < fake_radii.T).any(1).sum()
        inside = distances < radii[:, 1:]
        pairs += inside.sum()
        covered += inside.any(1).sum()
    return {
        "precision": precise.sum().item() / len(fake),
        "recall": recalled.item() / len(real),
        "density": pairs.item() / (k_coverage * len(fake)),
        "coverage": covered.item() / len(real),
    }


def spacing(real: Tensor, fake: Tensor) -> float:
    """The mean distance of a fake to its nearest other fake, over the same of the real rows, as many of each.

    1 when fakes fill space as real samples do, near 0 when they repeat.
    """
    near_real, near_fake = (_radii(table.float(), (1,)).double().mean() for table in (real, fake))
    return (near_fake / near_real).item()
