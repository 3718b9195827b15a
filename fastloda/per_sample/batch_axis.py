"""Where the batch lies in the output of each operation, read off the graph from the losses downwards.

Most models keep the batch first. Attention and recurrent layers compute sequence first, [T, N, C] or T N flattened rows: a
sample's rows are then N apart, not together. One number, `outer`, says where the batch lies: how many blocks come before the
batch coordinate in row-major order, 1 where the batch comes first, T in [T, N, C]. Every view of a tensor has the same `outer`,
which makes it easy to follow. 0 stands for a batch of one, whose only sample owns every tensor, wherever its batch dimension is.

What is read here is a proposal. The probe in `refusals.py` checks it: backward from some samples must leave the rows that
belong to the others exactly zero. A wrong proposal is refused, never used.

Rows that are picked by an index or a mask belong to the samples that the data says, others in the next batch. So the indices are
read at every step: if each sample picks its own rows, these are followed; else every operation below is marked as picked, and
none of those may use a parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node
from fastloda.per_sample.regions import COMPILED

Edges = tuple[tuple[Node | None, int], ...]  # for each input of a node: what made it, and which of its outputs it is


def _kinds(names: str, number: int = 0) -> set[str]:
    return {f"{name}Backward{number}" for name in names.split()}


REDUCING = _kinds("Amax Amin LinalgVectorNorm Logsumexp Max Min Std Var") | _kinds("Mean Norm Prod Sum", 1)
PACKING = "PackPaddedSequenceBackward0"
# An input of these may hold the batch in another dimension than the output does.
MOVING = REDUCING | _kinds("Permute Select Stack T Transpose Unbind") | _kinds("Transpose", 1)
VIEWING = _kinds("Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View")
VIEWING |= _kinds("Squeeze", 1) | _kinds("Squeeze", 2)
ELEMENTWISE = _kinds("Add Addcmul Div Mul Sub")
BROADCASTING = ELEMENTWISE | _kinds("Expand Repeat")
LAYER_CALL = "LayerCallFunctionBackward"  # tells where the batch is in each of its outputs: see `layer_call.py`
BATCH_FIRST = _kinds("Convolution NativeBatchNorm NativeGroupNorm") | {LAYER_CALL}  # by definition
ORDERING = _kinds("Index IndexSelect")  # may put rows into another order
PARTING = _kinds("Slice Split SplitWithSizes Cat")  # may leave out some of the samples
PICKING = _kinds(
    "Index IndexSelect MaskedSelect PackPaddedSequence SegmentReduce Take"
)  # take some of the input's rows
PLACING = _kinds(
    "IndexAdd IndexCopy IndexPut MaskedScatter Scatter ScatterAdd SelectScatter SliceScatter"
)  # put the second input's rows into the first
WRITING = "torch::autograd::CopySlices"  # writes into a view of the first input; the graph does not say where
# These move rows by indices or lengths that are not read here, the second group along some dimensions only.
LAYING = _kinds("Embedding EmbeddingBag IndexReduce Put ScatterReduce SparseAddmm")
LAYING_ALONG = _kinds("Cummax Cummin Cumprod Cumsum Gather Kthvalue Logcumsumexp Median Mode Roll Sort Topk")
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
    """The claim that the data decides which sample each row belongs to.

    Attributes:
        kind: the kind of the operation that picks or lays the rows.
        owners: the sample of each row before the picking, if they were all samples' rows in another order.
    """

    kind: str
    owners: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Permuted:
    """The claim that an output has all samples' rows in another order, as packed sequences have them.

    Attributes:
        outer: the blocks before the batch coordinate.
        owners: the sample of each row, [rows]; in order again below the operation that changed the order.
        kind: the kind of that operation.
    """

    outer: int
    owners: Tensor
    kind: str


class Shared:
    """The claim that an output has no rows of the samples: it is the same for all of them."""


SHARED = Shared()
Claim = int | Permuted | Shared | Picked  # what is said of an operation's output; an int is its `outer`


class BatchPlaces(NamedTuple):
    """The places of the batch in the outputs of a graph's operations.

    Attributes:
        outer: node -> the number of blocks before the batch coordinate in its output.
        picked: node -> the kind of the operation by which the data decides whose its rows are.
        crossings: the kinds of the operations that hand a sample the rows of others.
        laid: the nodes whose rows an operation above may reorder by data that the graph does not show.
        unsure: whether rows may have been picked by data that the graph does not show.
        shared: the nodes whose output has no rows of the samples.
    """

    outer: dict[Node, int]
    picked: dict[Node, str]
    crossings: list[str]
    laid: frozenset[Node] = frozenset()
    unsure: bool = False
    shared: frozenset[Node] = frozenset()


def follow_batch(edges: dict[Node, Edges], rows: int) -> BatchPlaces:
    """Follow a batch of `rows` samples from the losses downwards; edges: node -> its edges, each node after its inputs."""
    if rows == 1:
        return BatchPlaces(dict.fromkeys(edges, 0), {}, [])
    claims: dict[Node, Claim] = {}
    unsure = any(map(_writes_rows, edges.items()))
    laid: set[Node] = set()
    taken = []  # (kind of operation, its input, the input's dimension by which rows of other samples are taken)
    for node, below_it in reversed(edges.items()):
        kind, claim = node.name(), claims.get(node, 1)
        claims[node] = claim = 1 if kind in BATCH_FIRST and isinstance(claim, int) else claim
        told = node.call.outer_blocks() if kind == LAYER_CALL and isinstance(claim, int) else ()
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
    """Tell whether an operation may make a sample's rows of any rows of its input, as a product with a permutation matrix can."""
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


