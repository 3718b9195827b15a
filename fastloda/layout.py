"""Where the batch lies in the output of each operation, read off the graph from the losses downwards.

Most models keep the batch first. Attention and recurrent layers compute sequence first, [T, N, C] or T N flattened rows: a
sample's rows are then N apart, not together. `outer` tells: the number of blocks before the batch coordinate in row-major
order, 1 where the batch comes first, T in [T, N, C]. It is the same for every view of a tensor, which is what makes it easy
to follow. 0 stands for a lone row, which owns every tensor, wherever its batch dimension is.

What is read here is a proposal. The probe in `coverage.py` checks it: backward from some samples must leave the rows that
belong to the others exactly zero. A wrong proposal is refused, never used.

Rows that are picked by an index or a mask are whose the data says, another time otherwise. So the indices are read at every step:
if each sample finds its own rows, they are followed; else what lies below is marked as picked, which no parameter may be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.autograd.graph import Node

from fastloda.errors import PrivacyError
from fastloda.regions import COMPILED

Edges = tuple[tuple[Node | None, int], ...]  # to the nodes that gradients go to, and which of their outputs each is


def _kinds(names: str, number: int = 0) -> set[str]:
    return {f"{name}Backward{number}" for name in names.split()}


REDUCING = _kinds("Amax Amin LinalgVectorNorm Logsumexp Max Min Std Var") | _kinds("Mean Norm Prod Sum", 1)
# an input of these may hold the batch elsewhere than the output does
PACKING = "PackPaddedSequenceBackward0"
MOVING = REDUCING | _kinds("Permute Select Stack T Transpose Unbind") | _kinds("Transpose", 1)
VIEWING = _kinds("Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View")
VIEWING |= _kinds("Squeeze", 1) | _kinds("Squeeze", 2)
ELEMENTWISE = _kinds("Add Addcmul Div Mul Sub")
BROADCASTING = ELEMENTWISE | _kinds("Expand Repeat")
RECORDED = "RecordedFunctionBackward"  # tells where the batch is in each of its outputs: see `recorded.py`
OURS = {RECORDED, COMPILED, "LoDAFunctionBackward"}
BATCH_FIRST = _kinds("Convolution NativeBatchNorm NativeGroupNorm") | {RECORDED}  # by definition
ORDERING = _kinds("Index IndexSelect")
PARTING = _kinds("Slice Split SplitWithSizes Cat")  # may leave some of the samples
PICKING = _kinds(
    "Index IndexSelect MaskedSelect PackPaddedSequence SegmentReduce Take"
)  # the output's rows, of the input's
PLACING = _kinds(
    "IndexAdd IndexCopy IndexPut MaskedScatter Scatter ScatterAdd SelectScatter SliceScatter"
)  # the second's
WRITING = "torch::autograd::CopySlices"  # into a view of the first input: where, the graph does not say
# of rows by indices or lengths that are not read here
LAYING = _kinds("Embedding EmbeddingBag IndexReduce Put ScatterReduce SparseAddmm")
LAYING_ALONG = _kinds(
    "Cummax Cummin Cumprod Cumsum Gather Kthvalue Logcumsumexp Median Mode Roll Sort Topk"
)  # along dimensions
PRODUCTS = {  # einsum's letters of each input and of the output
    "AddmmBackward0": ("ij", "ik", "kj", "ij"),
    "BaddbmmBackward0": ("bij", "bik", "bkj", "bij"),
    "BmmBackward0": ("bik", "bkj", "bij"),
    "MmBackward0": ("ik", "kj", "ij"),
    "MvBackward0": ("ik", "k", "i"),
}
WEIGHTS = {"AddmmBackward0": (2,), "ConvolutionBackward0": (1, 2), "MmBackward0": (1,)}  # inputs that all rows share


@dataclass(frozen=True, eq=False)
class Picked:
    """Rows of which the data says whose they are, by an operation of this kind.

    Attributes:
        owners: of all samples' rows, if these are some of them in another order.
    """

    kind: str
    owners: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Permuted:
    """All samples' rows in another order, as packed sequences have them.

    Attributes:
        outer: as of rows in order.
        owners: the sample of each row; it is in order once more where an operation puts the rows back.
    """

    outer: int
    owners: Tensor
    kind: str


class Shared:
    """No rows: the same for all samples."""


SHARED = Shared()
Claim = int | Permuted | Shared | Picked  # of an operation's output; a number is `outer`


class BatchPlaces(NamedTuple):
    """Where the batch lies, by node.

    Attributes:
        outer: blocks before the batch coordinate in its output.
        picked: the kind of operation that picks or lays its rows as the data says.
        crossings: kinds of operations that hand a sample the rows of others.
        laid: nodes whose rows an operation above may lay as the data says, which the graph does not tell.
        unsure: whether rows may have been picked by data where the graph does not tell.
        shared: operations whose output has no rows of the samples.
    """

    outer: dict[Node, int]
    picked: dict[Node, str]
    crossings: list[str]
    laid: frozenset[Node] = frozenset()
    unsure: bool = False
    shared: frozenset[Node] = frozenset()


def follow_batch(edges: Mapping[Node, Edges], rows: int) -> BatchPlaces:
    """Follow a batch of `rows` samples downwards. edges: of each node, which comes before the ones that read it."""
    if rows == 1:
        return BatchPlaces(dict.fromkeys(edges, 0), {}, [])
    claims: dict[Node, Claim] = {}
    unsure = any(map(_writes_rows, edges.items()))
    laid: set[Node] = set()
    taken = []  # (kind of operation, its input, the input's dimension by which rows of other samples are taken)
    for node, below_it in reversed(edges.items()):
        kind, claim = node.name(), claims.get(node, 1)
        claims[node] = claim = 1 if kind in BATCH_FIRST and isinstance(claim, int) else claim
        told = node.call.outer_blocks() if kind == RECORDED and isinstance(claim, int) else ()
        for index, (child, number) in enumerate(below_it):
            if child is None:
                continue
            below = told[index] if index < len(told) else _claim_below(node, kind, claim, index, child, number, rows)
            if (
                node in laid
                or isinstance(claim, int)
                and _lays_rows(node, kind, claim, index, output_shape(child, number))
            ):
                laid.add(child)
            if isinstance(claim, Picked) and isinstance(below, int):
                unsure = unsure or not _takes_positions(node, kind, output_shape(child, number), rows)
            if isinstance(below, (Picked, Permuted)) and isinstance(claim, int) and kind in PICKING:
                taken.append((kind, child, number, _indexed_dims(node, kind, output_shape(child, number))))
            claims[child] = _stronger(claims.get(child), below)
    crossings = [
        kind for kind, child, number, dims in taken if _lies_in(claims[child], output_shape(child, number), dims)
    ]
    outer = {node: claim if isinstance(claim, int) else 1 for node, claim in claims.items()}
    picked = {node: claim.kind for node, claim in claims.items() if isinstance(claim, (Picked, Permuted))}
    shared = frozenset(node for node, claim in claims.items() if isinstance(claim, Shared))
    return BatchPlaces(outer, picked, crossings, frozenset(laid), unsure, shared)


def _lays_rows(node: Node, kind: str, outer: int, index: int, below: Size) -> bool:
    """Whether an operation may make a sample's rows of any of its input's: a product with a matrix of ones and zeros can."""
    shape = output_shape(node)
    if kind in LAYING:
        return True
    if not shape or not below:
        return False
    dim, _ = locate(shape, outer)
    if kind in LAYING_ALONG:
        dims = getattr(node, "_saved_dims", None) or [getattr(node, "_saved_dim", 0)]
        return dim in {wrapped(d, len(below)) for d in dims}
    if kind in PRODUCTS:
        *letters, out = PRODUCTS[kind]
        return out[dim] not in letters[index][-len(below) :]
    return outer == 1 and shape[0] != below[0] and kind not in SIZED


SIZED = VIEWING | MOVING | BROADCASTING | PARTING | PICKING | PLACING | {WRITING}  # known above, or by sizes


def _writes_rows(entry: tuple[Node, Edges]) -> bool:
    """Whether an operation in place writes features into a part of a tensor."""
    node, below = entry
    written = [output_shape(*edge) for edge in below[1:] if edge[0] is not None] if node.name() == WRITING else []
    return any(shape.numel() != output_shape(node).numel() for shape in written)


def _stronger(known: Claim | None, new: Claim) -> Claim:
    """Of two readers' claims: one that knows the place, before one that shares it, before one that picks."""
    rank = lambda claim: (isinstance(claim, int), isinstance(claim, Permuted), isinstance(claim, Shared))  # noqa: E731
    return new if known is None or rank(new) > rank(known) else known


