"""Convolutions of one, two and three dimensions, grouped or not, with zero padding."""

from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.kernels.conv import Conv
from fastloda.ops import accumulable, channel_sum, conv_piece
from fastloda.pieces import Piece
from fastloda.taps import gather_taps


def convolution(node, gy: Tensor) -> dict[int, Piece]:
    """convolution(x, weight, bias): inputs 0 x [N, C, *size], 1 weight [O, C / groups, *kernel], 2 bias [O]."""
    if node._saved_transposed:
        raise PrivacyError("transposed convolutions have no per-sample rule")
    kernel = node._saved_weight.shape[2:]
    saved = (node._saved_stride, node._saved_padding, node._saved_dilation)
    spread = (values * len(kernel) if len(values) == 1 else values for values in saved)  # "valid" saves one
    geometry = (tuple(kernel), *map(tuple, spread))
    groups = node._saved_groups

    def weight_grad(x: Tensor, gy: Tensor, samples: int) -> Tensor:
        """[samples, O, C / groups, *kernel]: the k^d taps of gy against x in place, group by group."""
        taps = accumulable(gather_taps(gy, x.shape[2:], *geometry))
        rows, size = len(x), taps.shape[-1]
        taps = taps.reshape(rows * groups, -1, size)
        grad = taps @ accumulable(x).reshape(rows * groups, -1, size).mT  # [N groups, O / groups k^d, C / groups]
        grad = grad.view(samples, rows // samples, gy.shape[1], *kernel, -1).sum(1)
        taps_dims = range(2, 2 + len(kernel))
        return grad.flip(*taps_dims).movedim(-1, 2)

    x = node._saved_input
    taps_bytes = gy.shape[:2].numel() * kernel.numel() * x[0, 0].numel() * gy.element_size()
    flat = Conv(*geometry) if len(kernel) == 2 and groups == 1 else None
    return {1: conv_piece(weight_grad, x, gy, flat, taps_bytes), 2: Piece(channel_sum, (gy,))}
