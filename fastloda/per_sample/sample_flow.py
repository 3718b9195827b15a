"""The check that a loss is a sum of terms each of which depends on the model's outputs for one sample alone.

It reads the autograd graph of the loss from the model's outputs upwards. Operations may treat each sample's numbers separately
(`Rows`); one sum or mean then adds up the samples (`Total`), and only linear operations may follow. Anything else across
samples (a product, maximum, sort, softmax, index or broadcast along the batch, or a nonlinear function of the sum) couples
them, and is refused by the operation's name. An operation that is not known here is tried out (`trial.py`).

The *weights* of a sample's numbers are followed too: the constants that they are multiplied by on the way to a sum. In a mean
over the samples a weight must be 1 / (k samples), for a whole number k.

The graph does not show values without a gradient, such as targets that were standardised over the batch.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Edges, Node, output_shape
from fastloda.per_sample.operations import (
    ADDING,
    HOOKED,
    LINEAR,
    PRODUCTS,
    PUTTING,
    TILING,
    dim_of,
    is_pointwise,
    kind_of,
)
from fastloda.per_sample.states import (
    MADE_MEAN,
    PICKED,
    REMEDY,
    Input,
    One,
    Operation,
    Rows,
    State,
    Total,
)
from fastloda.per_sample.transfer import TRANSFERS, pointwise, put_back
from fastloda.per_sample.trial import try_out

# Weights of a sample's numbers that are no known constant: a constant among their factors made a mean, or could not be read.
AVERAGED, UNKNOWN = math.inf, 0.0
ONCE = frozenset([1.0])
MULTIPLYING = PRODUCTS.keys() | {"Div", "Mul"}
OPERANDS = ("_saved_other", "_saved_self", "_saved_mat2", "_saved_mat1", "_saved_vec", "_saved_tensor", "_saved_batch1")
OPERANDS += ("_saved_batch2",)


class SampleFlow:
    """The analysis that follows the samples from a model's outputs up to a loss.

    Args:
        samples: the number of samples, which is the first size of every output.
        grown: what earlier losses showed, by place in the graph: the size to which a constant broadcast a dimension there, or
            the number of samples and the constant that they were multiplied by there. It is updated.
        mean: whether the loss must be a mean over the samples, not a sum.
    """

    def __init__(self, samples: int, grown: MutableMapping[tuple, Any], mean: bool = True):
        self.samples, self.whole, self.grown, self.mean = samples, tuple(range(samples)), grown, mean
        self.operations = 0  # in the graph
        self.states: dict[tuple[Node, int], State] = {}
        self.weights: dict[tuple[Node, int], frozenset[float]] = {}
        self.picked: dict[tuple[Node, int], Counter] = defaultdict(Counter)
        self.sizes: dict[tuple[Node, int], int] = {}

    def check(
        self, below: Mapping[Node, Edges], outputs: Mapping[Node, int], roots: Iterable[tuple[Node, int]]
    ) -> None:
        """Refuse a loss that is not a sum of one term for each sample.

        Args:
            below: node -> its edges, for each node below the loss; the nodes that it reads come before it.
            outputs: node -> the number of its outputs, all of which are outputs of the model, [samples, ...].
            roots: the (node, output)s that backward starts from.

        Raises:
            PrivacyError: names the operation.
        """
        self.operations = len(below)
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
                    operation = Operation(node, place, number, Size(metadata.shape), entering)
                    self.states[node, number] = state = self._state(operation)
                    if not isinstance(state, Total):
                        self.weights[node, number] = self.weights_of(operation)
        self._check_picks(self.states.get(root) for root in roots)

    def odd_factor(
        self, roots: Sequence[tuple[Node, int]], grads: Sequence[Tensor | None] | None = None
    ) -> float | None:
        """Find the constant that a root which is a sum, not a mean, was multiplied by; None if there is no such root.

        Args:
            roots: the (node, output)s that backward starts from.
            grads: the gradients that backward starts with. Default: ones.
        """
        for root, grad in zip(roots, grads or [None] * len(roots)):
            state = self.states.get(root)
            if isinstance(state, Rows | One):
                weights = self.weights.get(root, ONCE)
                state = self.sum_of(weights if grad is None else self.times(weights, uniform(grad)))
            if state and not state.averaged and state.by:
                return state.by[0]
        return None

    def _state(self, op: Operation) -> State:
        if op.kind in PUTTING:
            return put_back(self, op)
        if op.kind == HOOKED and (own := [given.state for given in op.inputs if given.index == op.number]):
            return own[0]
        states = [given.state for given in op.inputs]
        owners = {state.owner for state in states if isinstance(state, One)}
        if all(isinstance(state, One) for state in states) and len(owners) == 1:
            return states[0]
        if owners and op.kind in ("Stack", "Cat") and all(isinstance(state, One) for state in states):
            return self._stack(op)
        if not all(isinstance(state, Rows) for state in states):
            return self.linear(op)
        if transfer := TRANSFERS.get(op.kind) or (pointwise if is_pointwise(op.node) else None):
            return transfer(self, op)
        return self.unknown(op)

    def unknown(self, op: Operation[Rows]) -> State:
        """Find the state of the output of an operation that `TRANSFERS` does not know."""
        found = try_out(op, self.samples)
        others = [n for x in op.inputs for d, n in enumerate(x.shape) if d not in x.state.dims(x.shape)]
        if self.samples not in others:
            own = found.dims(op.shape)
            self.check_beside(op, op.inputs[0], [d for d in range(len(op.shape)) if d not in own])
        return found

    def linear(self, op: Operation) -> State:
        """Find the state of an output whose inputs were summed over samples, or come from several of them."""
        several = len(op.inputs) > 1 and op.kind not in ADDING
        op.check_not_lent()
        if op.kind not in LINEAR or several or (op.kind == "Div" and op.inputs[0].index != 0):
            op.refuse("is no linear function of what was added up over the samples")
        totals = [
            x.state if isinstance(x.state, Total) else self.sum_of(self.weights.get(x.source, ONCE)) for x in op.inputs
        ]
        by = tuple(dict.fromkeys(by for t in totals for by in t.by))
        total = Total(all(t.averaged for t in totals), by, any(t.fits for t in totals))
        factor = self._factor(op)
        if total.averaged or factor is None:
            return total if total.averaged else replace(total, by=())
        if abs(factor) == 1:
            return total
        left = _pending(self.times(frozenset(total.by or (1.0,)), factor))
        return replace(total, by=left) if left else MADE_MEAN

    def makes_mean(self, factor: float) -> bool:
        """Tell whether factor may turn a sum over the samples into a mean: |factor| is 1 / (k samples), for a whole k >= 1."""
        if not factor or math.isnan(factor):
            return True  # nothing, or nothing finite, is added up
        samples = 1 / abs(factor) / self.samples
        return round(samples) >= 1 and math.isclose(samples, round(samples), rel_tol=1e-6)

    def sum_of(self, weights: frozenset[float]) -> Total:
        """Make the state of a sum over the samples of numbers with these weights."""
        return MADE_MEAN if weights == {AVERAGED} else Total(averaged=False, by=_pending(weights))

    def weights_of(self, op: Operation) -> frozenset[float]:
        """Find the weights of a sample's numbers in an operation's output, one for each term that the output is a sum of."""
        given = [self.weights.get(x.source, ONCE) for x in op.inputs]
        if len(given) > 1 and op.kind in MULTIPLYING:
            return frozenset(map(_product, product(*given)))
        return self.times(frozenset().union(*given), self._factor(op))

    def times(self, weights: frozenset[float], factor: float | None) -> frozenset[float]:
        """Multiply weights by a constant; None is an unknown constant, after which a known one must make a mean by itself."""
        if factor is None:
            return frozenset(each if each == AVERAGED else UNKNOWN for each in weights)
        if abs(factor) == 1:
            return weights
        if self.makes_mean(factor):
            return frozenset([AVERAGED])
        scaled = (each if each == AVERAGED else (each or 1.0) * factor for each in weights)
        return frozenset(AVERAGED if self.makes_mean(each) else each for each in scaled)

    def _factor(self, op: Operation) -> float | None:
        """Read the number that an operation multiplies its input by; None if there are several, or it can't be read."""
        shape = op.inputs[0].shape
        if op.kind in TILING or op.kind == "Mean":
            return prod(op.shape) / prod(shape) if isinstance(op.inputs[0].state, Total) else 1.0
        if len(op.inputs) > 1 or op.kind not in MULTIPLYING or (op.kind == "Div" and op.inputs[0].index):
            return 1.0
        factor = _constant_factor(op.node)
        if factor and not isinstance(op.inputs[0].state, One):
            self._check_constant(op, factor)
        return factor

    def _check_constant(self, op: Operation, factor: float) -> None:
        """Refuse a factor that rose like the number of samples since an earlier loss, or fell like it and makes no mean."""
        state = op.inputs[0].state
        may_fall = self.mean and not (isinstance(state, Total) and state.averaged and not state.fits)
        for place in (op.place, op.place - self.operations):  # counted from either end: graphs may grow with the batch
            samples, before = self.grown.get(key := (op.kind, place, "factor"), (self.samples, factor))
            ratio, grew = factor / before, self.samples / samples
            if grew != 1 and any(
                math.isclose(ratio, by, rel_tol=1e-6) for by in (grew, 1 / grew)[: 1 if may_fall else 2]
            ):
                op.refuse(
                    "multiplies by a number that follows how many samples the batch has, as no loss of one sample may"
                )
            self.grown[key] = self.samples, factor

    def _stack(self, op: Operation[One]) -> State:
        """Find the state of a stack of single samples' numbers: `Rows`, if it holds all samples in order."""
        owners = [given.state.owner for given in op.inputs]
        parts = {given.shape for given in op.inputs}
        if owners != list(range(self.samples)) or len(parts) > 1:
            return self.linear(op)
        return Rows(prod(op.shape[: dim_of(op.node, len(op.shape))]), self.whole)

    def is_even(self, owners: Sequence[int]) -> bool:
        """Tell whether all samples are among the owners, and equally often."""
        counts = Counter(owners)
        return len(counts) == self.samples and len(set(counts.values())) == 1

    def pick(self, given: Input[Rows], entries: Sequence[int]) -> None:
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

    def check_growth(self, op: Operation, given: Input) -> None:
        """Apply `check_beside` to the dimensions that broadcasting adds or enlarges: [N, 1] - [N] is [N, N]."""
        before = (1,) * (len(op.shape) - len(given.shape)) + tuple(given.shape)
        self.check_beside(op, given, [dim for dim, size in enumerate(before) if size == 1])

    def check_beside(self, op: Operation, given: Input, dims: Sequence[int]) -> None:
        """Refuse a constant that may combine each sample with values of all samples, along `dims`, which only the constant has.

        A constant with as many entries as there happen to be samples looks the same. It is accepted if an earlier loss had the
        same number of entries there for another number of samples.
        """
        for dim in dims:
            key, size = (op.kind, op.place, given.index, dim), op.shape[dim]
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


def _constant_factor(node: Node) -> float | None:
    """Read the constant that an operation multiplies its only input by; None if its numbers differ, or can't be read."""
    try:
        saved = [getattr(node, name, None) for name in OPERANDS]
    except Exception:  # of any type, from whatever packed the saved tensor: checkpointing, hooks
        return None
    other = next((t for t in saved if isinstance(t, Tensor)), None)
    factor = None if other is None else uniform(other)
    return 1 / factor if factor and kind_of(node) == "Div" else factor


def uniform(t: Tensor) -> float | None:
    """Read the number that all entries of a tensor equal; None if they differ, or can't be read."""
    try:
        first = t.detach().flatten()[0]
        return first.item() if not t.is_complex() and (t.numel() == 1 or bool((t == first).all())) else None
    except (RuntimeError, IndexError):  # sparse or empty, on the meta device, inside vmap
        return None


def _pending(weights: Iterable[float]) -> tuple[float, ...]:
    """List the known weights, none of which made a mean."""
    return tuple(each for each in weights if each not in (AVERAGED, UNKNOWN))


def _product(weights: Sequence[float]) -> float:
    return AVERAGED if AVERAGED in weights else prod(weights)