def _claim_below(node: Node, kind: str, claim: Claim, index: int, child: Node, number: int, rows: int) -> Claim:
    """What an operation with this claim says of its input."""
    below = output_shape(child, number)
    if isinstance(claim, Shared):
        return SHARED
    if isinstance(claim, Permuted):
        found = _claim_below(node, kind, claim.outer, index, child, number, rows)
        if kind in ORDERING:
            return _reordered(node, kind, claim.outer, claim.owners, below, rows)
        if isinstance(found, Picked):
            return Picked(found.kind, claim.owners)
        return Permuted(found, claim.owners, claim.kind) if isinstance(found, int) else found
    if isinstance(claim, Picked):
        first = (
            min(_indexed_dims(node, kind, below), default=None)
            if kind in PICKING or _takes_rows(node, kind, below)
            else None
        )
        if first is None:
            return claim
        place = prod(below[:first])
        return place if claim.owners is None else Permuted(place, claim.owners, claim.kind)
    shape = output_shape(node)
    if index in WEIGHTS.get(kind, ()) and locate(shape, claim) == (0, 1):
        return SHARED
    if kind in PICKING:
        return _picked_from(node, kind, claim, below, rows)
    if kind in PLACING and index == 1:
        return _placed_into(node, kind, claim, below, rows)
    if kind in PARTING:
        dim, blocks = locate(shape, claim)
        if blocks == 1 and dim < len(below) and len(below) == len(shape) and below[dim] != shape[dim]:
            return Picked(kind)
    if kind == "StackBackward0" and locate(shape, claim) == (wrapped(node._saved_dim, len(shape)), 1):
        return Picked(kind)  # one sample's numbers each
    partly = (kind == WRITING and index and shape.numel() != below.numel()) or _is_python(node)
    if partly and shape and below and shape[0] != below[0] and claim == 1:
        return Picked(kind)
    moved = claim != 1 or kind in MOVING or kind in BROADCASTING
    return _below(node, kind, claim, child, number) if moved else 1


