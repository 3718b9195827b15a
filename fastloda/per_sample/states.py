"""The states of tensors in the sample flow: which numbers of a tensor belong to which sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Generic, NamedTuple, NoReturn, TypeVar

from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node
from fastloda.per_sample.operations import kind_of, places

PICKED = (
    "samples' outputs are picked along the batch, by an index or a mask, so that each one's share may depend on the others: "
    "multiply each sample's loss by 0 or 1 instead, or put what was picked back into its own rows"
)
REMEDY = (
    "The loss must be the mean, or sum, of one loss per sample: take the criterion with reduction='none', which gives these, and "
    "then its .mean()"
)


@dataclass(frozen=True)
class Rows:
    """The state of a tensor in which each number belongs to one sample. In row-major order it is [outer, entries, rest].

    Attributes:
        outer: the number of blocks before the batch coordinate, which no view of a tensor changes.
        owners: the sample of each entry along the batch coordinate.
        lent: whether an index has picked the entries; they must be put back into their own rows before anything is summed.
    """

    outer: int
    owners: tuple[int, ...]
    lent: bool = False

    @property
    def entries(self) -> int:
        return len(self.owners)

    def belong(self, shape: Sequence[int], chosen: Tensor) -> Tensor:
        """Mark the numbers that belong to the chosen samples, bool [samples], in a tensor of `shape`: bool [*shape]."""
        entries = chosen[list(self.owners)].view(1, -1, 1)
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
        """Tell whether no index along a dimension of `shape` takes parts of two samples, as it may after a view."""
        inner = prod(shape) // (self.outer * self.entries)
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        ends = (inner, inner * self.entries)
        return all(end % s == 0 for end in ends for n, s in zip(shape, strides) if s < end < s * n)

    def move(self, before: Sequence[int], after: Sequence[int], places: Mapping[int, int]) -> "Rows | None":
        """Compute the state after dimension d of shape `before` has become dimension places[d] of shape `after`.

        Returns None if that tears the batch apart: its dimensions are no longer adjacent and in order, or change their sizes.
        """
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
    """The state of a tensor whose numbers are sums over samples of terms that each belong to one sample.

    Attributes:
        averaged: whether a mean over the samples, or a division by a multiple of their number, produced it.
        by: the other constants that its terms were multiplied by; empty where they are unknown.
        fits: whether `averaged` rests only on a constant that matches the number of samples, perhaps by chance.
    """

    averaged: bool
    by: tuple[float, ...] = ()
    fits: bool = False


State = Rows | One | Total
S = TypeVar("S", bound=State)
MEAN_OF_ALL, MADE_MEAN = Total(averaged=True), Total(averaged=True, fits=True)


class Input(NamedTuple, Generic[S]):
    """The differentiable input number `index` of an operation: its state and shape, and the (node, output) it comes from."""

    index: int
    state: S
    shape: Size
    source: tuple[Node, int]


class Operation(NamedTuple, Generic[S]):
    """An operation of the loss's graph, one of its outputs, and those of its inputs that depend on the model's outputs."""

    node: Node
    place: int  # how many operations come before it in the graph
    number: int  # which output of the node
    shape: Size  # the shape of that output
    inputs: list[Input[S]]

    @property
    def kind(self) -> str:
        return kind_of(self.node)

    def refuse(self, why: str) -> NoReturn:
        raise PrivacyError(f"samples mix in the loss: {self._label} {why}. {REMEDY}")

    def refuse_unseen(self, why: str) -> NoReturn:
        raise PrivacyError(f"whether samples mix in the loss can't be seen: {self._label} {why}. {REMEDY}")

    @property
    def _label(self) -> str:
        return self.kind.removesuffix("Backward")

    def move(self, given: Input[Rows], to: Mapping[int, int] | None = None) -> Rows:
        """Compute the output's state from that of the input `given`; refuse an operation that tears the batch apart.

        to: dimension of the input -> dimension of the output. Default: what `operations.places` says of the operation.
        """
        found = given.state.move(
            given.shape, self.shape, places(self.node, given.shape, self.shape) if to is None else to
        )
        if found is None:
            self.refuse("tears the rows of the batch apart")
        return found

    def joint(self, states: Sequence[Rows]) -> Rows:
        """Return the state that all of `states` equal; refuse an operation that combines inputs of different states."""
        if any(state != states[0] for state in states):
            self.refuse("takes outputs of different samples together")
        return states[0]

    def check_not_lent(self) -> None:
        """Refuse an operation that sums, or takes a part of, rows that an index has picked."""
        if any(isinstance(given.state, Rows) and given.state.lent for given in self.inputs):
            self.refuse(f"takes together what an index has picked: {PICKED}")
