"""The transfer functions of the sample flow: how samples pass through each kind of operation between model outputs and loss.

Each function finds the state of an operation's output from inputs in which each number belongs to one sample (`Rows`), or
refuses the operation.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from torch import Size

from fastloda.errors import PrivacyError
from fastloda.per_sample import operations
from fastloda.per_sample.operations import (
    MEAN,
    NONE,
    Indexing,
    dim_of,
    dims_of,
    indexing,
    own_rows,
    signed,
    taken_range,
)
from fastloda.per_sample.states import MEAN_OF_ALL, PICKED, REMEDY, One, Operation, Rows, State, Total

if TYPE_CHECKING:  # sample_flow.py imports these
    from fastloda.per_sample.sample_flow import SampleFlow

Transfer = Callable[["SampleFlow", Operation[Rows]], State]
SUMMING = ("Mean", "Sum")


def pointwise(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the state of an operation that treats each number separately, or of a criterion that does and may then reduce."""
    return _criterion(flow, op) if getattr(op.node, "_saved_reduction", NONE) != NONE else _align(flow, op)


def _align(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the rows of an operation that works number by number, with broadcasting."""
    states = []
    for given in op.inputs:
        shift = len(op.shape) - len(given.shape)
        states.append(op.move(given, {d: d + shift for d in range(len(given.shape))}))
    joint = op.joint(states)
    for given in op.inputs:
        flow.check_growth(op, given)
    return joint


def _criterion(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the state of a criterion that has reduced its losses."""
    op.joint([given.state for given in op.inputs])
    mean = op.node._saved_reduction == MEAN
    if mean and _is_normalised_by_targets(op):
        raise PrivacyError(
            "the loss is divided by the class weights of the batch, or by the number of its targets that are not ignored: "
            "each sample's share depends on the other samples. fastloda.CrossEntropyLoss divides by a sample's own (a Hugging "
            f"Face model's loss: that of out.logits). {REMEDY}"
        )
    return _sum(flow, op, mean)


def _is_normalised_by_targets(op: Operation[Rows]) -> bool:
    """Tell whether a mean divides by anything but equally many targets of each sample, as nll_loss (in cross_entropy) may."""
    node = op.node
    weight = getattr(node, "_saved_weight", None) if hasattr(node, "_saved_total_weight") else None
    if weight is not None and (weight != weight[0]).any():
        return True
    ignored = getattr(node, "_saved_ignore_index", None)
    if ignored is None:
        return False
    rows, left_out = op.inputs[0].state, node._saved_target == signed(ignored)
    by_entry = left_out.reshape(rows.outer, rows.entries, -1).sum((0, 2))
    # if equally many are ignored for each sample, as in sequences that are shifted by one, the divisor is public
    return bool((by_entry != by_entry[0]).any())


def _sum(flow: "SampleFlow", op: Operation[Rows], mean: bool) -> Total:
    op.check_not_lent()
    if mean and not flow.is_even(op.inputs[0].state.owners):
        op.refuse("averages over a part of the samples: take a sum")
    return MEAN_OF_ALL if mean else flow.sum_of(flow.weights_of(op))


def _view(flow: "SampleFlow", op: Operation[Rows]) -> State:
    state = op.inputs[0].state
    if not state.fits(op.shape):
        op.refuse("cuts the outputs across the samples")
    return state


def _permute(flow: "SampleFlow", op: Operation[Rows]) -> State:
    return op.move(op.inputs[0])


def _reduce(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the state of a sum, mean, maximum, norm, ... over some dimensions."""
    (given,) = op.inputs
    if dims_of(op.node, len(given.shape)).isdisjoint(given.state.dims(given.shape)):
        return op.move(given)
    if op.kind not in SUMMING:
        op.refuse("is taken over the samples")
    return _sum(flow, op, mean=op.kind == "Mean")


def _along(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the rows of a softmax, sort, flip, padding, ... along some dimensions, none of which may hold the batch."""
    (given,) = op.inputs
    if not _dims_along(op, given.shape).isdisjoint(given.state.dims(given.shape)):
        op.refuse("works along the samples, or moves them")
    return op.move(given)


def _dims_along(op: Operation[Rows], shape: Size) -> set[int]:
    count = len(shape)
    if op.kind == "ConstantPadNd":  # a batch may be padded at one end and cut at the other, and keep its size
        pad = op.node._saved_pad
        return {d for d in range(count) if any(pad[2 * (count - 1 - d) : 2 * (count - d)])}
    dims = dims_of(op.node, count)
    return set(range(count)) - dims if op.kind == "Renorm" else dims  # Renorm takes norms over all dimensions but one


def _repeat(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the rows of a repeat: the batch several times over, one after the other, or copies within each sample's numbers."""
    (given,) = op.inputs
    state, batch = given.state, given.state.dims(given.shape)
    dim, entries, shift = batch[-1], given.state.entries, len(op.shape) - len(given.shape)
    size = op.shape[dim + shift]
    if size == given.shape[dim] or batch != [dim] or given.shape[dim] != entries:
        return _align(flow, op)
    return replace(state, outer=prod(op.shape[: dim + shift]), owners=state.owners * (size // entries))


def _part(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the state of one index, or a range of indices, of a dimension."""
    (given,) = op.inputs
    state, batch, dim = given.state, given.state.dims(given.shape), dim_of(op.node, len(given.shape))
    if dim not in batch:
        return op.move(given)
    op.check_not_lent()
    if batch != [dim] or given.shape[dim] != state.entries:
        op.refuse("tears the rows of the batch apart")
    chosen = taken_range(op.node, op.number, given.shape, op.shape)
    flow.pick(given, chosen)
    owners = state.owners[chosen.start : chosen.stop : chosen.step]
    if len(owners) == 1:
        return One(owners[0])
    return Rows(state.outer, owners) if owners else MEAN_OF_ALL


def _join(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the rows of a Cat or Stack."""
    dim = dim_of(op.node, len(op.shape))
    batches = [given.state.dims(given.shape) for given in op.inputs]
    if op.kind == "Stack" or not any(dim in batch for batch in batches):
        return op.joint([op.move(given) for given in op.inputs])
    entries = sum(given.state.entries for given in op.inputs)
    simple = all(batch == [dim] for batch in batches)
    if not simple or entries != op.shape[dim] or len({given.state.outer for given in op.inputs}) > 1:
        op.refuse("puts outputs and other values into one batch")
    op.check_not_lent()
    return Rows(op.inputs[0].state.outer, tuple(owner for given in op.inputs for owner in given.state.owners))


def _product(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the state of a matrix product: of rows and constants, or of each sample's own matrices."""
    *letters, out = operations.PRODUCTS[op.kind]
    apart, contracted = [], []
    for given in op.inputs:
        own = letters[given.index][-len(given.shape) :]  # the input that Addmm adds may be a vector
        to = {d: out.index(letter) for d, letter in enumerate(own) if letter in out}
        batch = given.state.dims(given.shape)
        if all(d in to for d in batch):
            apart.append(op.move(given, to))
        elif len(batch) == 1 and given.shape[batch[0]] == given.state.entries:
            op.check_not_lent()
            contracted.append((own[batch[0]], given.state.owners))
        else:
            op.refuse("tears the rows of the batch apart")
    if len(op.inputs) == 1 and apart:  # the other factor is a constant, which brings dimensions of its own
        own = letters[op.inputs[0].index]
        flow.check_beside(op, op.inputs[0], [d for d, letter in enumerate(out) if letter not in own])
    if (apart and contracted) or len(set(contracted)) > 1:
        op.refuse("multiplies outputs of different samples")
    return flow.sum_of(flow.weights_of(op)) if contracted else op.joint(apart)


def _batch_first(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the state of an operation that is defined for a batch in the first dimension."""
    first = all(given.index == 0 and given.state.dims(given.shape) == [0] for given in op.inputs)
    if getattr(op.node, "_saved_reduction", NONE) != NONE:
        if not first or len(op.inputs[0].shape) == 1:
            op.refuse("compares outputs of different samples: it wants them as [samples, classes, ...]")
        return _criterion(flow, op)
    return op.joint([op.move(given, {0: 0}) for given in op.inputs]) if first else flow.unknown(op)


def _layer_norm(flow: "SampleFlow", op: Operation[Rows]) -> State:
    given = op.inputs[0]
    first = len(given.shape) - len(op.node._saved_normalized_shape)
    if given.index or len(op.inputs) > 1 or any(d >= first for d in given.state.dims(given.shape)):
        op.refuse("normalises over the samples")
    return given.state


def _ctc(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the rows of ctc_loss(log_probs [T, N, C]) -> [N]."""
    (given,) = op.inputs
    if given.state.dims(given.shape) != [1]:
        op.refuse("wants the batch second: [T, N, C]")
    return replace(given.state, outer=1)


def _index(flow: "SampleFlow", op: Operation[Rows]) -> State:
    """Find the rows of x[indices]: each sample picks from its own rows, or the picked rows are marked as lent."""
    (given,) = op.inputs
    state, batch = given.state, given.state.dims(given.shape)
    indices, first, places = _read_indexing(op, given.shape)
    own_places = {}
    for d in batch:
        if d in places:
            continue
        index, size = indices[d], given.shape[d]
        own = [e for e in range(index.dim()) if index.shape[e] == size and own_rows(index, e, size, size)]
        if own:
            own_places[d] = first + own[0]
        elif batch == [d] and size == state.entries and index.dim() == 1:
            owners = tuple(state.owners[i] for i in index.tolist())
            return Rows(prod(op.shape[:first]), owners, lent=True)
        else:
            op.refuse(PICKED)
    return op.move(given, places | own_places)


def put_back(flow: "SampleFlow", op: Operation) -> State:
    """Find the state after x[index] = values, or += values, which must put lent rows back into their own samples' rows."""
    base, values = ([given for given in op.inputs if (given.index == 0) == first] for first in (True, False))
    if any(not isinstance(given.state, Rows) for given in op.inputs):
        return flow.linear(op)
    (dim, index), *more = _read_indexing(op, op.shape).indices.items()
    outer = prod(op.shape[:dim])
    into = base[0].state if base else Rows(outer, flow.whole)
    if not values:
        return into
    (given,) = values
    alone = given.state.entries == index.numel() == 1  # PyTorch drops the dimension of a single value
    along = len(given.shape) == len(op.shape) and given.state.entries == given.shape[dim] and given.state.outer == outer
    whole = into.outer == outer and into.entries == op.shape[dim]
    if more or index.dim() != 1 or not (along or alone) or not whole:
        return flow.unknown(op)
    if tuple(into.owners[i] for i in index.tolist()) != given.state.owners:
        op.refuse("puts samples into the rows of others")
    return into


def _read_indexing(op: Operation, shape: Size) -> Indexing:
    try:
        return indexing(op.node, shape)
    except Exception as error:  # of any type, from whatever packed the indices: checkpointing, hooks
        op.refuse_unseen(f"can't be read ({error}): leave the criterion out of torch.utils.checkpoint")


TRANSFERS: dict[str, Transfer] = dict.fromkeys(operations.VIEWS, _view)
TRANSFERS |= dict.fromkeys(operations.PERMUTING, _permute) | dict.fromkeys(operations.PRODUCTS, _product)
TRANSFERS |= dict.fromkeys(operations.REDUCING, _reduce) | dict.fromkeys(operations.ALONG, _along)
TRANSFERS |= dict.fromkeys(operations.SELECTING | operations.SLICING | {"UnsafeSplit"}, _part) | dict.fromkeys(
    operations.INDEXING, _index
)
TRANSFERS |= dict.fromkeys(operations.BATCH_FIRST | operations.MAYBE_BATCH_FIRST, _batch_first)
TRANSFERS |= {"Expand": _align, "Repeat": _repeat, "Cat": _join, "Stack": _join}
TRANSFERS |= {"NativeLayerNorm": _layer_norm, "CtcLoss": _ctc}