# Another first size of these says nothing: they are judged by their kind.
SIZED = VIEWING | MOVING | BROADCASTING | PARTING | PICKING | PLACING | {WRITING}


def _writes_rows(entry: tuple[Node, Edges]) -> bool:
    """Tell whether the node of `entry` is an in-place operation that writes features into a part of a tensor."""
    node, below = entry
    written = [output_shape(*edge) for edge in below[1:] if edge[0] is not None] if node.name() == WRITING else []
    return any(shape.numel() != output_shape(node).numel() for shape in written)


def _stronger(known: Claim | None, new: Claim) -> Claim:
    """Choose between two readers' claims on one output: a known place, before another order, before none, before picked rows."""
    rank = lambda claim: (isinstance(claim, int), isinstance(claim, Permuted), isinstance(claim, Shared))  # noqa: E731
    return new if known is None or rank(new) > rank(known) else known


def _claim_below(node: Node, kind: str, claim: Claim, index: int, child: Node, number: int, rows: int) -> Claim:
    """Tell what an operation whose output has `claim` says of its input number `index`, output `number` of `child`."""
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
        return Picked(kind)  # each input has one sample's numbers
    partly = (kind == WRITING and index and shape.numel() != below.numel()) or _is_python(node)
    if partly and shape and below and shape[0] != below[0] and claim == 1:
        return Picked(kind)
    moved = claim != 1 or kind in MOVING or kind in BROADCASTING
    return _below(node, kind, claim, child, number) if moved else 1


def _is_python(node: Node) -> bool:
    """Tell whether the node is an autograd.Function's that does not declare `keeps_rows`: its rows may be any sample's."""
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and node.name() != COMPILED and not getattr(function, "keeps_rows", False)


