"""Steps that re-lay a parameter before an operation reads it: views, transpositions, splits, casts, repetitions.

`F.multi_head_attention_forward` splits one weight into three, `PReLU` views its weight as [1, C, 1, 1], einsum permutes. The rule
of the operation gives the gradient of what it read. The steps back from there to the parameter are linear, the same for every
sample, and move numbers without changing them (those of a repetition are summed).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Size, Tensor

from fastloda.per_sample.batch_axis import VIEWING, output_shape, signed, wrapped
from fastloda.per_sample.node import Node


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
        return RELAYING.get(self.node.name(), _untiled)(self, grads)


def relays(node: Node, outer: int) -> bool:
    """Tell whether the node only re-lays its input, whatever reads its output.

    `expand` and `repeat` do where they make no copy, except in a batch of one (outer 0), where the one copy may be the batch's.
    """
    if node.name() in TILING:
        return bool(outer) and output_shape(node).numel() == output_shape(*node.next_functions[0]).numel()
    return node.name() in RELAYING


def back_to_parameter(steps: Sequence) -> Callable[[Tensor], Tensor]:
    """Make the function from gradients of what the steps made, [samples, *its shape], to [samples, *parameter.shape]."""

    def back(grads: Tensor) -> Tensor:
        for step in reversed(steps):
            grads = step.back(grads)
        return grads

    return back


def untiled(grads: Tensor, before: Sequence[int]) -> Tensor:
    """Sum gradients [samples, *after] over the copies: [samples, *before]; dimensions of `after` are multiples of `before`'s."""
    after = grads.shape[1:]
    before = (1,) * (len(after) - len(before)) + tuple(before)
    copies = [size for a, b in zip(after, before) for size in (a // b if b else 1, b)]
    grads = grads.reshape(len(grads), *copies).sum(tuple(range(1, 1 + len(copies), 2))) if copies else grads
    return grads


def _untiled(step: Step, grads: Tensor) -> Tensor:
    return untiled(grads, step.before).reshape(len(grads), *step.before)


def _reshaped(step: Step, grads: Tensor) -> Tensor:
    return grads.reshape(len(grads), *step.before)


def _turned(step: Step, grads: Tensor) -> Tensor:
    return grads.mT if grads.dim() == 3 else grads  # x.t() of a vector is the vector


def _transposed(step: Step, grads: Tensor) -> Tensor:
    dims = len(step.before)
    return grads.transpose(1 + wrapped(step.node._saved_dim0, dims), 1 + wrapped(step.node._saved_dim1, dims))


def _permuted(step: Step, grads: Tensor) -> Tensor:
    order = [1 + wrapped(dim, len(step.before)) for dim in step.node._saved_dims]
    return grads.permute(0, *sorted(range(1, len(order) + 1), key=lambda dim: order[dim - 1]))


def _padded(step: Step, grads: Tensor) -> Tensor:
    """Take gradients of a part of the input to the whole input's, with zeros for the rest."""
    node, before = step.node, step.before
    dim = wrapped(node._saved_dim, len(before))
    whole = grads.new_zeros(len(grads), *before)
    if node.name() == "SelectBackward0":
        whole.select(1 + dim, signed(node._saved_index)).copy_(grads)
        return whole
    if node.name() == "SliceBackward0":
        part = slice(signed(node._saved_start or 0), signed(node._saved_end), node._saved_step)
    else:
        sizes = getattr(node, "_saved_split_sizes", None)
        start = sum(sizes[: step.number]) if sizes is not None else step.number * node._saved_split_size
        part = slice(start, start + grads.shape[1 + dim])
    whole[(slice(None),) * (1 + dim) + (part,)] = grads
    return whole


TILING = {"ExpandBackward0", "RepeatBackward0"}  # along the batch covered by `rules/expand.py`; steps otherwise
RELAYING = dict.fromkeys(VIEWING, _reshaped)
RELAYING |= {"TBackward0": _turned, "TransposeBackward0": _transposed, "PermuteBackward0": _permuted}
RELAYING |= dict.fromkeys(("SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"), _padded)
