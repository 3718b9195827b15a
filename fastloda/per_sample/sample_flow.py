"""The check that a loss is a sum of terms each of which depends on the model's outputs for one sample alone.

It reads the autograd graph of the loss from the model's outputs upwards. Operations may treat each sample's numbers apart
(`Rows`); one sum or mean then adds up the samples (`Total`), and only linear operations may follow. Whatever else happens across
samples (a product, maximum, sort, softmax, index or broadcast along the batch, or a nonlinear function of the sum) couples
them and is refused by the operation's name. An operation that is not known here is tried out (`trial.py`).

A graph does not show values that have no gradient, such as targets that were standardised over the batch.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from math import prod

from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Edges, Node, output_shape
from fastloda.per_sample.operations import ADDING, HOOKED, LINEAR, PUTTING, dim_of, is_pointwise
from fastloda.per_sample.states import (
    MEAN_OF_ALL,
    PICKED,
    REMEDY,
    SUM_OF_ALL,
    Input,
    One,
    Operation,
    Rows,
    State,
    Total,
)
from fastloda.per_sample.transfer import TRANSFERS, pointwise, put_back
from fastloda.per_sample.trial import try_out


class SampleFlow:
    """The flow of the samples from a model's outputs up to a loss.

    Args:
        samples: the rows of every output.
        grown: place in the graph -> the size to which a constant broadcast a dimension there, in earlier losses; written to.
    """

    def __init__(self, samples: int, grown: MutableMapping[tuple, int]):
        self.samples, self.whole, self.grown = samples, tuple(range(samples)), grown
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
                    operation = Operation(node, place, number, Size(metadata.shape), entering)
                    self.states[node, number] = self._state(operation)
        self._check_picks(self.states.get(root) for root in roots)

    def odd_factor(self, roots: Iterable[tuple[Node, int]]) -> float | None:
        """Find the number that a sum, no mean, among the roots was multiplied with (None: no such); roots: (node, output)s."""
        states = [self.states.get(root) for root in roots]
        factors = [by for state in states if isinstance(state, Total) and not state.averaged for by in state.by]
        return factors[0] if factors else None

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

    def _stack(self, op: Operation[One]) -> State:
        """Find the state of a stack of single samples' numbers: rows, if it is all samples in order."""
        owners = [given.state.owner for given in op.inputs]
        parts = {given.shape for given in op.inputs}
        if owners != list(range(self.samples)) or len(parts) > 1:
            return SUM_OF_ALL
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
        """Apply `check_beside` to the dimensions that broadcasting brings: [N, 1] - [N] is [N, N]."""
        before = (1,) * (len(op.shape) - len(given.shape)) + tuple(given.shape)
        self.check_beside(op, given, [dim for dim, size in enumerate(before) if size == 1])

    def check_beside(self, op: Operation, given: Input, dims: Sequence[int]) -> None:
        """Refuse a constant that lays other samples' values beside each sample, along dimensions that only it has brought.

        A constant of as many entries as there happen to be samples looks the same. It is told apart by an earlier loss that had
        another number of samples.
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


def _constant_factor(op: Operation) -> float | None:
    """Read the number that a Div or Mul multiplies its only input with; None if it is no single number, or 0."""
    other = op.node._saved_self if op.kind == "Mul" and op.inputs[0].index else op.node._saved_other
    if not isinstance(other, Tensor) or other.numel() != 1 or not other.item():
        return None
    return 1 / other.item() if op.kind == "Div" else other.item()
