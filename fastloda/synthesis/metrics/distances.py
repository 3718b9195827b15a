"""Distances between two sets of feature vectors, real and generated; each float64 [n, d].

FID    Heusel et al. 2017, https://arxiv.org/abs/1706.08500: Frechet distance of two Gaussians; biased upwards for few images
KID    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401: unbiased squared MMD, cubic kernel
precision, recall   Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991: shares within the other set's manifold
"""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fastloda.errors import UserError

from .features import Extractor

NEIGHBOURS = 3  # the paper's number
KID_SUBSET, KID_SUBSETS = 1000, 20


@dataclass(frozen=True)
class Scores:
    """The scores of generated images. fid, kid: smaller is closer, 0 for equal distributions; precision, recall: 0 to 1."""

    fid: float
    kid: float
    precision: float
    recall: float
    features: str  # the extractor's name, because scores on different features can't be compared


def scores(real: Tensor, generated: Tensor, extractor: Extractor, seed: int = 0) -> Scores:
    """Compute all scores of images [n, C, H, W] in [-1, 1]. `seed` chooses KID's subsets."""
    a, b = extractor(real), extractor(generated)
    return Scores(fid(a, b), kid(a, b, seed), *precision_recall(a, b), extractor.name)


def fid(real: np.ndarray, generated: np.ndarray) -> float:
    """Compute |m_r - m_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2)), m and S being mean and covariance.

    tr (S_r S_g)^(1/2) is the sum of the singular values of X_r X_g^T, where X has the centred rows divided by (n - 1)^(1/2).
    Thus no matrix root is taken, which rounding could make complex.
    """
    _check(real, generated)
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (real, generated)]
    roots = [np.linalg.svd(x, full_matrices=False) for x in centred]
    factors = [(s[:, None] * vt).T for _, s, vt in roots]  # [d, k]: factor @ factor.T is the covariance
    cross = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    distance = np.square(real.mean(0) - generated.mean(0)).sum() + sum(np.square(x).sum() for x in centred) - 2 * cross
    return max(0.0, float(distance))


def kid(real: np.ndarray, generated: np.ndarray, seed: int = 0) -> float:
    """Compute the mean over random subsets of the unbiased squared MMD with kernel (x . y / d + 1)^3; may be below 0."""
    _check(real, generated)
    size = min(len(real), len(generated), KID_SUBSET)
    rng = np.random.default_rng(seed)
    draws = [[x[rng.choice(len(x), size, replace=False)] for x in (real, generated)] for _ in range(KID_SUBSETS)]
    return float(np.mean([_squared_mmd(*draw) for draw in draws]))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    within = [polynomial_kernel(t, degree=3, coef0=1) for t in (x, y)]
    n = len(x)
    pairs = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in within)
    return pairs - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean()


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Compute the share of generated vectors in the real manifold, and of real ones in the generated manifold.

    A set's manifold is the union of balls around its members, each of which reaches to the member's `neighbours`-th nearest one.
    """
    _check(real, generated, least=neighbours + 1)
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: np.ndarray, members: np.ndarray, neighbours: int) -> float:
    index = NearestNeighbors(algorithm="brute").fit(members)
    radii = index.kneighbors(members, neighbours + 1)[0][:, -1]  # the nearest one is the member itself
    inside = 0
    for part in np.array_split(points, max(1, len(points) * len(members) // 2**24)):
        distances = np.sqrt(
            np.maximum(0, np.square(part).sum(1)[:, None] + np.square(members).sum(1) - 2 * part @ members.T)
        )
        inside += (distances <= radii).any(1).sum()
    return float(inside / len(points))


def _check(real: np.ndarray, generated: np.ndarray, least: int = 2) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise UserError(f"features must be [n, d] with the same d, got {real.shape} and {generated.shape}")
    if min(len(real), len(generated)) < least:
        raise UserError(f"need at least {least} images of each, got {len(real)} real and {len(generated)} generated")
    for name, features in (("real", real), ("generated", generated)):
        if not np.isfinite(features).all():
            raise UserError(f"features of the {name} images are not finite")
