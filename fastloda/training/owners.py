"""Owners of several records (patients, users) as the unit of privacy: a batch is drawn by owner, not by record.

A step takes `per_owner` rows of each owner drawn: that many of the owner's records, chosen at random in each step, or, if the
owner has fewer, all of them, some repeated. Weights make the owner's loss the mean over the chosen records; a repeated record
counts once, as the mean over its rows. To the clipper an owner is one sample of `per_owner` x views losses. So an owner moves
the clipped sum by at most max_grad_norm, whatever the number of records, and adding or removing an owner with all records costs
what adding or removing a record costs if each owner has one. All rows of an owner are records of that owner: a record that is
not finite spoils no other owner's sample.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from fastloda.errors import UserError
from fastloda.training.batches import Batches, Columns

Owner = int | str
OwnerIds = Sequence[Owner] | np.ndarray | Tensor
Stream = Callable[[str], Generator]


class OwnerRows(NamedTuple):
    """The rows of an owner in a step.

    Attributes:
        records: per_owner records as `Batches` reads them, of which some may be the same.
        weights: the rows' weights in the mean over records, relative to those of a mean over rows.
    """

    records: list
    weights: list[float]


class OwnerBatches(Batches):
    """Records in a Dataset or in columns, drawn by owner.

    Args:
        data: the records, as in `Batches`.
        owners: the owner of each record, integers or strings: a sequence, a 1-d array or a tensor.
        per_owner: the number of rows of an owner in a step.

    Raises:
        UserError: owners are not one integer or string for each record, or `Batches` refuses the data.
    """

    unit = "owner"

    def __init__(self, data: Columns | Dataset, owners: OwnerIds, per_owner: int):
        super().__init__(data)
        ids = _checked(owners, self.records)
        held = defaultdict(list)
        for record, owner in enumerate(ids):
            held[owner].append(record)
        self._held = list(held.items())
        self._digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        self.rows = per_owner

    @property
    def units(self) -> int:
        return len(self._held)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"owners": f"sha256 {self._digest}"}

    def read(self, units: Tensor, stream: Stream) -> list[OwnerRows]:
        """Read the `OwnerRows` of each owner; `stream` makes one generator for each owner, which chooses the owner's records."""
        return [self._rows_of(*self._held[unit], stream) for unit in units.tolist()]

    def _rows_of(self, owner: Owner, records: list[int], stream: Stream) -> OwnerRows:
        if len(records) > self.rows:
            order = torch.randperm(len(records), generator=stream(f"records of {owner!r}"))
            chosen = [records[i] for i in order[: self.rows].tolist()]
        else:
            chosen = [records[i % len(records)] for i in range(self.rows)]
        times = Counter(chosen)
        weights = [self.rows / len(times) / times[record] for record in chosen]
        return OwnerRows(super().read(torch.tensor(chosen), stream), weights)

    def batch(self, read: list, device: torch.device) -> Any:
        return super().batch([record for owner in read for record in owner.records], device)

    def weights(self, read: list) -> Tensor:
        return torch.tensor([weight for owner in read for weight in owner.weights], dtype=torch.float64)


def _checked(owners: OwnerIds, records: int) -> list[Owner]:
    """Convert the owners to a list of integers or strings, one for each record."""
    convert = getattr(owners, "tolist", None)  # of tensors, arrays, pandas' columns
    if isinstance(owners, str) or not (convert or isinstance(owners, Sequence)):
        raise UserError(f"owners must be a list of integers or strings, one a record; got {type(owners).__name__}")
    ids = convert() if convert else list(owners)
    if not isinstance(ids, list) or len(ids) != records:
        found = len(ids) if isinstance(ids, list) else "a single one"
        raise UserError(f"owners must name the owner of each of the {records} records, got {found}")
    kinds: set[type] = {str if isinstance(id, str) else int if _is_integer(id) else type(id) for id in ids}
    if kinds not in ({int}, {str}):
        names = sorted(kind.__name__ for kind in kinds)
        raise UserError(f"owners must be integers, or strings, all of one kind: got {' and '.join(names)}")
    return [id if isinstance(id, str) else int(id) for id in ids]


def _is_integer(id: object) -> bool:
    return isinstance(id, Integral) and not isinstance(id, bool)
