"""From per-sample norms to clip factors: the line that bounds what one sample can do."""

import math

import torch
from torch import Tensor


def clip_factors(norms: Tensor, max_grad_norm: float, mask: Tensor) -> Tensor:
    """c_n = min(1, C / |g_n|), and 0 for a sample that is masked or whose gradient is not finite. [samples], float64.

    Also 0 where float32, in which the sum is taken, could only hold the factor rounded, perhaps upwards (|g_n| > 1e37 C).
    """
    factors = (max_grad_norm / norms).clamp(max=1.0)  # |g| = 0 gives inf, then 1
    usable = norms.isfinite() & mask & (factors >= torch.finfo(torch.float32).tiny)
    return torch.where(usable, factors, 0.0)


def check_max_grad_norm(value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(f"max_grad_norm must be a positive finite number, got {value!r}")
    return float(value)
