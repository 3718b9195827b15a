"""Ledgers of steps that record which ledger counted each step, so that merging them neither loses a step nor counts it twice.

Each ledger counts under an id that nobody can guess and no other ledger has: a copy, an unpickled ledger and a forked child draw
new ones. The count under one id grows in one ledger only; so the larger of two counts is the later one, and includes the other.
"""

import os
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

M = TypeVar("M", bound=Hashable)  # the key of a mechanism
Counts = Mapping[M, int]

_ids: "WeakKeyDictionary[Ledger, str]" = (
    WeakKeyDictionary()
)  # not attributes of the ledgers, since a copy would have the same id
os.register_at_fork(after_in_child=_ids.clear)


def new_id() -> str:
    """Draw an id that no other ledger has."""
    return os.urandom(16).hex()


class Ledger(Generic[M]):
    """The ledger that counts its own steps by mechanism, and holds the counts of other ledgers."""

    def __init__(self):
        self._by_id: dict[str, Counter[M]] = {}

    @property
    def id(self) -> str:
        """The id under which this ledger, and no other, counts."""
        return _ids.setdefault(self, new_id())

    @property
    def entries(self) -> dict[str, Counts[M]]:
        """The counts of each ledger by its id, as far as this ledger knows them."""
        return {id: dict(counts) for id, counts in self._by_id.items()}

    @property
    def total(self) -> Counts[M]:
        """The steps of each mechanism, whoever counted them."""
        return sum(self._by_id.values(), Counter())

    def count(self, mechanism: M, steps: int) -> None:
        """Add `steps` steps of a mechanism to this ledger's own count."""
        self._by_id.setdefault(self.id, Counter())[mechanism] += steps

    def merge(self, entries: Mapping[str, Counts[M]]) -> None:
        """Take over other ledgers' counts: for each id and mechanism, the larger of the two counts."""
        for id, counts in entries.items():
            if larger := self._by_id.get(id, Counter()) | Counter(counts):
                self._by_id[id] = larger
