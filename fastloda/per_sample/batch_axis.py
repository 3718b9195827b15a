"""The place of the batch in the output of each operation, found by a walk over the graph from the losses downwards.

Most models keep the batch first. Attention and recurrent layers compute sequence first, [T, N, C] or T N flattened rows: a
sample's rows are then N apart, not adjacent. One number, `outer`, says where the batch lies. It is the number of blocks before
the batch coordinate in row-major order: 1 where the batch comes first, T in [T, N, C]. Every view of a tensor has the same
`outer`, which makes it easy to follow. 0 stands for a batch of one, whose only sample owns every tensor, wherever its batch
dimension is.

What is found here is a proposal. The probe in `refusals.py` checks it: backward from some samples must leave the rows that
belong to the others exactly zero. A wrong proposal is refused, never used.

Where an index or a mask picks rows, the data decides which sample each row belongs to, and the next batch may decide otherwise.
So the indices are read at every step. If each sample picks its own rows, the walk goes on from these. Otherwise every operation
below is marked as picked, and none of those may use a parameter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample import operations as op
from fastloda.per_sample.node import Edges, Node, output_shape
from fastloda.per_sample.operations import dim_of, dims_of, indexed_dims, indexing, kind_of, own_rows, places
from fastloda.per_sample.regions import COMPILED

LAYER_CALL = "LayerCallFunctionBackward"  # knows where the batch is in each of its outputs: see `layer_call.py`
BATCH_FIRST = op.BATCH_FIRST | {"NativeBatchNorm", LAYER_CALL}
BROADCASTING = op.ARITHMETIC | op.TILING
# Operations whose input may hold the batch in another dimension than their output does.
MOVING = op.REDUCING | op.PERMUTING | op.SELECTING | {"Stack"}
PARTING = op.SLICING | {"Cat"}  # may leave out some of the samples
# Operations that are judged by their kind: a first dimension of another size than the input's proves nothing.
SIZED = op.VIEWS | MOVING | BROADCASTING | PARTING | op.PICKING | op.PLACING | {op.WRITING}
WEIGHTS = {"Addmm": (2,), "Convolution": (1, 2), "Mm": (1,)}  # inputs that all rows share


@dataclass(frozen=True, eq=False)
class Picked:
    """The claim that the data decides which sample each row belongs to.

    Attributes:
        kind: the kind of the operation that picks the rows, or puts them in their places.
        owners: the sample of each row in the operation's output, if that has all samples' rows in another order; else None.
    """

    kind: str
    owners: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Permuted:
    """The claim that an output has all samples' rows in another order, as packed sequences have them.

    Attributes:
        outer: the blocks before the batch coordinate.
        owners: the sample of each row, [rows]. Below the operation that changed the order, they are in order again.
        kind: the kind of that operation.
    """

    outer: int
    owners: Tensor
    kind: str


class Shared:
    """The claim that an output has no rows of the samples: it is the same for all of them."""


SHARED = Shared()
Claim = int | Permuted | Shared | Picked  # what the walk says of an operation's output; an int is its `outer`


class BatchPlaces(NamedTuple):
    """The places of the batch in the outputs of a graph's operations.

    Attributes:
        outer: node -> the number of blocks before the batch coordinate in its output.
        picked: node -> the kind of the operation by which the data decides which sample each of the node's rows belongs to.
        crossings: the kinds of the operations that give a sample the rows of others.
        laid: the nodes whose rows an operation above them may reorder by data that the graph does not show.
        unsure: whether rows may have been picked by data that the graph does not show.
        shared: the nodes whose output has no rows of the samples.
    """

    outer: dict[Node, int]
    picked: dict[Node, str]
    crossings: list[str]
    laid: frozenset[Node] = frozenset()
    unsure: bool = False
    shared: frozenset[Node] = frozenset()


class Reading(NamedTuple):
    """The reading of one input by an operation of the graph."""

    node: Node
    kind: str
    shape: Size  # of the operation's output
    index: int  # the number of the input
    below: Size  # the shape of the input
    rows: int  # the number of samples


def follow_batch(edges: dict[Node, Edges], rows: int) -> BatchPlaces:
    """Follow a batch of `rows` samples from the losses downwards; edges: node -> its edges, each node after its inputs."""
    if rows == 1:
        return BatchPlaces(dict.fromkeys(edges, 0), {}, [])
    claims: dict[Node, Claim] = {}
    unsure = any(map(_writes_rows, edges.items()))
    laid: set[Node] = set()
    taken: list[tuple[Reading, Node]] = []  # readings that may take other samples' rows from a node
    for node in reversed(edges):
        claim = claims.get(node, 1)
        known = isinstance(claim, int)
        claims[node] = claim = 1 if known and kind_of(node) in BATCH_FIRST else claim
        told = node.call.outer_blocks() if known and node.name() == LAYER_CALL else ()
        for reading, child in _readings(node, edges[node], rows):
            below = told[reading.index] if reading.index < len(told) else _claim_below(reading, claim)
            if node in laid or isinstance(claim, int) and _lays_rows(reading, claim):
                laid.add(child)
            if isinstance(claim, Picked) and isinstance(below, int):
                unsure = unsure or not _takes_positions(reading)
            if known and isinstance(below, (Picked, Permuted)) and reading.kind in op.PICKING:
                taken.append((reading, child))
            claims[child] = _stronger(claims.get(child), below)
    outer = {node: claim if isinstance(claim, int) else 1 for node, claim in claims.items()}
    picked = {node: claim.kind for node, claim in claims.items() if isinstance(claim, (Picked, Permuted))}
    shared = frozenset(node for node, claim in claims.items() if isinstance(claim, Shared))
    crossings = [reading.node.name() for reading, child in taken if _takes_along_batch(reading, claims[child])]
    return BatchPlaces(outer, picked, crossings, frozenset(laid), unsure, shared)


def _readings(node: Node, below: Edges, rows: int) -> Iterator[tuple[Reading, Node]]:
    """Yield the readings of a node's inputs, each with the node that made it."""
    kind, shape = kind_of(node), output_shape(node) if below else Size()
    for index, (child, number) in enumerate(below):
        if child is not None:
            yield Reading(node, kind, shape, index, output_shape(child, number), rows), child


