"""The taps of a convolution's gradient: copies of the output gradient, one shifted by each kernel position k.

The weight gradient is  gA[j, c, k] = sum_q g[j, (q + padding - k dilation) / stride] x[c, q]  over input positions q.
To shift g by each k, instead of expanding x (im2col), costs little where g has few channels, and x is read in place.
"""

from functools import lru_cache
from math import prod
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

Sizes = tuple[int, ...]
SHORT_RUN = 8  # rows of an image up to this length are slow to copy one by one (bench/NOTES.md, 12)


def gather_taps(
    g: Tensor,
    in_size: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """Gather the taps of g [N, r, *out_size]: [N, r * prod(kernel), prod(in_size)], in *reversed* order, as no stride is < 0.

    Entry (n, (j, k'), q) is g[n, j, (q + padding - k dilation) / stride] with k = kernel - 1 - k', or 0 where that is
    no output position.
    """
    spread = _spread(g.shape[2:], in_size, kernel, stride, padding, dilation)
    if spread is None:
        return g.flatten(2)
    rows, channels = g.shape[:2]
    t = g.new_zeros(rows, channels, *spread.sizes)
    t.as_strided(g.shape, (*t.stride()[:2], *spread.between), spread.first).copy_(g)
    for view in spread.views:
        shape, steps = (rows, channels, *view.sizes), (*t.stride()[:2], *view.steps)
        t = t.as_strided(shape, steps, view.start).clone(memory_format=torch.contiguous_format)
    return t.view(rows, channels * prod(kernel), prod(in_size))


class _View(NamedTuple):
    """The sizes, strides and start of a strided view, in numbers, for the dimensions after the first two."""

    sizes: Sizes
    steps: Sizes
    start: int


class _Spread(NamedTuple):
    """The layout of g in a buffer, with stride - 1 zeros between its positions and zeros around, and the views to copy."""

    sizes: Sizes  # the buffer's last dimensions
    between: Sizes  # the strides from one position of g to the next
    first: int  # the offset at which g begins
    views: tuple[_View, ...]  # copied one after another, each from the copy before


@lru_cache(4096)
def _spread(
    out_size: Sizes, in_size: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> _Spread | None:
    """Plan the copies that gather the taps; None where g is the only tap: kernel 1, stride 1, no padding, as many outputs."""
    if in_size == tuple(out_size) and all(sizes == (1, 1, 0) for sizes in zip(kernel, stride, padding)):
        return None
    reaches = [d * (k - 1) for k, d in zip(kernel, dilation)]
    margins = [max(0, reach - p) for reach, p in zip(reaches, padding)]
    ends = [max(size + p, (out - 1) * s + 1) for size, out, s, p in zip(in_size, out_size, stride, padding)]
    # where tap k' = 0 reads for position q = 0
    starts = [margin + p - reach for margin, p, reach in zip(margins, padding, reaches)]
    sizes = tuple(map(sum, zip(margins, ends)))
    steps = _steps(sizes)
    between, first = tuple(map(mul, stride, steps)), sum(map(mul, margins, steps))
    if len(kernel) == 1 or in_size[-1] > SHORT_RUN:
        taps = tuple(map(mul, dilation, steps))
        return _Spread(sizes, between, first, (_View(kernel + in_size, taps + steps, sum(map(mul, starts, steps))),))
    # Row by row, a small image takes as long to copy as a large one. So the taps along the last dimension are copied first; then
    # those along the others, many rows at a time.
    along = _View((kernel[-1], *sizes[:-1], in_size[-1]), (dilation[-1], *steps[:-1], 1), starts[-1])
    steps = _steps(along.sizes)
    taps = (*map(mul, dilation[:-1], steps[1:-1]), steps[0])
    across = _View(kernel + in_size, taps + steps[1:], sum(map(mul, starts[:-1], steps[1:-1])))
    return _Spread(sizes, between, first, (along, across))


def _steps(sizes: Sizes) -> Sizes:
    """Compute the strides of contiguous memory of these sizes."""
    return tuple(prod(sizes[d + 1 :]) for d in range(len(sizes)))
