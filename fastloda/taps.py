"""The taps of a convolution's gradient as one strided view of the output gradient.

The weight gradient is  gA[j, c, k] = sum_q g[j, (q + padding - k dilation) / stride] x[c, q]  over input positions q.
Shifting g by the tap, instead of expanding x (im2col), costs nothing where g has few channels, and x is read in place.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

from torch import Tensor

Sizes = tuple[int, ...]


def gather_taps(
    g: Tensor,
    in_size: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
) -> Tensor:
    """g [N, r, *out_size] -> [N, r * prod(kernel), prod(in_size)]; the taps come in *reversed* order (strides are >= 0).

    Entry (n, (j, k'), q) is g[n, j, (q + padding - k dilation) / stride] with k = kernel - 1 - k', or 0 where that is
    no output position.
    """
    spread = _spread(g.shape[2:], in_size, kernel, stride, padding, dilation)
    if spread is None:
        return g.flatten(2)
    buffer = g.new_zeros(*g.shape[:2], *spread.sizes)
    outer = buffer.stride()[:2]
    buffer.as_strided(g.shape, (*outer, *spread.between), spread.first).copy_(g)
    shape, steps = (*g.shape[:2], *kernel, *in_size), (*outer, *spread.taps, *spread.positions)
    return buffer.as_strided(shape, steps, spread.start).reshape(g.shape[0], g.shape[1] * prod(kernel), prod(in_size))


class _Spread(NamedTuple):
    """g with stride - 1 zeros between its positions and zeros around, in a buffer of `sizes`; all else counts its numbers."""

    sizes: Sizes
    between: Sizes  # from one position of g to the next
    first: int  # where g begins
    taps: Sizes  # from one tap to the next
    positions: Sizes  # from one input position to the next
    start: int  # what tap k' = 0 reads at q = 0


@lru_cache(4096)
def _spread(
    out_size: Sizes, in_size: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> _Spread | None:
    """None for a 1 x 1 convolution, whose taps are g itself."""
    if all(sizes == (1, 1, 0) for sizes in zip(kernel, stride, padding)):
        return None
    reaches = [d * (k - 1) for k, d in zip(kernel, dilation)]
    margins = [max(0, reach - p) for reach, p in zip(reaches, padding)]
    ends = [max(size + p, (out - 1) * s + 1) for size, out, s, p in zip(in_size, out_size, stride, padding)]
    sizes = tuple(map(sum, zip(margins, ends)))
    steps = tuple(prod(sizes[d + 1 :]) for d in range(len(sizes)))
    count = lambda places: sum(place * step for place, step in zip(places, steps))  # noqa: E731
    return _Spread(
        sizes,
        between=tuple(s * step for s, step in zip(stride, steps)),
        first=count(margins),
        taps=tuple(d * step for d, step in zip(dilation, steps)),
        positions=steps,
        start=count(margin + p - reach for margin, p, reach in zip(margins, padding, reaches)),
    )
