"""PyTorch's operations by kind: what each does to a tensor's dimensions, and how to read the arguments that its node saved.

The kind of MulBackward0 is "Mul". Both readers of the graph use this table: `batch_axis.py`, which follows the batch from the
losses downwards, and the sample flow (`sample_flow.py`), which follows the samples from a model's outputs upwards.
"""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Size, Tensor

from fastloda.per_sample.node import Node

NONE, MEAN, SUM = range(3)  # reductions, as PyTorch's losses save them


def _kinds(names: str) -> frozenset[str]:
    return frozenset(names.split())


VIEWS = _kinds("Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View")
HOOKED = "BackwardHookFunctionBackward"  # the identity on each input; it carries a module's full backward hooks
PERMUTING = _kinds("Permute T Transpose")
REDUCING = _kinds(
    "Amax Amin Aminmax Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nanmedian Nansum Norm Prod Std StdMean Sum "
    "Var VarMean"
)
ARITHMETIC = _kinds("Add Addcmul Div Mul Sub")
TILING = _kinds("Expand Repeat")
SELECTING = _kinds("Select Unbind")  # take one index of a dimension, which vanishes
SLICING = _kinds("Slice Split SplitWithSizes")  # take a range of indices of a dimension
POINTWISE = _kinds(  # beside those that PyTorch tags as pointwise
    "BinaryCrossEntropy BinaryCrossEntropyWithLogits Hardswish HuberLoss LogSigmoid MseLoss NativeDropout PreluKernel "
    "RreluWithNoise SmoothL1Loss SoftMarginLoss SpecialXlog1Py Where"
)
ALONG = _kinds(  # these work along some dimensions, which they keep
    "ConstantPadNd Cummax Cummin Cumprod Cumsum Flip Gather Glu LogSoftmax Logcumsumexp Renorm Roll Softmax Sort Topk"
)
# Operations that take the batch in the first dimension; those of the second group also take one sample without a batch.
BATCH_FIRST = _kinds("Convolution NativeGroupNorm")
MAYBE_BATCH_FIRST = _kinds(
    "AdaptiveAvgPool2D AvgPool2D AvgPool3D Im2Col MaxPool2DWithIndices MaxPool3DWithIndices MultiMarginLoss "
    "MultilabelMarginLoss NllLoss NllLoss2D PixelShuffle PixelUnshuffle ReflectionPad2D ReplicationPad2D "
    "UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest2D"
)

# ---- operations that move rows by an index
INDEXING = _kinds("Index IndexSelect")
PACKING = "PackPaddedSequence"
PICKING = INDEXING | _kinds("MaskedSelect SegmentReduce Take") | {PACKING}  # take some of the input's rows
PUTTING = _kinds("IndexAdd IndexCopy IndexPut")
# These put rows of the second input into the first.
PLACING = PUTTING | _kinds("MaskedScatter Scatter ScatterAdd SelectScatter SliceScatter")
WRITING = "torch::autograd::CopySlices"  # writes into a view of the first input; the graph does not say where
# These move rows by indices or lengths that are not read here, the second group along some dimensions only.
LAYING = _kinds("Embedding EmbeddingBag IndexReduce Put ScatterReduce SparseAddmm")
LAYING_ALONG = _kinds("Cummax Cummin Cumprod Cumsum Gather Kthvalue Logcumsumexp Median Mode Roll Sort Topk")

PRODUCTS = {  # einsum's letters of each input and of the output
    "Addmm": ("ij", "ik", "kj", "ij"),
    "Baddbmm": ("bij", "bik", "bkj", "bij"),
    "Bmm": ("bik", "bkj", "bij"),
    "Dot": ("k", "k", ""),
    "Mm": ("ik", "kj", "ij"),
    "Mv": ("ik", "k", "i"),
}
ADDING = _kinds("Add Cat Rsub Stack Sub")  # linear in all inputs together
LINEAR = VIEWS | PERMUTING | SELECTING | SLICING | TILING | ADDING | PRODUCTS.keys() | _kinds("Div Mean Mul Neg Sum")


@cache
def _kind(name: str) -> str:
    known = re.fullmatch(r"(\w+)Backward\d+", name)
    return known[1] if known else name


def kind_of(node: Node) -> str:
    """Name the kind of an operation; one that Python code or TorchScript defines keeps its whole name, without a number."""
    return _kind(node.name())


def is_pointwise(node: Node) -> bool:
    """Tell whether the node is an operation of PyTorch's that treats each number separately."""
    kind = kind_of(node)
    return kind != node.name() and (kind in POINTWISE or _is_tagged_pointwise(kind))


@lru_cache(None)
def _is_tagged_pointwise(kind: str) -> bool:
    spelled = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
    packets = [getattr(torch.ops.aten, name, None) for name in (spelled, kind.lower())]
    tags = [getattr(packet, overload).tags for packet in packets if packet for overload in packet.overloads()]
    return any(torch.Tag.pointwise in found for found in tags)


# ---- what a node saved


def signed(number: int) -> int:
    """Read a dimension or index as a signed number: autograd gives -1 as 2^64 - 1."""
    return number - (1 << 64) if number >= 1 << 63 else number


