"""Where the batch lies in the output of each operation, read off the graph from the losses downwards.

Most models keep the batch first. Attention and recurrent layers compute sequence first, [T, N, C] or T N flattened rows: a
sample's rows are then N apart, not together. `outer` tells: the number of blocks before the batch coordinate in row-major
order, 1 where the batch comes first, T in [T, N, C]. It is the same for every view of a tensor, which is what makes it easy
to follow. 0 stands for a lone row, which owns every tensor, wherever its batch dimension is.

What is read here is a proposal. The probe in `coverage.py` checks it: backward from some samples must leave the rows that
belong to the others exactly zero. A wrong proposal is refused, never used.
"""

from collections.abc import Mapping, Sequence
from math import prod

from torch import Size, Tensor
from torch.autograd.graph import Node

Edges = tuple[tuple[Node | None, int], ...]  # to the nodes that gradients go to, and which of their outputs each is


def _kinds(names: str, number: int = 0) -> set[str]:
    return {f"{name}Backward{number}" for name in names.split()}


REDUCING = _kinds("Amax Amin LinalgVectorNorm Logsumexp Max Min Std Var") | _kinds("Mean Norm Prod Sum", 1)
# an input of these may hold the batch elsewhere than the output does
PACKING = "PackPaddedSequenceBackward0"
MOVING = REDUCING | _kinds("Permute Select Stack T Transpose Unbind") | _kinds("Transpose", 1) | {PACKING}
VIEWING = _kinds("Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View")
VIEWING |= _kinds("Squeeze", 1) | _kinds("Squeeze", 2)
ELEMENTWISE = _kinds("Add Addcmul Div Mul Sub")
RECORDED = "RecordedFunctionBackward"  # tells where the batch is in each of its outputs: see `recorded.py`
BATCH_FIRST = _kinds("Convolution NativeBatchNorm NativeGroupNorm") | {RECORDED}  # by definition


def outer_blocks(edges: Mapping[Node, Edges], rows: int) -> dict[Node, int]:
    """Node -> blocks before the batch coordinate in its output. edges: of each node, which comes before the ones that read it."""
    if rows == 1:
        return dict.fromkeys(edges, 0)
    outer: dict[Node, int] = {}
    for node, below_it in reversed(edges.items()):
        kind = node.name()
        outer[node] = found = 1 if kind in BATCH_FIRST else outer.get(node, 1)
        told = node.call.outer_blocks() if kind == RECORDED else ()
        for index, (child, number) in enumerate(below_it):
            if child is not None and child not in outer:
                moved = found != 1 or kind in MOVING
                below = _below(node, kind, found, child, number) if moved else 1
                outer[child] = told[index] if index < len(told) else below
    return outer


def output_shape(node: Node, number: int = 0) -> Size:
    return Size(node._input_metadata[number].shape)


def locate(shape: Sequence[int], outer: int) -> tuple[int, int]:
    """-> (the dimension that holds the batch coordinate, the blocks before it within this dimension); (0, 1) if none does."""
    before = 1
    for dim, size in enumerate(shape):
        if outer < before * size and outer % before == 0:
            return dim, outer // before
        before *= size
    return 0, 1


def batch_apart(t: Tensor, dim: int, blocks: int) -> Tensor:
    """[..., blocks x batch, ...] -> [batch, ..., blocks, ...]: a view."""
    return t.unflatten(dim, (blocks, t.shape[dim] // blocks)).movedim(dim + 1, 0)


def signed(dim: int) -> int:
    """Autograd tells -1 as 2^64 - 1."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim


def wrapped(dim: int, dims: int) -> int:
    return signed(dim) % dims if dims else 0


def _below(node: Node, kind: str, outer: int, child: Node, number: int) -> int:
    """`outer` of the input that is output `number` of child."""
    shape, below = output_shape(node), output_shape(child, number)
    if kind == PACKING:
        return 1 if node._saved_batch_first else below[0]
    if kind in VIEWING or not shape:
        return outer
    dim, blocks = locate(shape, outer)
    dim = _dim_below(node, kind, dim, len(shape), len(below))
    return prod(below[:dim]) * blocks if 0 <= dim < len(below) else 1


def _dim_below(node: Node, kind: str, dim: int, dims: int, dims_below: int) -> int:
    """The dimension of an input that becomes dimension `dim` of the output; negative: the input is broadcast along it."""
    if kind == "TBackward0":
        return dims - 1 - dim
    if kind in ("TransposeBackward0", "TransposeBackward1"):
        a, b = wrapped(node._saved_dim0, dims), wrapped(node._saved_dim1, dims)
        return {a: b, b: a}.get(dim, dim)
    if kind == "PermuteBackward0":
        return wrapped(node._saved_dims[dim], dims)
    if kind in ("SelectBackward0", "UnbindBackward0"):
        return dim + (dim >= wrapped(node._saved_dim, dims_below))
    if kind == "StackBackward0":
        return dim - (dim > wrapped(node._saved_dim, dims))
    if kind in REDUCING and dims < dims_below:
        return dict(enumerate(_kept_dims(node, dims_below))).get(dim, dim)
    return dim - max(0, dims - dims_below)  # element by element, products, convolutions, ...: aligned


def _kept_dims(node: Node, dims: int) -> list[int]:
    summed = node._saved_dim
    summed = [summed] if isinstance(summed, int) else summed or range(dims)
    summed = {wrapped(dim, dims) for dim in summed}
    return [dim for dim in range(dims) if dim not in summed]


def carries_batch(node: Node, consumers: Sequence[tuple[Node, int, int]], outer: Mapping[Node, int]) -> bool:
    """Whether what `node` repeats has entries for each row: not where it is then broadcast along the batch."""
    shape = output_shape(node)
    if not outer[node]:
        return True
    for consumer, _, _ in consumers:
        read = output_shape(consumer)
        if consumer.name() not in ELEMENTWISE:
            return True
        dim = locate(read, outer[consumer])[0] - (len(read) - len(shape))
        if dim >= 0 and shape[dim] == read[dim + len(read) - len(shape)]:
            return True
    return not consumers