def _lays_rows(r: Reading, outer: int) -> bool:
    """Tell whether an operation may compute a sample's rows from any rows of its input, as a product with a permutation can."""
    if r.kind in op.LAYING:
        return True
    if not r.shape or not r.below:
        return False
    dim, _ = locate(r.shape, outer)
    if r.kind in op.LAYING_ALONG:
        return dim in dims_of(r.node, len(r.below))
    if r.kind in op.PRODUCTS:
        *letters, out = op.PRODUCTS[r.kind]
        return out[dim] not in letters[r.index][-len(r.below) :]
    return outer == 1 and r.shape[0] != r.below[0] and r.kind not in SIZED


def _writes_rows(entry: tuple[Node, Edges]) -> bool:
    """Tell whether the node of `entry` is an in-place operation that writes features into a part of a tensor."""
    node, below = entry
    written = [output_shape(*edge) for edge in below[1:] if edge[0] is not None] if node.name() == op.WRITING else []
    return any(shape.numel() != output_shape(node).numel() for shape in written)


def _stronger(known: Claim | None, new: Claim) -> Claim:
    """Choose between two readers' claims on one output: first an int, then Permuted, then Shared, then Picked."""
    rank = lambda claim: (isinstance(claim, int), isinstance(claim, Permuted), isinstance(claim, Shared))  # noqa: E731
    return new if known is None or rank(new) > rank(known) else known


def _claim_below(r: Reading, claim: Claim) -> Claim:
    """Derive the claim on an operation's input from the `claim` on its output."""
    if isinstance(claim, Shared):
        return SHARED
    if isinstance(claim, Permuted):
        return _below_permuted(r, claim)
    if isinstance(claim, Picked):
        return _below_picked(r, claim)
    at = locate(r.shape, claim)
    if r.index in WEIGHTS.get(r.kind, ()) and at == (0, 1):
        return SHARED
    if r.kind in op.PICKING:
        return _below_pick(r, claim)
    if r.kind in op.PLACING and r.index == 1:
        return _below_placing(r, claim)
    if _parts_samples(r, claim, *at):
        return Picked(r.node.name())
    moves = claim != 1 or r.kind in MOVING or r.kind in BROADCASTING
    return _below_move(r, claim) if moves else 1


def _below_permuted(r: Reading, claim: Permuted) -> Claim:
    """Derive the claim below permuted rows: the same order, or the batch's own order below the operation that changed it."""
    if r.kind in op.INDEXING:
        return _below_reorder(r, claim.outer, claim.owners)
    found = _claim_below(r, claim.outer)
    if isinstance(found, Picked):
        return Picked(found.kind, claim.owners)
    return Permuted(found, claim.owners, claim.kind) if isinstance(found, int) else found


def _below_picked(r: Reading, claim: Picked) -> Claim:
    """Derive the claim below picked rows: picked too, unless the operation itself picks along one or more dimensions.

    The first of these must then hold the batch.
    """
    if r.kind not in op.PICKING and not _takes_rows(r):
        return claim
    dims = indexed_dims(r.node, r.below)
    if not dims:
        return claim
    place = prod(r.below[: min(dims)])
    return place if claim.owners is None else Permuted(place, claim.owners, claim.kind)


