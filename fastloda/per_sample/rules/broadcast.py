"""Rules for a parameter that is combined with features and broadcast along the batch: biases, scales, position tables, slopes.

Its gradient is grad_output times the factor by which the operation multiplies it, summed over all dimensions that it was
broadcast along. A parameter with entries of its own for each row of the batch has no gradient per sample.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.batch_axis import locate, output_shape
from fastloda.per_sample.node import Node
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.tensors import accumulable

Factor = Callable[..., Tensor]  # (gy, *factors) -> the parameter's gradient before it is summed


def add(call: Call) -> dict[int, Recipe]:
    """Make the recipes of a + alpha b: inputs 0 a and 1 b."""
    factors = (1, call.node._saved_alpha)
    return {
        index: _recipe(call, shape, lambda gy, f=factors[index]: gy, scale=factors[index]) for index, shape in _of(call)
    }


def sub(call: Call) -> dict[int, Recipe]:
    """Make the recipes of a - alpha b: inputs 0 a and 1 b."""
    factors = (1, -call.node._saved_alpha)
    return {index: _recipe(call, shape, lambda gy: gy, scale=factors[index]) for index, shape in _of(call)}


def mul(call: Call) -> dict[int, Recipe]:
    """Make the recipes of a b: inputs 0 a and 1 b, each saved only if the other needs a gradient."""
    others = lambda index: (call.node._saved_other, call.node._saved_self)[index]  # noqa: E731
    return {index: _recipe(call, shape, lambda gy, other: gy * other, others(index)) for index, shape in _of(call)}


def div(call: Call) -> dict[int, Recipe]:
    """Make the recipes of a / b: inputs 0 a and 1 b."""
    node = call.node
    recipes = {}
    for index, shape in _of(call):
        if index == 0:
            recipes[0] = _recipe(call, shape, lambda gy, b: gy / b, node._saved_other)
        else:
            recipes[1] = _recipe(call, shape, lambda gy, a, b: -gy * (a / b) / b, node._saved_self, node._saved_other)
    return recipes


def addcmul(call: Call) -> dict[int, Recipe]:
    """Make the recipes of a + value b c: inputs 0 a, 1 b and 2 c."""
    node = call.node
    recipes = {}
    for index, shape in _of(call):
        if index == 0:
            recipes[0] = _recipe(call, shape, lambda gy: gy)
        else:
            other = node._saved_tensor2 if index == 1 else node._saved_tensor1
            recipes[index] = _recipe(call, shape, lambda gy, other: gy * other, other, scale=node._saved_value)
    return recipes


def prelu(call: Call) -> dict[int, Recipe]:
    """Make the recipe of PReLU, x where x > 0, else weight x: input 1 weight, viewed so that it broadcasts."""
    negative = lambda gy, x: gy * x.clamp(max=0)  # noqa: E731
    return {index: _recipe(call, shape, negative, call.node._saved_self) for index, shape in _of(call)}


def where(call: Call) -> dict[int, Recipe]:
    """Make the recipes of where(condition, a, b): inputs 0 a and 1 b."""
    held = call.node._saved_condition
    return {index: _recipe(call, shape, torch.mul, held if index == 0 else ~held) for index, shape in _of(call)}


def masked_fill(call: Call) -> dict[int, Recipe]:
    """Make the recipe of a.masked_fill(mask, number): input 0 a."""
    return {index: _recipe(call, shape, torch.mul, ~call.node._saved_mask) for index, shape in _of(call)}


def varies_along_batch(node: Node, shape: Size, outer: int) -> bool:
    """Tell whether a parameter that enters in `shape` may have entries of its own for each row, or there are no rows at all."""
    rows = output_shape(node)
    if not rows:
        return True
    if not outer or rows[0] == 1:  # a batch of one; or the batch may lie in a later dimension, which the rule checks
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
        PrivacyError: a parameter has entries of its own for each row of the batch.
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


def _recipe(call: Call, shape: Size, product: Factor, *factors: Tensor, scale: float = 1) -> Recipe:
    """Make the recipe of scale * product(gy, *factors), summed to `shape`."""

    def grad(*tensors_and_samples: Any) -> Tensor:
        *tensors, samples = tensors_and_samples
        total = summed(product(*map(accumulable, tensors)) if factors else tensors[0], shape, samples)
        return total * scale  # a new tensor: the sum may be gy itself

    tensors = tuple(call.apart(t) for t in (call.gy, *(factor.expand_as(call.gy) for factor in factors)))
    return Recipe(grad, tensors, scratch_bytes=4 * call.gy.numel() if factors else 0)
