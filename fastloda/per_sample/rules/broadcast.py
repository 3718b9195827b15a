"""Rules for a parameter that is combined with features and broadcast along the batch: biases, scales, position tables, slopes.

Its gradient is grad_output times the factor by which the operation multiplies the parameter, summed over all dimensions along
which the parameter was broadcast. A parameter with separate entries for each row of the batch has no rule.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.batch_axis import locate
from fastloda.per_sample.node import Node, output_shape
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.tensors import accumulable

Product = tuple[float, Callable[..., Tensor] | None, *tuple[Tensor, ...]]


def _rule(product: Callable[[Node, int], Product]) -> Callable[[Call], dict[int, Recipe]]:
    """Make the rule of an operation from the gradients of its inputs before they are summed.

    product: (node, number of the input) -> (scale, function, *tensors). The gradient of that input is
        scale * function(gy, *tensors), or scale * gy if function is None.
    """
    return lambda call: {index: _recipe(call, shape, *product(call.node, index)) for index, shape in _of(call)}


def _div(node: Node, index: int) -> Product:
    if index:
        return 1, lambda gy, a, b: -gy * (a / b) / b, node._saved_self, node._saved_other
    return 1, torch.div, node._saved_other


def _addcmul(node: Node, index: int) -> Product:
    if index:
        return node._saved_value, torch.mul, node._saved_tensor2 if index == 1 else node._saved_tensor1
    return 1, None


# The inputs are numbered 0 a, 1 b, 2 c.
add = _rule(lambda node, index: (node._saved_alpha if index else 1, None))  # a + alpha b
sub = _rule(lambda node, index: (-node._saved_alpha if index else 1, None))  # a - alpha b
mul = _rule(lambda node, index: (1, torch.mul, node._saved_self if index else node._saved_other))  # a b
div = _rule(_div)  # a / b
addcmul = _rule(_addcmul)  # a + value b c
prelu = _rule(lambda node, _: (1, lambda gy, a: gy * a.clamp(max=0), node._saved_self))  # a where a > 0, else b a
where = _rule(lambda node, index: (1, torch.mul, ~node._saved_condition if index else node._saved_condition))  # a or b
masked_fill = _rule(lambda node, _: (1, torch.mul, ~node._saved_mask))  # a, or a number


def varies_along_batch(node: Node, shape: Size, outer: int) -> bool:
    """Tell whether a parameter of `shape` may have separate entries for each row of the batch, or the output has no rows."""
    rows = output_shape(node)
    if not rows:
        return True
    if not outer or rows[0] == 1:  # a batch of one; or the batch may lie in a later dimension, as the rule checks
        return False
    full = (1,) * (len(rows) - len(shape)) + tuple(shape)
    places = [dim for dim in range(len(rows)) if prod(rows[:dim]) == outer] or [locate(rows, outer)[0]]
    return all(full[dim] != 1 for dim in places)


def summed(t: Tensor, shape: Size, samples: int) -> Tensor:
    """Sum t [rows, *spread] to [samples, *shape]: over a sample's rows, and the dimensions that `shape` was broadcast along."""
    full = (1,) * (t.dim() - 1 - len(shape)) + tuple(shape)
    grad = accumulable(t).reshape(samples, len(t) // samples, *t.shape[1:]).sum_to_size(samples, 1, *full)
    return grad.reshape(samples, *shape)


def _of(call: Call) -> list[tuple[int, Size]]:
    """List (number of the input, shape) of the parameters that enter.

    Raises:
        PrivacyError: a parameter has separate entries for each row of the batch.
    """
    if call.samples > 1:
        dim, _ = call.place
        for shape in call.shapes.values():
            place = dim - (call.gy.dim() - len(shape))
            if place >= 0 and shape[place] != 1:
                raise PrivacyError(
                    f"{call.node.name()} reads a parameter of shape {tuple(shape)} with entries of its own for each row of the "
                    "batch"
                )
    return list(call.shapes.items())


def _recipe(call: Call, shape: Size, scale: float, function: Callable[..., Tensor] | None, *tensors: Tensor) -> Recipe:
    """Make the recipe of scale * function(gy, *tensors), summed to `shape`."""

    def grad(*tensors_and_samples: Any) -> Tensor:
        *operands, samples = tensors_and_samples
        total = summed(function(*map(accumulable, operands)) if function else operands[0], shape, samples)
        return total * scale  # a new tensor: the sum may be gy itself

    operands = tuple(call.apart(t) for t in (call.gy, *(t.expand_as(call.gy) for t in tensors)))
    return Recipe(grad, operands, scratch_bytes=4 * call.gy.numel() if function else 0)