def wrapped(dim: int, dims: int) -> int:
    return signed(dim) % dims if dims else 0


def dim_of(node: Node, dims: int) -> int:
    """Read the one dimension that an operation works along, of a tensor with `dims` dimensions."""
    return wrapped(getattr(node, "_saved_dim", 0), dims)


def dims_of(node: Node, dims: int) -> set[int]:
    """Read which dimensions an operation works along, of a tensor with `dims` dimensions; all if it saved none."""
    saved = getattr(node, "_saved_dims", getattr(node, "_saved_dim", None))
    saved = [saved] if isinstance(saved, int) else saved or range(dims)
    return {wrapped(dim, dims) for dim in saved}


def permutation(node: Node, dims: int) -> list[int]:
    """Read which dimension of the input each dimension of the output was, from a node that permutes them."""
    order = list(range(dims))
    kind = kind_of(node)
    if kind == "Permute":
        return [wrapped(dim, dims) for dim in node._saved_dims]
    if kind == "T":
        return order[::-1]
    a, b = wrapped(node._saved_dim0, dims), wrapped(node._saved_dim1, dims)
    if dims:
        order[a], order[b] = order[b], order[a]
    return order


def places(node: Node, before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Map each dimension of an input to the one that it becomes in the output; those that vanish are left out.

    Views, products and operations that pick rows by an index are treated elsewhere. All operations that are not named here
    align the dimensions of input and output from the last one on.
    """
    dims, kind = len(before), kind_of(node)
    if kind in PERMUTING:
        return {d: place for place, d in enumerate(permutation(node, dims))}
    if kind in SELECTING:
        dim = dim_of(node, dims)
        return {d: d - (d > dim) for d in range(dims) if d != dim}
    if kind == "Stack":
        return {d: d + (d >= dim_of(node, len(after))) for d in range(dims)}
    if kind in REDUCING and len(after) < dims:
        return {d: place for place, d in enumerate(sorted(set(range(dims)) - dims_of(node, dims)))}
    return {d: d + max(0, len(after) - dims) for d in range(dims)}


def taken_range(node: Node, number: int, before: Sequence[int], after: Sequence[int]) -> range:
    """Read which indices of its dimension the output `number` of a selecting or slicing operation takes."""
    kind, dim = kind_of(node), dim_of(node, len(before))
    if kind == "Unbind":
        return range(number, number + 1)
    if kind == "Select":
        index = signed(node._saved_index) % before[dim]
        return range(index, index + 1)
    if kind == "Slice":
        end = getattr(node, "_saved_end", None)
        end = None if end is None else signed(end)
        return range(before[dim])[signed(node._saved_start or 0) : end : node._saved_step]
    sizes = getattr(node, "_saved_split_sizes", None)
    start = sum(sizes[:number]) if sizes is not None else number * node._saved_split_size
    return range(start, start + after[dim])


# ---- indices


class Indexing(NamedTuple):
    """The way in which an index reads from a tensor, or writes into it.

    Attributes:
        indices: each indexed dimension of the tensor -> its index, all broadcast to one shape.
        first: the dimension of the result at which that shape begins.
        places: each other dimension of the tensor -> the dimension of the result that it becomes.
    """

    indices: dict[int, Tensor]
    first: int
    places: dict[int, int]


def indexing(node: Node, shape: Size) -> Indexing:
    """Read the indices that an operation saved, for an indexed tensor of `shape`; a mask over d dimensions is d indices."""
    by_dim = _indices_by_dim(node, shape)
    dims = list(by_dim)
    indices = dict(zip(dims, torch.broadcast_tensors(*by_dim.values())))
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    first, count = dims[0] if adjacent else 0, indices[dims[0]].dim()
    others = [d for d in range(len(shape)) if d not in indices]
    return Indexing(indices, first, {d: place + (place >= first) * count for place, d in enumerate(others)})


def _indices_by_dim(node: Node, shape: Size) -> dict[int, Tensor]:
    if kind_of(node) in ("IndexAdd", "IndexCopy", "IndexSelect"):
        return {dim_of(node, len(shape)): node._saved_index.reshape(-1)}
    indices = []
    for index in node._saved_indices:
        indices += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return {d: index % size for d, (index, size) in enumerate(zip(indices, shape)) if index is not None}


def indexed_dims(node: Node, shape: Size) -> list[int]:
    """List the dimensions along which a node picks rows from a tensor, or puts rows into it; all if the node does not say."""
    kind = kind_of(node)
    if kind in INDEXING or kind == "IndexPut":
        return list(_indices_by_dim(node, shape))
    if kind == PACKING:
        return [0 if node._saved_batch_first else 1]
    return sorted(dims_of(node, len(shape)))


def own_rows(index: Tensor, dim: int, size: int, rows: int) -> bool:
    """Tell whether each entry of index, sample-major along dim, points to its own sample's among `size` sample-major rows."""
    if index.shape[dim] % rows or size % rows:
        return False
    owners = torch.arange(rows, device=index.device).repeat_interleave(index.shape[dim] // rows)
    return bool((index // (size // rows) == owners.view(-1, *[1] * (index.dim() - dim - 1))).all())