def _is_python(node: Node) -> bool:
    """Whether somebody's autograd.Function made the node, whose rows may be anybody's."""
    return hasattr(type(node), "_forward_cls") and node.name() not in OURS


def _reordered(
    node: Node, kind: str, outer: int, owners: Tensor | None, below: Size, rows: int
) -> int | Permuted | Picked:
    """Of the input whose rows an index puts into another order; owners: of the output's rows, if they are in none."""
    by_dim = indices_by_dim(node, kind, below)
    (dim, index), *more = [(d, index) for d, index in enumerate(by_dim) if index is not None]
    if more or index.dim() != 1 or len(index) != below[dim] or locate(output_shape(node), outer) != (dim, 1):
        return Picked(kind)
    in_order = torch.arange(len(index), device=index.device)
    owners = in_order if owners is None else owners
    if rows % len(index) or len(owners) != len(index) or not torch.equal(index.sort().values, in_order):
        return Picked(kind)
    found, place = torch.empty_like(owners).index_copy(0, index, owners), prod(below[:dim])
    return place if torch.equal(found, in_order) else Permuted(place, found, kind)


def _picked_from(node: Node, kind: str, outer: int, below: Size, rows: int) -> Claim:
    """Of the input whose rows an operation picks: its own place if every sample picks rows of its own."""
    if kind == PACKING:
        return 1 if node._saved_batch_first else below[0]
    if kind not in ORDERING or not output_shape(node):
        return Picked(kind)
    by_dim = indices_by_dim(node, kind, below)
    advanced = [d for d, index in enumerate(by_dim) if index is not None]
    indices = dict(zip(advanced, torch.broadcast_tensors(*(by_dim[d] for d in advanced))))
    count = indices[advanced[0]].dim()
    first = advanced[0] if advanced == list(range(advanced[0], advanced[-1] + 1)) else 0
    dim, blocks = locate(output_shape(node), outer)
    if not first <= dim < first + count:
        kept = [d for d in range(len(below)) if d not in indices]
        place = kept[dim if dim < first else dim - count]
        return prod(below[:place]) * blocks
    for d, index in indices.items():
        if blocks == 1 and own_rows(index, dim - first, below[d], rows):
            return prod(below[:d])
    return _reordered(node, kind, outer, None, below, rows)


