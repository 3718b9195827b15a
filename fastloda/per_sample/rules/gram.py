"""The Gram (ghost) norm of a linear map, |g|^2 = sum_ts <x_t, x_s> <g_t, g_s> for g = sum_t g_t x_t^T, as an upper bound.

Where a sample's positions cancel in g, the Gram's terms stay large and cancel only in their sum. In bf16 or float32 the
rounding of that sum may hide a gradient many times the clipping norm. Here the Gram G and the clipped sum are both computed in
float64, and bounds of their rounding errors are added:

    |g|^2 <= G + k u S^2,     S = sum_t |x_t| |g_t|,   k = C + O + T^2 + 8 roundings,   u = 2^-53
    |fl(g)| <= |g| + (T + 4) u S

(a sum of n products is off by at most n u / (1 - n u) times the sum of their magnitudes: Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1). With one position, T = 1, G is the square of a product of two norms. With several, the bound
is as good as exact (its norm to a relative k u S^2 / (2 |g|^2), about 1e-12 for 16 positions), unless the positions cancel to
1e-6 of their size: then it is larger than the gradient's norm, never smaller.
"""

from math import prod

import torch
from torch import Tensor

from fastloda.per_sample.planner import split_rows
from fastloda.per_sample.recipe import Fused

ROUNDING = 2.0**-53
ALLOWED = 1e-6  # the part used here of the 1e-5 by which a norm may fall short of the norm of what is summed


def gram(x: Tensor) -> Fused | None:
    """Return the Gram's norms and clipped sums where x is on the CPU, whose float64 costs only twice float32; else None."""
    return Fused(squares, weighted_sum) if x.device.type == "cpu" else None


def squares(x: Tensor, gy: Tensor, samples: int) -> Tensor:
    """Compute upper bounds of |g|^2 from x [rows, ..., C] and gy [rows, ..., O]: float64 [samples, 1]."""
    parts = [_squares(*_rows(x, gy, samples, part)) for part in _parts(x, gy, samples)]
    return torch.cat(parts)[:, None]


def _squares(x: Tensor, gy: Tensor) -> Tensor:
    """Compute the upper bounds for a few samples, x [n, T, C] and gy [n, T, O]: [n]."""
    positions = x.shape[1]
    size = (torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(gy, dim=2)).sum(1)
    if positions == 1:
        return size.square()
    total = ((x @ x.mT) * (gy @ gy.mT)).sum((1, 2)).clamp(min=0)
    roundings = x.shape[2] + gy.shape[2] + positions**2 + 8
    norm = (total + roundings * ROUNDING * size.square()).sqrt()
    short = (positions + 4) * ROUNDING * size - ALLOWED * norm
    return (norm + short.clamp(min=0)).square()


def weighted_sum(x: Tensor, gy: Tensor, factors: Tensor) -> Tensor:
    """Compute sum_n factors[n] g_n: [C, O]. A sample whose factor is 0 may be NaN."""
    total = torch.zeros(x.shape[-1], gy.shape[-1], dtype=torch.float64, device=x.device)
    for part in _parts(x, gy, len(factors)):
        rows_x, rows_gy = _rows(x, gy, len(factors), part)
        weights = factors[part].double().view(-1, 1, 1)
        rows_x = rows_x.masked_fill(weights == 0, 0.0)
        rows_gy = (rows_gy * weights).masked_fill(weights == 0, 0.0)
        total.addmm_(rows_x.flatten(0, 1).mT, rows_gy.flatten(0, 1))
    return total if x.dtype == torch.float64 else total.float()


def _rows(x: Tensor, gy: Tensor, samples: int, part: slice) -> tuple[Tensor, ...]:
    return tuple(t.reshape(samples, -1, t.shape[-1])[part].double() for t in (x, gy))


def _parts(x: Tensor, gy: Tensor, samples: int):
    positions = prod(x.shape[:-1]) // samples
    return split_rows(samples, 8 * samples * positions * (x.shape[-1] + gy.shape[-1] + 2 * positions), x.device)
