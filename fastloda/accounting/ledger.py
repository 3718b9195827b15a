"""Ledgers, which remember who counted each step: so they can be merged, and no step is forgotten or counted twice.

Each ledger counts under an id that nobody can guess and no other ledger has: a copy, an unpickled ledger and a forked child draw
their own. A count under one id grows in one ledger only; so the larger of two counts is the later one, and includes the other.
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
)  # not attributes of the ledgers, for a copy would have the same id
os.register_at_fork(after_in_child=_ids.clear)


def new_id() -> str:
    """Draw an id that no other ledger has."""
    return os.urandom(16).hex()


class Ledger(Generic[M]):
    """The ledger of steps by mechanism, its own and those that other ledgers have counted."""

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
        """Add steps that this ledger's owner has taken."""
        self._by_id.setdefault(self.id, Counter())[mechanism] += steps

    def merge(self, entries: Mapping[str, Counts[M]]) -> None:
        """Take in other ledgers' counts: the larger one of the same id, and all of an id that is new."""
        for id, counts in entries.items():
            if larger := self._by_id.get(id, Counter()) | Counter(counts):
                self._by_id[id] = larger
