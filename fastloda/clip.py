"""From per-sample norms to clip factors, the line that bounds what one sample can do, and the clipped sum."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastloda.ops import flat_clip_sum, on_triton
from fastloda.pieces import PerSampleGrad


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


def clipped_sums(grads: Mapping[str, PerSampleGrad], factors: Tensor) -> dict[str, Tensor | None]:
    """sum_n factors[n] g_n of each parameter (None: unused). What is kept on a GPU is summed in one launch."""
    kept = {name: grad.kept for name, grad in grads.items() if grad.kept is not None and not grad.again}
    flat = {name: tensor.reshape(len(tensor), -1) for name, tensor in kept.items() if on_triton(tensor)}
    sums = {name: grad.weighted_sum(factors) for name, grad in grads.items() if name not in flat}
    if flat:
        total = flat_clip_sum(torch.cat(list(flat.values()), dim=1), factors)
        parts = total.split([tensor.shape[1] for tensor in flat.values()])
        sums |= {name: part.view(grads[name].shape) for name, part in zip(flat, parts)}
    return sums
