"""Clipping factors from per-sample norms, which bound the contribution of one sample, and the clipped sum."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.per_sample.gradient import PerSampleGrad, squared_norms, weighted_sums
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.styles import Automatic, Flat, Groups, PerLayer

ClippingName = Literal["flat", "automatic", "per_layer", "adaptive"]
Clipping = ClippingName | Flat

STYLES: dict[str, Flat] = {style.name: style for style in (Flat(), Automatic(), PerLayer(), AdaptiveClipping())}


def clipping_style(clipping: Clipping) -> Flat:
    """Return the clipping style that `clipping` names, or `clipping` itself if it is a style.

    Raises:
        UserError: clipping is neither a style nor the name of one.
    """
    if isinstance(clipping, Flat):
        return clipping
    if not isinstance(clipping, str) or clipping not in STYLES:
        raise UserError(
            f"clipping must be one of {list(STYLES)}, or Automatic, PerLayer or AdaptiveClipping with settings; got {clipping!r}"
        )
    return STYLES[clipping]


def group_norms(grads: Mapping[str, PerSampleGrad], groups: Groups, samples: int, device: torch.device) -> Tensor:
    """Compute |g_n| over the parameters of each group: [groups, samples], float64."""
    return torch.stack([squared_norms([grads[n] for n in names], samples, device) for names in groups.values()]).sqrt()


def clip_factors(norms: Tensor, bounds: Tensor, mask: Tensor, style: Flat) -> Tensor:
    """Compute the clipping factors c [groups, samples], float64. For every style,

    - c_gn |g_gn| <= bounds[g] for norms [groups, samples] and bounds [groups, 1], whose squares sum to max_grad_norm^2;
      so a sample contributes at most max_grad_norm (1 + 1e-5) in all: the 1e-5 are for float32, in which the sum is taken;
    - c is 0 in every group for a sample that mask [samples] excludes, or whose gradient is not finite in some group;
    - c is 0 where it is outside the range of float32's normal numbers, in which it would be rounded, perhaps upwards, or lost.
    """
    factors = style.wanted(norms, bounds).minimum(norms.reciprocal() * bounds)  # |g| = 0 allows any factor
    float32 = torch.finfo(torch.float32)
    usable = norms.isfinite().all(0) & mask & (factors >= float32.tiny) & (factors <= float32.max)
    return torch.where(usable, factors, 0.0)


def group_sums(grads: Mapping[str, PerSampleGrad], groups: Groups, factors: Tensor) -> dict[str, Tensor | None]:
    """Compute each parameter's clipped sum, weighted by its group's row of factors [groups, samples]; None if it was unused."""
    sums = {}
    for names, of_group in zip(groups.values(), factors):
        sums |= weighted_sums({name: grads[name] for name in names}, of_group)
    return sums
