"""Scale and shift of GroupNorm and LayerNorm: the normalised input times the output gradient, summed per sample."""

from torch import Tensor

from fastloda.ops import accumulable, channel_sum
from fastloda.pieces import Piece


def group_norm(node, gy: Tensor) -> dict[int, Piece]:
    """native_group_norm(x, weight, bias): inputs 0 x [N, C, *size], 1 weight [C], 2 bias [C]."""
    groups = node._saved_group

    def weight_grad(gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, samples: int) -> Tensor:
        grouped = accumulable(x).reshape(len(x), groups, -1)
        normalised = (grouped - mean.view(len(x), groups, 1)) * rstd.view(len(x), groups, 1)
        return channel_sum(accumulable(gy) * normalised.view(gy.shape), samples)

    saved = (node._saved_input, node._saved_result1, node._saved_result2)
    return {1: Piece(weight_grad, (gy, *saved)), 2: Piece(channel_sum, (gy,))}


def layer_norm(node, gy: Tensor) -> dict[int, Piece]:
    """native_layer_norm(x, weight, bias): inputs 0 x [N, ..., *normalised], 1 weight and 2 bias [*normalised]."""
    shape = tuple(node._saved_normalized_shape)

    def weight_grad(gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, samples: int) -> Tensor:
        return position_sum(accumulable(gy) * ((accumulable(x) - mean) * rstd), samples)

    def position_sum(gy: Tensor, samples: int) -> Tensor:
        """[N, ..., *normalised] -> [samples, *normalised]"""
        return accumulable(gy).reshape(samples, -1, *shape).sum(1)

    saved = (node._saved_input, node._saved_result1, node._saved_result2)
    return {1: Piece(weight_grad, (gy, *saved)), 2: Piece(position_sum, (gy,))}