def _parts_samples(r: Reading, outer: int, dim: int, blocks: int) -> bool:
    """Tell whether an operation outputs, or reads from its input, only a part of the samples; the batch lies in `dim`."""
    if (
        r.kind in PARTING
        and blocks == 1
        and len(r.below) == len(r.shape)
        and r.below[dim : dim + 1] != r.shape[dim : dim + 1]
    ):
        return True
    if r.kind == "Stack" and dim == dim_of(r.node, len(r.shape)):
        return True  # each input has one sample's numbers
    partly = (r.kind == op.WRITING and r.index and r.shape.numel() != r.below.numel()) or _is_python(r.node)
    return bool(partly and r.shape and r.below and r.shape[0] != r.below[0] and outer == 1)


def _is_python(node: Node) -> bool:
    """Tell whether the node is of an autograd.Function that does not declare `keeps_rows`: its rows may be any sample's."""
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and node.name() != COMPILED and not getattr(function, "keeps_rows", False)


def _below_pick(r: Reading, outer: int) -> Claim:
    """Derive the claim on the input of an operation that picks rows: an `outer` if every sample picks rows of its own."""
    if r.kind == op.PACKING:
        return 1 if r.node._saved_batch_first else r.below[0]
    if r.kind not in op.INDEXING or not r.shape:
        return Picked(r.node.name())
    indices, first, others = indexing(r.node, r.below)
    dim, blocks = locate(r.shape, outer)
    for d, place in others.items():
        if place == dim:
            return prod(r.below[:d]) * blocks
    for d, index in indices.items():
        if blocks == 1 and own_rows(index, dim - first, r.below[d], r.rows):
            return prod(r.below[:d])
    return _below_reorder(r, outer, None)


def _below_reorder(r: Reading, outer: int, owners: Tensor | None) -> int | Permuted | Picked:
    """Derive the claim on the input of an index that reorders rows; owners: each output row's sample, None if in order."""
    (dim, index), *more = indexing(r.node, r.below).indices.items()
    if more or index.dim() != 1 or len(index) != r.below[dim] or locate(r.shape, outer) != (dim, 1):
        return Picked(r.node.name())
    in_order = torch.arange(len(index), device=index.device)
    owners = in_order if owners is None else owners
    if r.rows % len(index) or len(owners) != len(index) or not torch.equal(index.sort().values, in_order):
        return Picked(r.node.name())
    found, place = torch.empty_like(owners).index_copy(0, index, owners), prod(r.below[:dim])
    return place if torch.equal(found, in_order) else Permuted(place, found, r.node.name())


def _below_placing(r: Reading, outer: int) -> Claim:
    """Derive the claim on the values that an operation puts into rows: an `outer` if each sample's go into its own rows."""
    dim, blocks = locate(r.shape, outer)
    if dim not in indexed_dims(r.node, r.shape):
        at = dim - (len(r.shape) - len(r.below))
        return prod(r.below[:at]) * blocks if at >= 0 and (dim, blocks) != (0, 1) else 1
    if r.kind == "IndexPut" and r.below and blocks == 1:
        index = indexing(r.node, r.shape).indices[dim]
        if r.below[0] == index.shape[0] and own_rows(index, 0, r.shape[dim], r.rows):
            return 1
    return Picked(r.node.name())


def _takes_rows(r: Reading) -> bool:
    """Tell whether an operation takes a part of its input's first dimension."""
    if r.kind in op.SELECTING:
        return dim_of(r.node, len(r.below)) == 0
    return r.kind in op.SLICING and bool(r.below) and r.shape[0] != r.below[0]


def _takes_positions(r: Reading) -> bool:
    """Tell whether an operation picks by sample and position from [rows, T, ...]; any other input may itself be picked rows."""
    return r.kind == "Index" and r.below[0] == r.rows and indexed_dims(r.node, r.below)[:2] == [0, 1]


def _takes_along_batch(r: Reading, claim: Claim) -> bool:
    """Tell whether an operation picks along the dimension of its input that holds the batch, by the final `claim` on that."""
    return isinstance(claim, int) and bool(r.below) and locate(r.below, claim)[0] in indexed_dims(r.node, r.below)


def _below_move(r: Reading, outer: int) -> int | Shared:
    """Derive where the batch lies in the input of an operation that moves, drops or broadcasts dimensions."""
    if r.kind in op.VIEWS or not r.shape or (r.kind == op.WRITING and r.shape.numel() == r.below.numel()):
        return outer
    at, blocks = locate(r.shape, outer)
    dim = next((d for d, place in places(r.node, r.below, r.shape).items() if place == at), None)
    if r.kind in BROADCASTING and (dim is None or r.below[dim] == 1 < r.shape[at]):
        return SHARED
    return 1 if dim is None else prod(r.below[:dim]) * blocks


def locate(shape: Sequence[int], outer: int) -> tuple[int, int]:
    """Find the dimension that holds the batch coordinate, and how many blocks precede it there; (0, 1) if none holds it."""
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
