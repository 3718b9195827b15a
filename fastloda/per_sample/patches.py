"""The patches of a convolution's input (im2col) as one strided view of the padded input, channels last."""

from math import prod
from operator import mul

from torch import Tensor

Sizes = tuple[int, ...]


def gather_patches(
    x: Tensor, out_size: Sizes, groups: int, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Tensor:
    """Gather what each output position reads of x [N, C, *size]: [N groups, prod(out_size), prod(kernel) C / groups].

    Channels come last, so that one run of memory is a row of the kernel with all channels, however small the image.
    """
    rows, channels = x.shape[0], x.shape[1] // groups
    if tuple(x.shape[2:]) == out_size and all(sizes == (1, 1, 0) for sizes in zip(kernel, stride, padding)):
        return x.reshape(rows * groups, channels, -1).mT
    reaches = [(out - 1) * s + d * (k - 1) + 1 for out, k, s, d in zip(out_size, kernel, stride, dilation)]
    sizes = [max(size + 2 * p, reach) for size, p, reach in zip(x.shape[2:], padding, reaches)]
    padded = x.new_zeros(rows, *sizes, x.shape[1])
    inside = (slice(p, p + size) for p, size in zip(padding, x.shape[2:]))
    padded[(slice(None), *inside)].copy_(x.movedim(1, -1))
    row, *steps, _ = padded.stride()
    strides = (row, channels, *map(mul, steps, stride), *map(mul, steps, dilation), 1)
    patches = padded.as_strided((rows, groups, *out_size, *kernel, channels), strides)
    return patches.reshape(rows * groups, prod(out_size), -1)
