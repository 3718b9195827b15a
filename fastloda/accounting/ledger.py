"""Steps by the account that counted them: so accounts merge, and no step is forgotten, and none is counted twice.

Each ledger counts under an id that nobody can guess and no other ledger has: a copy, an unpickled ledger and a forked child draw
their own. A count under one id grows in one place only; so of two of them the larger is the later one, and holds the other.
"""

import os
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

M = TypeVar("M", bound=Hashable)  # what stands for a mechanism
Counts = Mapping[M, int]

_ids: "WeakKeyDictionary[Ledger, str]" = (
    WeakKeyDictionary()
)  # outside of the ledgers, for copying would take them along
os.register_at_fork(after_in_child=_ids.clear)


def new_id() -> str:
    """An id that no other ledger has."""
    return os.urandom(16).hex()


class Ledger(Generic[M]):
    """Counts steps by mechanism, and takes in what other ledgers have counted."""

    def __init__(self):
        self._by_id: dict[str, Counter[M]] = {}

    @property
    def id(self) -> str:
        """What this ledger, and no other, counts under."""
        return _ids.setdefault(self, new_id())

    @property
    def entries(self) -> dict[str, Counts[M]]:
        """What each ledger has counted, as far as this one knows."""
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
