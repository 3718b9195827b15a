"""The steps that re-lay (rearrange) a parameter before an operation reads it: views, transposes, flips, splits, casts, repeats.

`F.multi_head_attention_forward` splits one weight into three, `PReLU` views its weight as [1, C, 1, 1], einsum permutes. The rule
of the operation gives the gradient of the tensor that it read. The steps from there back to the parameter are linear, the same
for every sample, and move numbers without changing them (those of copies are summed).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Size, Tensor

from fastloda.per_sample.batch_axis import locate
from fastloda.per_sample.node import Node, output_shape
from fastloda.per_sample.operations import (
    ARITHMETIC,
    PERMUTING,
    TILING,
    VIEWS,
    dim_of,
    dims_of,
    kind_of,
    permutation,
    taken_range,
)

Readers = Sequence[tuple[Node, int, int]]  # of a node's outputs: (operation, number of its input, number of the output)


class Step(NamedTuple):
    """The step to output `number` of the operation `node`, whose first input is the parameter or the output of another step."""

    node: Node
    number: int
    scratch_bytes = 0

    @property
    def before(self) -> Size:
        """The shape of the step's input."""
        return output_shape(*self.node.next_functions[0])

    def back(self, grads: Tensor) -> Tensor:
        """Take gradients of the step's output [samples, *after] to those of its input [samples, *before]."""
        return BACK[kind_of(self.node)](self, grads)


def relays(node: Node, readers: Readers, outer: Mapping[Node, int]) -> bool:
    """Tell whether the node only re-lays its input.

    `expand` and `repeat` only re-lay it where `readers` broadcast their output over the batch, and where they make no copy. In
    a batch of one (outer 0) they never do: their one copy may be the sample's.

    outer: node -> the blocks before the batch coordinate in its output.
    """
    if kind_of(node) in TILING:
        no_copy = output_shape(node).numel() == output_shape(*node.next_functions[0]).numel()
        return bool(outer[node]) and no_copy or not _carries_batch(node, readers, outer)
    return is_step(node)


def _carries_batch(node: Node, readers: Readers, outer: Mapping[Node, int]) -> bool:
    """Tell whether `node`, an expand or repeat, makes entries for each row; not if its readers broadcast them over the rows."""
    shape = output_shape(node)
    if not outer[node]:
        return True
    for reader, _, _ in readers:
        read = output_shape(reader)
        if kind_of(reader) not in ARITHMETIC:
            return True
        dim = locate(read, outer[reader])[0] - (len(read) - len(shape))
        if dim >= 0 and shape[dim] == read[dim + len(read) - len(shape)]:
            return True
    return not readers


def is_step(node: Node) -> bool:
    """Tell whether the node re-lays its input, or repeats it."""
    return kind_of(node) in BACK


def back_to_parameter(steps: Sequence) -> Callable[[Tensor], Tensor]:
    """Make the function that takes gradients of the steps' result, [samples, *its shape], to [samples, *parameter.shape]."""

    def back(grads: Tensor) -> Tensor:
        for step in reversed(steps):
            grads = step.back(grads)
        return grads

    return back


def sum_copies(grads: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum gradients [samples, *after] over the copies: [samples, *shape]; sizes of `after` are multiples of those of `shape`."""
    after = grads.shape[1:]
    before = Size((1,) * (len(after) - len(shape)) + tuple(shape))
    if math.prod(after) == before.numel():  # no copies, and no pass over the numbers
        return grads.reshape(len(grads), *shape)
    copies = [size for a, b in zip(after, before) for size in (a // b if b else 1, b)]
    summed = grads.reshape(len(grads), *copies).sum(tuple(range(1, 1 + len(copies), 2))) if copies else grads
    return summed.reshape(len(grads), *shape)


def _untile(step: Step, grads: Tensor) -> Tensor:
    return sum_copies(grads, step.before)


def _reshape(step: Step, grads: Tensor) -> Tensor:
    return grads.reshape(len(grads), *step.before)


def _unpermute(step: Step, grads: Tensor) -> Tensor:
    order = permutation(step.node, len(step.before))
    return grads.permute(0, *(1 + order.index(dim) for dim in range(len(order))))


def _unflip(step: Step, grads: Tensor) -> Tensor:
    return grads.flip([1 + dim for dim in dims_of(step.node, len(step.before))])


def _pad(step: Step, grads: Tensor) -> Tensor:
    """Take gradients of a part of the input to the whole input's, with zeros for the rest."""
    dim = dim_of(step.node, len(step.before))
    part = taken_range(step.node, step.number, step.before, grads.shape[1:])
    grads = grads.unsqueeze(1 + dim) if kind_of(step.node) == "Select" else grads
    whole = grads.new_zeros(len(grads), *step.before)
    whole[(slice(None),) * (1 + dim) + (slice(part.start, part.stop, part.step),)] = grads
    return whole


# Operations that tile are covered by `rules/expand.py` where they copy along the batch, and are steps elsewhere.
BACK = dict.fromkeys(VIEWS, _reshape) | dict.fromkeys(PERMUTING, _unpermute) | dict.fromkeys(TILING, _untile)
BACK |= {"Flip": _unflip} | dict.fromkeys(("Select", "Slice", "Split", "SplitWithSizes"), _pad)
