"""Parameters that are re-laid before an operation reads them: viewed, transposed, split, cast, repeated.

`F.multi_head_attention_forward` splits one weight into three, `PReLU` views its weight as [1, C, 1, 1], einsum permutes. The rule
of the operation gives the gradient of what it read; the steps back from there to the parameter are linear, the same
for every sample, and move numbers without changing them (a repeated one is a sum).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Size, Tensor

from fastloda.per_sample.batch_axis import VIEWING, output_shape, signed, wrapped
from fastloda.per_sample.node import Node


class Step(NamedTuple):
    """Output `number` of the operation `node`, whose first input is the parameter or an earlier step."""

    node: Node
    number: int
    scratch_bytes = 0

    @property
    def before(self) -> Size:
        """The shape of the input."""
        return output_shape(*self.node.next_functions[0])

    def back(self, grads: Tensor) -> Tensor:
        """[samples, *after] -> [samples, *before]."""
        return RELAYING.get(self.node.name(), _untiled)(self, grads)


def relays(node: Node, outer: int) -> bool:
    """Whether it only re-lays its input, whatever reads that.

    `expand` and `repeat` do where they make no copy, unless that is for the single copy of a lone row, where outer is 0.
    """
    if node.name() in TILING:
        return bool(outer) and output_shape(node).numel() == output_shape(*node.next_functions[0]).numel()
    return node.name() in RELAYING


def back_to_parameter(steps: Sequence) -> Callable[[Tensor], Tensor]:
    """[samples, *as the operation read it] -> [samples, *parameter.shape]."""

    def back(grads: Tensor) -> Tensor:
        for step in reversed(steps):
            grads = step.back(grads)
        return grads

    return back


def untiled(grads: Tensor, before: Sequence[int]) -> Tensor:
    """[samples, *after] -> [samples, *before], each dimension after a multiple of that before: summed over the copies."""
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
    """A part of the input, and zeros for the rest."""
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


TILING = {"ExpandBackward0", "RepeatBackward0"}  # along the batch, or not: then a step like the others
RELAYING = dict.fromkeys(VIEWING, _reshaped)
RELAYING |= {"TBackward0": _turned, "TransposeBackward0": _transposed, "PermuteBackward0": _permuted}
RELAYING |= dict.fromkeys(("SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"), _padded)
