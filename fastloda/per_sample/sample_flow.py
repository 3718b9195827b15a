"""The check that a loss is a sum of terms each of which depends on the model's outputs for one sample alone.

It reads the autograd graph of the loss from the model's outputs upwards. Operations may treat each sample's numbers apart
(`Rows`); one sum or mean then adds up the samples (`Total`), and only linear operations may follow. Whatever else happens across
samples (a product, maximum, sort, softmax, index or broadcast along the batch, or a nonlinear function of the sum) couples
them and is refused by the operation's name. An operation that is not known here is tried out: its own backward is run.

A graph does not show values that have no gradient, such as targets that were standardised over the batch.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Generic, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Size, Tensor
from torch.autograd.graph import GradientEdge

from fastloda.errors import PrivacyError
from fastloda.per_sample import batch_axis as layout
from fastloda.per_sample.batch_axis import Edges, indices_by_dim, output_shape, signed, wrapped
from fastloda.per_sample.node import Node
from fastloda.per_sample.regions import COMPILED, may_run_again

NONE, MEAN = 0, 1  # reductions, as PyTorch's losses save them
PICKED = (
    "samples' outputs are picked along the batch, by an index or a mask, by which each one's share may depend on the others: "
    "multiply each sample's loss by 0 or 1 instead, or put what was picked back into its own rows"
)
REMEDY = (
    "The loss must be the mean, or sum, of one loss per sample: take the criterion with reduction='none', which gives these, and "
    "then its .mean()"
)


@dataclass(frozen=True)
class Rows:
    """The state of a tensor each of whose numbers belongs to one sample; in row-major order [outer, entries, rest].

    Attributes:
        outer: the number of blocks before the batch coordinate, which no view of a tensor changes.
        owners: the samples along the batch coordinate, in runs.
        lent: whether an index has picked the entries, which must be put back into their own rows before anything is added up.
    """

    outer: int
    owners: tuple[range, ...]
    lent: bool = False

    @property
    def entries(self) -> int:
        return sum(map(len, self.owners))

    @property
    def numbers(self) -> list[int]:
        """The sample that each entry belongs to, in order."""
        return [owner for run in self.owners for owner in run]

    def belong(self, shape: Sequence[int], chosen: Tensor) -> Tensor:
        """Mark the numbers of the chosen samples: bool [samples] -> bool, of `shape`."""
        entries = chosen[self.numbers].view(1, -1, 1)
        return entries.expand(self.outer, -1, prod(shape) // (self.outer * self.entries)).reshape(shape)

    def dims(self, shape: Sequence[int]) -> list[int]:
        """List the dimensions over which the batch coordinate is spread: one, unless a view has split it."""
        if self.entries == 1:
            return [d for d, n in enumerate(shape) if n == 1 and prod(shape[:d]) == self.outer][:1]
        inner = prod(shape) // (self.outer * self.entries)
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        top = inner * self.entries
        return [d for d, (n, s) in enumerate(zip(shape, strides)) if n > 1 and max(s, inner) < min(s * n, top)]

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell whether every index along a dimension of `shape` stands for whole samples; a view may cut across them."""
        inner = prod(shape) // (self.outer * self.entries)
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        ends = (inner, inner * self.entries)
        return all(end % s == 0 for end in ends for n, s in zip(shape, strides) if s < end < s * n)

    def moved(self, before: Sequence[int], after: Sequence[int], places: Mapping[int, int]) -> "Rows | None":
        """Compute the rows after dimension d of `before` became places[d] of `after`; None if that tears the batch apart."""
        dims = self.dims(before)
        now = [places.get(d, -1) for d in dims]
        adjacent = now and now[0] >= 0 and now == list(range(now[0], now[0] + len(now)))
        if not adjacent or any(before[d] != after[n] for d, n in zip(dims, now)):
            return None
        return replace(self, outer=prod(after[: now[0]]) * (self.outer // prod(before[: dims[0]])))


@dataclass(frozen=True)
class One:
    """The state of a tensor whose numbers all belong to the sample `owner`."""

    owner: int


@dataclass(frozen=True)
class Total:
    """The state of a tensor whose numbers are sums over samples, linear in terms of single ones.

    Attributes:
        averaged: whether a mean, a division by a multiple of the number of samples, or one by an unknown value made it.
        by: the other numbers that the sum was multiplied with.
    """

    averaged: bool
    by: tuple[float, ...] = ()


State = Rows | One | Total
S = TypeVar("S", bound=State)
MEAN_OF_ALL, SUM_OF_ALL = Total(averaged=True), Total(averaged=False)


class Input(NamedTuple, Generic[S]):
    """The differentiable input number `index` of an operation: its state and shape, and the (node, output) it comes from."""

    index: int
    state: S
    shape: Size
    source: tuple[Node, int]


class Operation(NamedTuple, Generic[S]):
    """An operation of the loss's graph, one of its outputs, and those of its inputs that depend on the model's outputs."""

    node: Node
    kind: str  # the node's name without "Backward0"
    number: int  # which output of the node
    shape: Size  # the shape of that output
    inputs: list[Input[S]]

    def refuse(self, why: str) -> NoReturn:
        raise PrivacyError(f"samples mix in the loss: {self.kind} {why}. {REMEDY}")

    def refuse_unseen(self, why: str) -> NoReturn:
        raise PrivacyError(f"whether samples mix in the loss can't be seen: {self.kind} {why}. {REMEDY}")

    def dims(self, name: str = "_saved_dim") -> set[int]:
        """Find the dimensions of the first input that the operation works along, saved as `name`; all if none are saved."""
        count = len(self.inputs[0].shape)
        saved = getattr(self.node, name, None)
        saved = [saved] if isinstance(saved, int) else (list(saved) if saved else range(count))
        return {wrapped(dim, count) for dim in saved}

    def moved(self, given: Input[Rows], places: Mapping[int, int]) -> Rows:
        """Compute the output's rows, if dimension d of the input became places[d]; refuse what tears the batch apart."""
        found = given.state.moved(given.shape, self.shape, places)
        if found is None:
            self.refuse("tears the rows of the batch apart")
        return found


# ---- operations by kind


def _names(text: str) -> set[str]:
    return set(text.split())


VIEWS = _names(
    "Alias Clone ReshapeAlias Squeeze ToCopy UnsafeView Unsqueeze View Contiguous BackwardHookFunction Detach"
)
POINTWISE = _names(
    "Hardswish LogSigmoid NativeDropout PreluKernel Prelu Rrelu RreluWithNoise Xlog1Py SpecialXlog1Py Where Real"
)
POINTWISE |= _names(
    "BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss KlDiv MseLoss SmoothL1Loss SoftMarginLoss"
)
REDUCING = _names(
    "Amax Amin Aminmax Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Nanmedian Nansum Norm Prod Std"
)
REDUCING |= _names("StdMean Sum Var VarMean")
SUMMING = _names("Mean Sum")
ALONG = _names("Cummax Cummin Cumprod Cumsum Gather LogSoftmax Logcumsumexp Softmax Sort Topk Glu")
PRODUCTS = {kind.removesuffix("Backward0"): letters for kind, letters in layout.PRODUCTS.items()}
PRODUCTS |= {"Dot": ("k", "k", "")}
BATCH_FIRST = _names(
    "Convolution MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D MaxPool1D AvgPool3D MaxPool3DWithIndices"
)
BATCH_FIRST |= _names(
    "UpsampleNearest2D UpsampleBilinear2D UpsampleBicubic2D ReflectionPad2D ReplicationPad2D NativeGroupNorm"
)
BATCH_FIRST |= _names(
    "PixelShuffle PixelUnshuffle Im2Col NllLoss NllLoss2D NllLossNd MultiMarginLoss MultilabelMarginLoss"
)
PUTTING = _names("IndexAdd IndexCopy IndexPut")
LINEAR = (
    VIEWS
    | set(PRODUCTS)
    | _names("Add Cat Div Expand Mean Mul Neg Permute Repeat Rsub Select Slice Split SplitWithSizes Stack")
)
LINEAR |= _names("Sub Sum T Transpose Unbind")


@lru_cache(None)
def _is_pointwise(kind: str) -> bool:
    """Tell whether an operation treats each number apart, by PyTorch's own tags; kind: its name in CamelCase."""
    spelled = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
    packets = [getattr(torch.ops.aten, name, None) for name in (spelled, kind.lower())]
    tags = [getattr(packet, overload).tags for packet in packets if packet for overload in packet.overloads()]
    return kind in POINTWISE or any(torch.Tag.pointwise in found for found in tags)


def _kind(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


# ---- the flow from the outputs upwards


class SampleFlow:
    """The flow of the samples from a model's outputs up to a loss.

    Args:
        samples: the rows of every output.
        grown: place in the graph -> the size to which a constant broadcast a dimension there, in earlier losses; written to.
    """

    def __init__(self, samples: int, grown: MutableMapping[tuple, int]):
        self.samples, self.whole, self.grown = samples, (range(samples),), grown
        self.states: dict[tuple[Node, int], State] = {}
        self.picked: dict[tuple[Node, int], Counter] = defaultdict(Counter)
        self.sizes: dict[tuple[Node, int], int] = {}

    def check(
        self, below: Mapping[Node, Edges], outputs: Mapping[Node, int], roots: Iterable[tuple[Node, int]]
    ) -> None:
        """Refuse a loss that is not a sum of one term for each sample.

        Args:
            below: node -> its edges, for each node below the loss, after its inputs.
            outputs: node -> how many outputs it has, all outputs of the model, [samples, ...].
            roots: the (node, output)s that backward starts from.

        Raises:
            PrivacyError: names the operation.
        """
        used = {edge for edges in below.values() for edge in edges}.union(roots)
        for place, (node, edges) in enumerate(below.items()):
            if node in outputs:
                self.states |= {(node, number): Rows(1, self.whole) for number in range(outputs[node])}
                continue
            entering = [
                Input(index, self.states[edge], output_shape(*edge), edge)
                for index, edge in enumerate(edges)
                if edge in self.states and output_shape(*edge).numel()
            ]
            for number, metadata in enumerate(node._input_metadata if entering else ()):
                if (node, number) in used and Size(metadata.shape).numel():
                    operation = Operation(node, _kind(node), number, Size(metadata.shape), entering)
                    self.states[node, number] = self._state(operation, place)
        self._check_picks(self.states.get(root) for root in roots)

    def odd_factor(self, roots: Iterable[tuple[Node, int]]) -> float | None:
        """Find the number that a sum, no mean, among the roots was multiplied with (None: no such); roots: (node, output)s."""
        states = [self.states.get(root) for root in roots]
        factors = [by for state in states if isinstance(state, Total) and not state.averaged for by in state.by]
        return factors[0] if factors else None

    def _state(self, op: Operation, place: int) -> State:
        states = [given.state for given in op.inputs]
        if op.kind in PUTTING:
            return _put_back(self, op, place)
        if any(isinstance(state, Total) for state in states):
            return self.linear(op)
        if all(isinstance(state, One) for state in states):
            if len({state.owner for state in states}) == 1:
                return states[0]
            return self._stacked(op) if op.kind in ("Stack", "Cat") else self.linear(op)
        if any(isinstance(state, One) for state in states):
            return self.linear(op)
        rule = RULES.get(op.kind) or (_pointwise if _is_pointwise(op.kind) else type(self).unknown)
        return rule(self, op, place)

    def unknown(self, op: Operation, place: int) -> State:
        """Find the state of the output of an operation that is not in `RULES`."""
        return _opaque(self, op, place)

    def linear(self, op: Operation) -> State:
        """Find the state of an output whose inputs were summed over samples, or come from several of them."""
        several = len(op.inputs) > 1 and op.kind not in ("Add", "Sub", "Rsub", "Cat", "Stack")
        _not_lent(op)
        if op.kind not in LINEAR or several or (op.kind == "Div" and op.inputs[0].index != 0):
            op.refuse("is no linear function of what was added up over the samples")
        totals = [given.state for given in op.inputs if isinstance(given.state, Total)] or [SUM_OF_ALL]
        total = Total(all(t.averaged for t in totals), tuple(by for t in totals for by in t.by))
        if total.averaged or op.kind not in ("Div", "Mul", "Mean"):
            return total
        factor = 1 / op.inputs[0].shape.numel() if op.kind == "Mean" else _constant_factor(op)
        return MEAN_OF_ALL if self.makes_mean(factor) else replace(total, by=(*total.by, factor))

    def makes_mean(self, factor: float | None) -> bool:
        """Tell whether a sum over the samples times factor (None: it can't be read) may be their mean."""
        samples = None if not factor else 1 / factor / self.samples
        return samples is None or (round(samples) >= 1 and math.isclose(samples, round(samples), rel_tol=1e-6))

    def _stacked(self, op: Operation[One]) -> State:
        """Find the state of a stack of single samples' numbers: rows, if it is all samples in order."""
        owners = [given.state.owner for given in op.inputs]
        parts = {given.shape for given in op.inputs}
        if owners != list(range(self.samples)) or len(parts) > 1:
            return SUM_OF_ALL
        dim = wrapped(op.node._saved_dim, len(op.shape))
        return Rows(prod(op.shape[:dim]), self.whole)

    def is_even(self, owners: Sequence[range]) -> bool:
        """Tell whether all samples are among the owners, and equally often."""
        if all(run == self.whole[0] for run in owners):
            return True
        counts = Counter(owner for run in owners for owner in run)
        return len(counts) == self.samples and len(set(counts.values())) == 1

    def pick(self, op: Operation, given: Input, entries: Sequence[int]) -> None:
        """Note that an operation takes only these entries of the batch; `check` refuses them unless others take the rest."""
        self.picked[given.source].update(entries)
        self.sizes[given.source] = given.state.entries

    def _check_picks(self, made: Iterable[State | None]) -> None:
        uneven = any(
            len(set(counts.values())) != 1 or len(counts) != self.sizes[source]
            for source, counts in self.picked.items()
        )
        if uneven or any(isinstance(state, Rows) and state.lent for state in made):
            raise PrivacyError(f"samples mix in the loss: {PICKED}. {REMEDY}")

    def check_growth(self, op: Operation, given: Input, place: int) -> None:
        """Apply `check_beside` to the dimensions that broadcasting brings: [N, 1] - [N] is [N, N]."""
        before = (1,) * (len(op.shape) - len(given.shape)) + tuple(given.shape)
        self.check_beside(op, given, place, [dim for dim, size in enumerate(before) if size == 1])

    def check_beside(self, op: Operation, given: Input, place: int, dims: Sequence[int]) -> None:
        """Refuse a constant that lays other samples' values beside each sample, along dimensions that only it has brought.

        A constant of as many entries as there happen to be samples looks the same. It is told apart by an earlier loss that had
        another number of samples.
        """
        for dim in dims:
            key, size = (op.kind, place, given.index, dim), op.shape[dim]
            if size == 1:
                continue
            if size != self.samples:
                self.grown.setdefault(key, size)
            elif self.grown.get(key) != size:
                op.refuse(
                    f"broadcasts or multiplies outputs of shape {tuple(given.shape)} to {tuple(op.shape)}, so that each sample "
                    "meets values of all others: give targets the shape of the outputs (a constant that has as many entries "
                    "as this batch has samples is refused only until a batch of another size has been seen)"
                )


Rule = Callable[[SampleFlow, Operation[Rows], int], State]


def _joint(flow: SampleFlow, op: Operation[Rows], states: Sequence[Rows]) -> Rows:
    """Find the rows of an operation that takes the numbers of several inputs in pairs: all must have the same."""
    if any(state != states[0] for state in states):
        op.refuse("takes outputs of different samples together")
    return states[0]


def _pointwise(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    if getattr(op.node, "_saved_reduction", NONE) != NONE:
        return _reduced(flow, op, place)
    return _aligned(flow, op, place)


def _aligned(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of an operation that works number by number, with broadcasting."""
    states = []
    for given in op.inputs:
        shift = len(op.shape) - len(given.shape)
        states.append(op.moved(given, {d: d + shift for d in range(len(given.shape))}))
    joint = _joint(flow, op, states)
    for given in op.inputs:
        flow.check_growth(op, given, place)
    return joint


def _reduced(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the state of a criterion that has reduced its losses."""
    _joint(flow, op, [given.state for given in op.inputs])
    mean = op.node._saved_reduction == MEAN
    if mean and _normalised_by_targets(op):
        raise PrivacyError(
            "the loss is divided by the class weights of the batch, or by the number of its targets that are not ignored: "
            "each sample's share depends on the other samples. fastloda.CrossEntropyLoss divides by a sample's own (a Hugging "
            f"Face model's loss: that of out.logits). {REMEDY}"
        )
    return _added(flow, op, mean)


def _normalised_by_targets(op: Operation[Rows]) -> bool:
    """Tell whether a mean divides by something else than as many targets of each sample: nll_loss, below cross_entropy, may."""
    node = op.node
    weight = getattr(node, "_saved_weight", None) if hasattr(node, "_saved_total_weight") else None
    if weight is not None and (weight != weight[0]).any():
        return True
    ignored = getattr(node, "_saved_ignore_index", None)
    if ignored is None:
        return False
    rows, left_out = op.inputs[0].state, node._saved_target == signed(ignored)
    by_entry = left_out.reshape(rows.outer, rows.entries, -1).sum((0, 2))
    # equally many for each sample, as where all sequences are shifted by one, leave a public divisor
    return bool((by_entry != by_entry[0]).any())


def _constant_factor(op: Operation) -> float | None:
    """Read the number that a Div or Mul multiplies its only input with; None if it is no single number, or 0."""
    if op.kind == "Div":
        other = op.node._saved_other
    else:
        other = op.node._saved_self if op.inputs[0].index else op.node._saved_other
    if not isinstance(other, Tensor) or other.numel() != 1 or not other.item():
        return None
    return 1 / other.item() if op.kind == "Div" else other.item()


def _not_lent(op: Operation) -> None:
    if any(isinstance(given.state, Rows) and given.state.lent for given in op.inputs):
        op.refuse(f"takes together what an index has picked: {PICKED}")


def _added(flow: SampleFlow, op: Operation, mean: bool) -> Total:
    _not_lent(op)
    if mean and not flow.is_even(op.inputs[0].state.owners):
        op.refuse("averages over a part of the samples: take a sum")
    return MEAN_OF_ALL if mean else SUM_OF_ALL


def _view(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    state = op.inputs[0].state
    if not state.fits(op.shape):
        op.refuse("cuts the outputs across the samples")
    return state


def _reduce(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the state of a sum, mean, maximum, norm, ... over some dimensions."""
    (given,) = op.inputs
    summed = op.dims() if hasattr(op.node, "_saved_dim") else set(range(len(given.shape)))
    if summed.isdisjoint(given.state.dims(given.shape)):
        kept = [d for d in range(len(given.shape)) if d not in summed]
        same = len(op.shape) == len(given.shape)
        return op.moved(given, {d: d if same else i for i, d in enumerate(kept)})
    if op.kind not in SUMMING:
        op.refuse("is taken over the samples")
    return _added(flow, op, mean=op.kind == "Mean")


def _along(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of a softmax, cumulative sum, sort, ... along a dimension."""
    (given,) = op.inputs
    if not op.dims().isdisjoint(given.state.dims(given.shape)):
        op.refuse("works along the samples")
    return op.moved(given, {d: d for d in range(len(given.shape))})


def _renorm(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of a renorm, which takes norms over all dimensions but one."""
    (given,) = op.inputs
    if not op.dims().issuperset(given.state.dims(given.shape)):
        op.refuse("takes norms over the samples")
    return given.state


def _padded(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of a padding with constants, which must leave the batch alone: padded and cut, it may keep its size."""
    (given,) = op.inputs
    last, pad = len(given.shape) - 1, op.node._saved_pad
    if any(any(pad[2 * (last - d) : 2 * (last - d) + 2]) for d in given.state.dims(given.shape)):
        op.refuse("moves the samples along the batch")
    return op.moved(given, {d: d for d in range(len(given.shape))})


def _reordered(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of a flip or roll of some dimensions."""
    (given,) = op.inputs
    if not op.dims("_saved_dims").isdisjoint(given.state.dims(given.shape)):
        op.refuse("moves the samples along the batch")
    return given.state


def _permuted(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    (given,) = op.inputs
    count, node = len(given.shape), op.node
    order = list(range(count))
    if op.kind == "Permute":
        order = [wrapped(dim, count) for dim in node._saved_dims]
    elif op.kind == "T":
        order.reverse()
    else:
        a, b = wrapped(node._saved_dim0, count), wrapped(node._saved_dim1, count)
        order[a], order[b] = order[b], order[a]
    return op.moved(given, {d: place for place, d in enumerate(order)})


def _repeated(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of a repeat: the batch several times over, one after the other, or copies within each sample's numbers."""
    (given,) = op.inputs
    (*_, dim), shift = given.state.dims(given.shape), len(op.shape) - len(given.shape)
    entries = given.state.entries
    if (
        op.shape[dim + shift] == given.shape[dim]
        or given.state.dims(given.shape) != [dim]
        or given.shape[dim] != entries
    ):
        return _aligned(flow, op, place)
    times = op.shape[dim + shift] // entries
    return replace(given.state, outer=prod(op.shape[: dim + shift]), owners=given.state.owners * times)


def _parted(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the state of one index, or a range of indices, of a dimension."""
    (given,) = op.inputs
    node, count, state = op.node, len(given.shape), given.state
    dim = wrapped(getattr(node, "_saved_dim", 0), count)
    single = op.kind in ("Select", "Unbind")
    if dim not in state.dims(given.shape):
        return op.moved(given, {d: d - (single and d > dim) for d in range(count) if d != dim or not single})
    _not_lent(op)
    size = given.shape[dim]
    if state.dims(given.shape) != [dim] or size != state.entries:
        op.refuse("tears the rows of the batch apart")
    chosen = _chosen(op, size)
    flow.pick(op, given, chosen)
    owners = state.numbers[chosen.start : chosen.stop : chosen.step]
    if len(owners) == 1:
        return One(owners[0])
    return Rows(state.outer, _runs(owners)) if owners else MEAN_OF_ALL


def _chosen(op: Operation, size: int) -> range:
    """Read which indices a Select, Slice, Split or Unbind takes of its dimension."""
    node = op.node
    if op.kind == "Unbind":
        return range(op.number, op.number + 1)
    if op.kind == "Select":
        index = signed(node._saved_index) % size
        return range(index, index + 1)
    if op.kind == "Slice":
        end = getattr(node, "_saved_end", None)
        return range(size)[
            slice(signed(node._saved_start or 0), None if end is None else signed(end), node._saved_step)
        ]
    sizes = getattr(node, "_saved_split_sizes", None)
    start = sum(sizes[: op.number]) if sizes is not None else op.number * node._saved_split_size
    return range(start, start + op.shape[wrapped(node._saved_dim, len(op.shape))])


def _runs(owners: Sequence[int]) -> tuple[range, ...]:
    """Group owners into runs of successive samples: [0, 1, 2, 0, 1] -> range(3), range(2)."""
    runs: list[range] = []
    for owner in owners:
        if runs and runs[-1].stop == owner:
            runs[-1] = range(runs[-1].start, owner + 1)
        else:
            runs.append(range(owner, owner + 1))
    return tuple(runs)


def _joined(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of a Cat or Stack."""
    count = len(op.shape)
    dim, stack = wrapped(op.node._saved_dim, count), op.kind == "Stack"
    places = {d: d + (stack and d >= dim) for d in range(count)}
    along = [not stack and dim in given.state.dims(given.shape) for given in op.inputs]
    if not any(along):
        return _joint(flow, op, [op.moved(given, places) for given in op.inputs])
    simple = all(given.state.dims(given.shape) == [dim] for given in op.inputs)
    entries = sum(given.state.entries for given in op.inputs)
    if not simple or entries != op.shape[dim] or len({given.state.outer for given in op.inputs}) > 1:
        op.refuse("puts outputs and other values into one batch")
    _not_lent(op)
    owners = [owner for given in op.inputs for owner in given.state.numbers]
    return Rows(op.inputs[0].state.outer, _runs(owners))


def _product(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the state of a matrix product: of rows and constants, or of each sample's own matrices."""
    *letters, out = PRODUCTS[op.kind]
    kept, contracted = [], []
    for given in op.inputs:
        own = letters[given.index][-len(given.shape) :]  # the input that Addmm adds may be a vector
        places = {d: out.index(letter) for d, letter in enumerate(own) if letter in out}
        batch = given.state.dims(given.shape)
        if all(d in places for d in batch):
            kept.append(op.moved(given, places))
        elif len(batch) == 1 and given.shape[batch[0]] == given.state.entries:
            _not_lent(op)
            contracted.append((own[batch[0]], given.state.owners))
        else:
            op.refuse("tears the rows of the batch apart")
    if len(op.inputs) == 1 and kept:  # the other factor is a constant, which brings dimensions of its own
        own = letters[op.inputs[0].index]
        flow.check_beside(op, op.inputs[0], place, [d for d, letter in enumerate(out) if letter not in own])
    if (kept and contracted) or len(set(contracted)) > 1:
        op.refuse("multiplies outputs of different samples")
    return SUM_OF_ALL if contracted else _joint(flow, op, kept)


def _batch_first(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the state of an operation that is defined for a batch in the first dimension."""
    first = all(given.index == 0 and given.state.dims(given.shape) == [0] for given in op.inputs)
    if getattr(op.node, "_saved_reduction", NONE) != NONE:
        if not first or len(op.inputs[0].shape) == 1:
            op.refuse("compares outputs of different samples: it wants them as [samples, classes, ...]")
        return _reduced(flow, op, place)
    if not first:
        return flow.unknown(op, place)
    return _joint(flow, op, [op.moved(given, {0: 0}) for given in op.inputs])


def _layer_norm(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    given = op.inputs[0]
    first = len(given.shape) - len(op.node._saved_normalized_shape)
    if given.index or len(op.inputs) > 1 or any(d >= first for d in given.state.dims(given.shape)):
        op.refuse("normalises over the samples")
    return given.state


def _ctc(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of ctc_loss(log_probs [T, N, C]) -> [N]."""
    (given,) = op.inputs
    if given.state.dims(given.shape) != [1]:
        op.refuse("wants the batch second: [T, N, C]")
    return replace(given.state, outer=1)


def _indexed(flow: SampleFlow, op: Operation, place: int) -> State:
    """Find the rows of x[indices], some of which may be tensors: each sample finds its own row, or rows are lent."""
    (given,) = op.inputs
    _saved(op, "_saved_index" if op.kind == "IndexSelect" else "_saved_indices")
    indices = indices_by_dim(op.node, op.node.name(), given.shape)
    advanced = [d for d, index in enumerate(indices) if index is not None]
    taken = torch.broadcast_tensors(*(indices[d] for d in advanced))
    adjacent = advanced == list(range(advanced[0], advanced[-1] + 1))
    first = advanced[0] if adjacent else 0
    kept = [d for d in range(len(indices)) if indices[d] is None]
    places = {d: i if d < first else i + taken[0].dim() for i, d in enumerate(kept)} if adjacent else {}
    places = places or {d: i + taken[0].dim() for i, d in enumerate(kept)}
    batch = given.state.dims(given.shape)
    for d in batch:
        if d in places:
            continue
        index = taken[advanced.index(d)]
        own = [e for e in range(index.dim()) if _is_arange(index, e, given.shape[d])]
        if not own and batch == [d] and given.shape[d] == given.state.entries and index.dim() == 1:
            numbers = given.state.numbers
            return Rows(prod(op.shape[:first]), _runs([numbers[i] for i in index.tolist()]), lent=True)
        if not own:
            op.refuse(PICKED)
        places[d] = first + own[0]
    return op.moved(given, places)


def _put_back(flow: SampleFlow, op: Operation, place: int) -> State:
    """Find the state after x[index] = values, or += values, which must put lent rows or constants into their own rows."""
    base, values = ([given for given in op.inputs if (given.index == 0) == first] for first in (True, False))
    if any(not isinstance(given.state, Rows) for given in op.inputs):
        return flow.linear(op)
    _saved(op, "_saved_indices" if op.kind == "IndexPut" else "_saved_index")
    indices = indices_by_dim(op.node, op.node.name(), op.shape)
    at = [d for d, index in enumerate(indices) if index is not None]
    dim, index = at[0], cast(Tensor, indices[at[0]])
    outer = prod(op.shape[:dim])
    into = base[0].state if base else Rows(outer, flow.whole)
    if not values:
        return into
    (given,) = values
    alone = given.state.entries == index.numel() == 1  # PyTorch drops the dimension of a single value
    along = len(given.shape) == len(op.shape) and given.state.entries == given.shape[dim] and given.state.outer == outer
    whole = into.outer == outer and into.entries == op.shape[dim]
    if len(at) > 1 or index.dim() != 1 or not (along or alone) or not whole:
        return flow.unknown(op, place)
    rows = into.numbers
    if [rows[i] for i in index.tolist()] != given.state.numbers:
        op.refuse("puts samples into the rows of others")
    return into


def _is_arange(index: Tensor, dim: int, size: int) -> bool:
    if index.shape[dim] != size:
        return False
    own = torch.arange(size, device=index.device).view(-1, *[1] * (index.dim() - dim - 1))
    return bool((index == own).all())


def _saved(op: Operation, name: str):
    try:
        return getattr(op.node, name)
    except Exception as error:  # raised by whatever packed it: checkpointing, hooks
        op.refuse_unseen(f"can't be read ({error}): leave the criterion out of torch.utils.checkpoint")


def _opaque(flow: SampleFlow, op: Operation[Rows], place: int) -> State:
    """Find the rows of an operation that is not known, by its backward, which must keep any two samples apart."""
    layouts = _layouts(op)
    if not layouts:
        op.refuse_unseen(
            "is not known (it comes from torch.jit.script, torch.compile, an autograd.Function, or a part of PyTorch that "
            "FastLoDA does not know), and does not give each sample numbers of its own"
        )
    try:
        found = _parting_layout(flow, op, layouts)
    except (RuntimeError, NotImplementedError) as error:
        op.refuse_unseen(f"has a backward pass that does not run twice ({error})")
    if found is None:
        op.refuse("takes outputs of different samples together")
    beside = [d for d in range(len(op.shape)) if d not in found.dims(op.shape)]
    if not any(flow.samples in _without(given.shape, given.state.dims(given.shape)) for given in op.inputs):
        flow.check_beside(op, op.inputs[0], place, beside)
    return found


def _without(shape: Size, dims: Sequence[int]) -> list[int]:
    return [size for d, size in enumerate(shape) if d not in dims]


def _layouts(op: Operation) -> list[Rows]:
    """List where the samples may lie in the output: in the dimension they have in an input, counted from either end."""
    if len({given.state.owners for given in op.inputs}) > 1:
        return []
    shifts = [(given, shift) for given in op.inputs for shift in {0, len(op.shape) - len(given.shape)}]
    found = [
        given.state.moved(
            given.shape,
            op.shape,
            {d: d + shift for d in range(max(0, -shift), len(given.shape)) if d + shift < len(op.shape)},
        )
        for given, shift in shifts
    ]
    state = op.inputs[0].state
    if op.shape and op.shape[0] == state.entries:
        found.insert(0, replace(state, outer=1))
    return [rows for rows in dict.fromkeys(found) if rows is not None]


def _parting_layout(flow: SampleFlow, op: Operation, layouts: Sequence[Rows]) -> Rows | None:
    """Find the first layout by which backward keeps samples apart, also for very large or small gradients, which some clip."""
    edges = [GradientEdge(*given.source) for given in op.inputs]
    gy = torch.randn(op.shape, generator=torch.Generator().manual_seed(0)).to(**_placed(op.node, op.number))
    extreme = 2.0 ** (math.log2(torch.finfo(gy.dtype).max) // 4)
    numbers = torch.arange(flow.samples)
    choices = [(numbers >> bit) % 2 == value for bit in range((flow.samples - 1).bit_length()) for value in (0, 1)]
    whole = {scale: _gradients(op.node, op.number, scale * gy, edges) for scale in (1.0, 1 / extreme, extreme)}

    def parts(rows: Rows, chosen: Tensor, scale: float) -> bool:
        own = scale * gy * rows.belong(op.shape, chosen).to(gy.device)
        grads = zip(op.inputs, _gradients(op.node, op.number, own, edges), whole[scale])
        return all(_apart(alone, beside, given.state.belong(given.shape, chosen)) for given, alone, beside in grads)

    looks = [(chosen, 1.0) for chosen in choices] + [(choices[0], 1 / extreme), (choices[0], extreme)]
    return next((rows for rows in layouts if all(parts(rows, *look) for look in looks)), None)


def _placed(node: Node, number: int) -> dict:
    metadata = node._input_metadata[number]
    return {"dtype": metadata.dtype, "device": metadata.device}


def _gradients(node: Node, number: int, gy: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    with may_run_again([node] if node.name() == COMPILED else []):
        return torch.autograd.grad([GradientEdge(node, number)], edges, [gy], retain_graph=True, allow_unused=True)


def _apart(alone: Tensor | None, beside: Tensor | None, chosen: Tensor) -> bool:
    """Tell whether the gradient `alone`, of the chosen samples, is zero elsewhere, and on them equal to `beside`, of all."""
    if alone is None or beside is None:
        return alone is beside
    chosen = chosen.to(alone.device)
    others, own, there = alone[~chosen].nan_to_num(), alone[chosen].nan_to_num(), beside[chosen].nan_to_num()
    allowed = 64 * torch.finfo(own.dtype).eps * float(there.abs().amax()) if there.numel() else 0.0
    return not others.any() and torch.allclose(own, there, rtol=1e-3, atol=allowed)


RULES: dict[str, Rule] = dict.fromkeys(VIEWS, _view)
RULES |= dict.fromkeys(REDUCING, _reduce) | dict.fromkeys(ALONG, _along) | dict.fromkeys(PRODUCTS, _product)
RULES |= {"Renorm": _renorm, "ConstantPadNd": _padded}
RULES |= {"Expand": _aligned, "Repeat": _repeated} | dict.fromkeys(("Flip", "Roll"), _reordered)
RULES |= dict.fromkeys(("Permute", "Transpose", "T"), _permuted) | dict.fromkeys(("Cat", "Stack"), _joined)
RULES |= dict.fromkeys(("Select", "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind"), _parted)
RULES |= dict.fromkeys(BATCH_FIRST, _batch_first)
RULES |= {"NativeLayerNorm": _layer_norm, "CtcLoss": _ctc, "Index": _indexed, "IndexSelect": _indexed}
