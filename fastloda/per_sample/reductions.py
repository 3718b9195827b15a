"""Squared norms and weighted sums of the rows of a matrix: the two reductions of per-sample gradients.

A computed norm must not fall short of the norm of what is summed by more than 1e-5 of it, whatever the numbers are. Therefore:

- Squares of float32 numbers overflow from 1.8e19 and underflow below 1e-19. They are added in float32 only where neither
  happened, and only in runs of 128 numbers: in any order of addition, rounding changes such a sum by at most
  128 2^-24 = 7.6e-6 of it (a norm by half of that). The sums of the runs are added in float64. (On long rows PyTorch's own
  float64 norm of float32 numbers took 10 to 20 times as long.)
- The weighted sum is never a matrix product in tf32 or bfloat16, which PyTorch may be set to use: that would round numbers
  which the norm did not round.
"""

import torch
from torch import Tensor

from fastloda.per_sample.tensors import waits

RUN = 128
LONG = 4096  # the length of a row from which on runs are faster
EXACT_BELOW = 1e-20  # a squared norm below it is computed in float64: 10^7 squares that underflow add up to 1e-31
FULL_PRECISION = ("none", "ieee")


def row_squares(rows: Tensor) -> Tensor:
    """Compute |row|^2 of rows [n, *shape]: float64 [n]. No square of a float32 number overflows or underflows."""
    rows = rows.reshape(rows.shape[0], -1)
    if rows.dtype != torch.float32 or waits(rows) or rows.shape[1] < LONG:
        return _exact_squares(rows)
    whole = rows.shape[1] // RUN * RUN
    runs = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, RUN)), dim=2)
    return _sure(_exact_squares(runs) + _exact_squares(rows[:, whole:]), rows)


def run_squares(rows: Tensor) -> Tensor:
    """Compute the squared norm of each run of RUN numbers in rows [n, k RUN]: float64 [n, k], as exact as `row_squares`."""
    runs = rows.unflatten(1, (-1, RUN))
    if rows.dtype != torch.float32 or waits(rows):
        return _exact_squares(runs)
    return _sure(torch.linalg.vector_norm(runs, dim=2).double().square_(), runs)


def _sure(squares: Tensor, rows: Tensor) -> Tensor:
    """Recompute in float64, in place, those squared norms of rows [..., n] for which float32 may have over- or underflowed."""
    doubtful = ~((squares > EXACT_BELOW) & squares.isfinite())
    if doubtful.any():
        squares[doubtful] = _exact_squares(rows[doubtful])
    return squares


def _exact_squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square_()


def weighted_row_sum(rows: Tensor, weights: Tensor, some_are_zero: bool = True, onto: Tensor | None = None) -> Tensor:
    """Compute sum_n weights[n] rows[n] of rows [n, *shape]: [*shape], added to `onto` in place if there is one.

    With some_are_zero a row of weight 0 may be NaN.
    """
    weights = weights.to(rows.dtype)
    if some_are_zero:  # 0 * inf is NaN
        rows = rows.nan_to_num(0.0, 0.0, 0.0)
    if rows.device.type == "cpu" and _products_are_exact():
        flat = rows.reshape(rows.shape[0], -1).t()
        if onto is not None:
            onto.view(-1).addmv_(flat, weights)
            return onto
        return torch.mv(flat, weights).view(rows.shape[1:])
    total = (rows * weights.view(-1, *[1] * (rows.dim() - 1))).sum(0)
    return total if onto is None else onto.add_(total)


def _products_are_exact() -> bool:
    """Tell whether float32 matrix products on the CPU are computed in float32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in FULL_PRECISION