def _placed_into(node: Node, kind: str, outer: int, values: Size, rows: int) -> Claim:
    """Of the values that an operation lays into rows: their own place if every sample lays rows of its own."""
    shape = output_shape(node)
    dim, blocks = locate(shape, outer)
    dims = _indexed_dims(node, kind, shape)
    if dim not in dims:
        return 1 if (dim, blocks) == (0, 1) else _aligned_below(shape, values, dim, blocks)
    if kind == "IndexPutBackward0" and values and blocks == 1:
        index = torch.broadcast_tensors(*(i for i in indices_by_dim(node, kind, shape) if i is not None))[
            dims.index(dim)
        ]
        if values[0] == index.shape[0] and own_rows(index, 0, shape[dim], rows):
            return 1
    return Picked(kind)


def _aligned_below(shape: Size, below: Size, dim: int, blocks: int) -> int:
    dim -= len(shape) - len(below)
    return prod(below[:dim]) * blocks if dim >= 0 else 1


def own_rows(index: Tensor, dim: int, size: int, rows: int) -> bool:
    """Whether `index`, into a dimension of `size` numbers, finds only its own sample's; both are sample-major along `dim`."""
    if index.shape[dim] % rows or size % rows:
        return False
    owners = torch.arange(rows, device=index.device).repeat_interleave(index.shape[dim] // rows)
    return bool((index // (size // rows) == owners.view(-1, *[1] * (index.dim() - dim - 1))).all())


def indices_by_dim(node: Node, kind: str, shape: Sequence[int]) -> list[Tensor | None]:
    """The index into each dimension of the indexed tensor; a mask over several dimensions is one for each."""
    if kind in ("IndexAddBackward0", "IndexCopyBackward0", "IndexSelectBackward0"):
        indices = [None] * len(shape)
        indices[wrapped(node._saved_dim, len(shape))] = node._saved_index.reshape(-1)
        return indices
    indices = []
    for index in node._saved_indices:
        indices += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    indices = [index if index is None else index % size for index, size in zip(indices, shape)]
    return indices + [None] * (len(shape) - len(indices))


def _indexed_dims(node: Node, kind: str, shape: Sequence[int]) -> list[int]:
    """The dimensions of the tensor that the rows are picked from, or laid into, by which they are."""
    if kind in ("IndexBackward0", "IndexPutBackward0", "IndexSelectBackward0"):
        return [d for d, index in enumerate(indices_by_dim(node, kind, shape)) if index is not None]
    if kind == PACKING:
        return [0 if node._saved_batch_first else 1]
    dim = getattr(node, "_saved_dim", None)
    return list(range(len(shape))) if dim is None else [wrapped(dim, len(shape))]


def _takes_rows(node: Node, kind: str, below: Size) -> bool:
    """Whether an operation takes some of its input's first dimension."""
    if kind in ("SelectBackward0", "UnbindBackward0"):
        return wrapped(node._saved_dim, len(below)) == 0
    return kind in PARTING and kind != "CatBackward0" and bool(below) and output_shape(node)[0] != below[0]


def _takes_positions(node: Node, kind: str, below: Size, rows: int) -> bool:
    """Whether an operation picks by sample and position, [rows, T, ...]; what has less may have been picked before."""
    return kind == "IndexBackward0" and below[0] == rows and _indexed_dims(node, kind, below)[:2] == [0, 1]


def _lies_in(claim: Claim, shape: Size, dims: Sequence[int]) -> bool:
    return isinstance(claim, int) and bool(shape) and locate(shape, claim)[0] in dims


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
    if t.shape[dim] % blocks:
        raise PrivacyError(f"a tensor of shape {tuple(t.shape)} has no batch in dimension {dim}: it must come first")
    return t.unflatten(dim, (blocks, t.shape[dim] // blocks)).movedim(dim + 1, 0)


def signed(dim: int) -> int:
    """Autograd tells -1 as 2^64 - 1."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim


def wrapped(dim: int, dims: int) -> int:
    return signed(dim) % dims if dims else 0


def _below(node: Node, kind: str, outer: int, child: Node, number: int) -> Claim:
    """What a reader that knows its own place says of its input, output `number` of child."""
    shape, below = output_shape(node), output_shape(child, number)
    if kind in VIEWING or not shape or (kind == WRITING and shape.numel() == below.numel()):
        return outer
    at, blocks = locate(shape, outer)
    dim = _dim_below(node, kind, at, len(shape), len(below))
    if kind in BROADCASTING and (dim < 0 or below[dim] == 1 < shape[at]):
        return SHARED
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