def _reordered(
    node: Node, kind: str, outer: int, owners: Tensor | None, below: Size, rows: int
) -> int | Permuted | Picked:
    """Tell what an index that reorders rows says of its input; owners: each output row's sample, None if they are in order."""
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
    """Tell what an operation that picks rows says of its input: its `outer` if every sample picks rows of its own."""
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
    """Tell what an operation that puts values into rows says of the values: their `outer` if every sample puts in its own."""
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
    """Tell whether entries of index, sample-major along dim, point to their own sample's among `size` sample-major numbers."""
    if index.shape[dim] % rows or size % rows:
        return False
    owners = torch.arange(rows, device=index.device).repeat_interleave(index.shape[dim] // rows)
    return bool((index // (size // rows) == owners.view(-1, *[1] * (index.dim() - dim - 1))).all())


def indices_by_dim(node: Node, kind: str, shape: Sequence[int]) -> list[Tensor | None]:
    """List the index into each dimension of the indexed tensor (None: not indexed); a mask over d dimensions gives d indices."""
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
    """List the dimensions along which rows are picked from a tensor, or put into it."""
    if kind in ("IndexBackward0", "IndexPutBackward0", "IndexSelectBackward0"):
        return [d for d, index in enumerate(indices_by_dim(node, kind, shape)) if index is not None]
    if kind == PACKING:
        return [0 if node._saved_batch_first else 1]
    dim = getattr(node, "_saved_dim", None)
    return list(range(len(shape))) if dim is None else [wrapped(dim, len(shape))]


def _takes_rows(node: Node, kind: str, below: Size) -> bool:
    """Tell whether an operation takes a part of its input's first dimension."""
    if kind in ("SelectBackward0", "UnbindBackward0"):
        return wrapped(node._saved_dim, len(below)) == 0
    return kind in PARTING and kind != "CatBackward0" and bool(below) and output_shape(node)[0] != below[0]


def _takes_positions(node: Node, kind: str, below: Size, rows: int) -> bool:
    """Tell whether an operation picks by sample and position from [rows, T, ...]; other inputs may have been picked before."""
    return kind == "IndexBackward0" and below[0] == rows and _indexed_dims(node, kind, below)[:2] == [0, 1]


def _lies_in(claim: Claim, shape: Size, dims: Sequence[int]) -> bool:
    return isinstance(claim, int) and bool(shape) and locate(shape, claim)[0] in dims


def output_shape(node: Node, number: int = 0) -> Size:
    return Size(node._input_metadata[number].shape)


def locate(shape: Sequence[int], outer: int) -> tuple[int, int]:
    """Find the dimension that holds the batch coordinate, and the blocks before it within that dimension; (0, 1) if none does."""
    before = 1
    for dim, size in enumerate(shape):
        if outer < before * size and outer % before == 0:
            return dim, outer // before
        before *= size
    return 0, 1


def batch_apart(t: Tensor, dim: int, blocks: int) -> Tensor:
    """Bring the batch of t [..., blocks x batch, ...] first, as a view [batch, ..., blocks, ...].

    Raises:
        PrivacyError: the dimension is no multiple of `blocks`.
    """
    if t.shape[dim] % blocks:
        raise PrivacyError(f"a tensor of shape {tuple(t.shape)} has no batch in dimension {dim}: it must come first")
    return t.unflatten(dim, (blocks, t.shape[dim] // blocks)).movedim(dim + 1, 0)


def signed(dim: int) -> int:
    """Read a dimension or index as a signed number: autograd gives -1 as 2^64 - 1."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim


def wrapped(dim: int, dims: int) -> int:
    return signed(dim) % dims if dims else 0


def _below(node: Node, kind: str, outer: int, child: Node, number: int) -> Claim:
    """Tell what an operation that knows its own `outer` says of its input, output `number` of `child`."""
    shape, below = output_shape(node), output_shape(child, number)
    if kind in VIEWING or not shape or (kind == WRITING and shape.numel() == below.numel()):
        return outer
    at, blocks = locate(shape, outer)
    dim = _dim_below(node, kind, at, len(shape), len(below))
    if kind in BROADCASTING and (dim < 0 or below[dim] == 1 < shape[at]):
        return SHARED
    return prod(below[:dim]) * blocks if 0 <= dim < len(below) else 1


def _dim_below(node: Node, kind: str, dim: int, dims: int, dims_below: int) -> int:
    """Find the dimension of an input that becomes dimension `dim` of the output; negative: the input is broadcast along it."""
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
    """Tell whether the output of `node`, an expand or repeat, has entries for each row; no if readers broadcast it over them."""
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
