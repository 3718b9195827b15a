"""A parameter added to features, or multiplied with them, and broadcast along the batch: biases, scales, position tables.

Its gradient is grad_output (times the other factor), summed over all that it was broadcast along. A parameter with entries of its
own for each row of the batch has no gradient per sample.
"""

from torch import Size, Tensor
from torch.autograd.graph import Node

from fastloda.graph import parameter_shape
from fastloda.ops import accumulable
from fastloda.pieces import Piece


def add(node: Node, gy: Tensor) -> dict[int, Piece]:
    """a + alpha b: inputs 0 a and 1 b."""
    factors = (1, node._saved_alpha)

    def rule(index: int, shape: Size) -> Piece:
        grad = lambda gy, samples: summed(gy, shape, samples) * factors[index]  # noqa: E731  (new: the sum may be gy itself)
        return Piece(grad, (gy,))

    return _for_parameters(node, rule)


def mul(node: Node, gy: Tensor) -> dict[int, Piece]:
    """a b: inputs 0 a and 1 b, each saved only if the other needs a gradient."""

    def rule(index: int, shape: Size) -> Piece:
        other = (node._saved_other, node._saved_self)[index].expand_as(gy)
        grad = lambda gy, other, samples: summed(accumulable(gy) * accumulable(other), shape, samples)  # noqa: E731
        return Piece(grad, (gy, other), scratch_bytes=4 * gy.numel())

    return _for_parameters(node, rule)


def varies_along_batch(node: Node, index: int) -> bool:
    """Whether the parameter that is input `index` may have entries of its own for each row, or there are no rows at all."""
    rows, shape = node._input_metadata[0].shape, parameter_shape(node, index)
    return not rows or (len(shape) == len(rows) and shape[0] != 1)


def summed(t: Tensor, shape: Size, samples: int) -> Tensor:
    """[rows, ...] -> [samples, *shape]: over a sample's rows, and over all that `shape` was broadcast along."""
    within = (1,) * (t.dim() - 1) + tuple(shape)
    within = within[len(within) - t.dim() + 1 :]
    grad = accumulable(t).reshape(samples, len(t) // samples, *t.shape[1:]).sum_to_size(samples, 1, *within)
    return grad.reshape(samples, *shape)


def _for_parameters(node: Node, rule) -> dict[int, Piece]:
    shapes = {index: parameter_shape(node, index) for index in (0, 1)}
    return {index: rule(index, shape) for index, shape in shapes.items() if shape is not None}
