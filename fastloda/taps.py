"""The taps of a convolution's gradient as one strided view of the output gradient.

The weight gradient is  gA[j, c, k] = sum_q g[j, (q + padding - k dilation) / stride] x[c, q]  over input positions q.
Shifting g by the tap, instead of expanding x (im2col), costs nothing where g has few channels, and x is read in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_taps(
    g: Tensor,
    in_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """g [N, r, *out_size] -> [N, r * prod(kernel), prod(in_size)]; the taps come in *reversed* order (strides are >= 0).

    Entry (n, (j, k'), q) is g[n, j, (q + padding - k dilation) / stride] with k = kernel - 1 - k', or 0 where that is
    no output position.
    """
    if all(sizes == (1, 1, 0) for sizes in zip(kernel, stride, padding)):  # 1 x 1: g itself
        return g.flatten(2)
    buffer, starts = _spread(g, in_size, kernel, stride, padding, dilation)
    rows, rank, *spatial = buffer.stride()
    view = buffer.as_strided(
        (*g.shape[:2], *kernel, *in_size),
        (rows, rank, *(s * d for s, d in zip(spatial, dilation)), *spatial),
        sum(start * s for start, s in zip(starts, spatial)),
    )
    return view.reshape(*g.shape[:1], -1, _product(in_size))


def _spread(g, in_size, kernel, stride, padding, dilation) -> tuple[Tensor, list[int]]:
    """g with stride - 1 zeros between its positions and zeros around, and the index that tap k' = 0 reads at q = 0."""
    margins, sizes, starts = [], [], []
    for size, out, k, s, p, d in zip(in_size, g.shape[2:], kernel, stride, padding, dilation):
        reach = d * (k - 1)
        margin = max(0, reach - p)
        margins.append(margin)
        sizes.append(margin + max(size + p, (out - 1) * s + 1))
        starts.append(margin + p - reach)
    buffer = g.new_zeros(*g.shape[:2], *sizes)
    rows, rank, *spatial = buffer.stride()
    offset = sum(margin * step for margin, step in zip(margins, spatial))
    buffer.as_strided(g.shape, (rows, rank, *(s * step for s, step in zip(stride, spatial))), offset).copy_(g)
    return buffer, starts


def _product(sizes: Sequence[int]) -> int:
    return torch.Size(sizes).numel()
