"""The clipped sum of stored per-sample gradients: sum_n factors[n] G[n], all layers of a model in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .blocks import cdiv, launch


def clip_sum_reference(G: Tensor, factors: Tensor) -> Tensor:
    """Compute sum_n factors[n] G[n] for G [samples, numbers]: [numbers]; where a factor is 0, G may be NaN or infinite."""
    return torch.where(factors[:, None] == 0, 0.0, factors[:, None] * G).sum(0)


@triton.jit
def _clip_sum_kernel(G, factors, out, N, J, EACH, BN: tl.constexpr, BJ: tl.constexpr):
    """Compute out[part, j] = sum over the part's EACH samples, in order, of factors[n] G[n, j]."""
    across = tl.cdiv(J, BJ)
    program = tl.program_id(0).to(tl.int64)
    part = program // across
    j = (program % across) * BJ + tl.arange(0, BJ)
    total = tl.zeros((BN, BJ), tl.float32)
    for start in range(0, EACH, BN):
        i = start + tl.arange(0, BN)
        n = part * EACH + i
        mine = (i < EACH) & (n < N)
        factor = tl.load(factors + n, mask=mine, other=0.0)[:, None]
        grad = tl.load(G + n[:, None] * J + j[None, :], mask=mine[:, None] & (j < J)[None, :], other=0.0)
        total += tl.where(factor == 0.0, 0.0, factor * grad)
    tl.store(out + part * J + j, tl.sum(total, 0), mask=j < J)


def clip_sum(G: Tensor, factors: Tensor) -> Tensor:
    """Compute `clip_sum_reference` in float32, reading G (contiguous) once; G and factors are float32."""
    samples, numbers = G.shape
    sizes = tiles.CLIP_SUM
    across = cdiv(numbers, sizes["BJ"])
    each = max(sizes["BN"], cdiv(samples, max(1, tiles.PROGRAMS // across)))
    parts = torch.empty(cdiv(samples, each), numbers, device=G.device)
    launch(_clip_sum_kernel, across * len(parts), G, factors, parts, samples, numbers, each, **sizes)
    return parts[0] if len(parts) == 1 else parts.sum(0)
