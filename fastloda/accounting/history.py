"""The accountant of steps with any noise multipliers and sample rates, with the interface of Opacus's accountants."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from fastloda.accounting.accountant import METHODS
from fastloda.accounting.compose import compose_epsilon
from fastloda.accounting.ledger import Counts, Ledger, new_id
from fastloda.accounting.mechanism import Mechanism, check_delta, check_mechanism, merged
from fastloda.accounting.rdp import rdp_epsilon
from fastloda.errors import UserError

IGNORED = {"alphas", "eps_error", "delta_error"}
Noise = tuple[float, float]  # noise_multiplier, sample_rate


class HistoryAccountant:
    """The accountant that counts steps by their (noise_multiplier, sample_rate), and composes them all.

    Steps whose noise is correlated (`make_private(bands=...)`) are counted by rounds: `bands` of them are one step here, at the
    rate with which a record enters its own step of the round.

    Args:
        method: "prv" (tight; see `compose_epsilon`) or "rdp" (instant, looser). Both are upper bounds.

    Raises:
        ValueError: method is another, such as Opacus's "gdp", an approximation that can lie below the true epsilon.
    """

    def __init__(self, method: str = "prv"):
        if method not in METHODS:
            why = ": it is an approximation that can lie below the true epsilon" if method == "gdp" else ""
            raise UserError(f"accountant must be one of {METHODS}, got {method!r}{why}")
        self.method = method
        self._ledger: Ledger[Noise] = Ledger()

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """The list of (noise_multiplier, sample_rate, steps), as in Opacus."""
        return [(*mechanism, steps) for mechanism, steps in self._ledger.total.items()]

    def __len__(self) -> int:
        """Count the steps taken."""
        return sum(self._ledger.total.values())

    def mechanism(self) -> str:
        return self.method

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one step.

        Raises:
            ValueError, TypeError: noise_multiplier or sample_rate is out of range; nothing is counted then.
        """
        checked = check_mechanism(sample_rate, noise_multiplier, 1)
        self._ledger.count((checked.noise_multiplier, checked.sample_rate), checked.steps)

    def get_epsilon(self, delta: float, **settings: Any) -> float:
        """Compute an upper bound on epsilon for all steps together; 0 before the first, infinite without noise.

        settings: Opacus's alphas, eps_error and delta_error; not needed here, and ignored with a warning.

        Raises:
            ValueError, TypeError: delta is not in (0, 1), or a setting is unknown.
        """
        if unknown := settings.keys() - IGNORED:
            raise TypeError(f"get_epsilon does not know {sorted(unknown)}")
        if settings:
            warnings.warn(
                f"{sorted(settings)} ignored: orders and errors are chosen for the least upper bound", stacklevel=2
            )
        spent = [Mechanism(rate, noise, steps) for noise, rate, steps in self.history]
        return compose_epsilon(spent, delta) if self.method == "prv" else rdp_epsilon(merged(spent), check_delta(delta))

    def state_dict(self) -> dict:
        """Make a state of plain values in Opacus's form; `ids` names for each item of `history` the ledger that counted it."""
        items = [(id, [*key, steps]) for id, counts in self._ledger.entries.items() for key, steps in counts.items()]
        return {"history": [item for _, item in items], "ids": [id for id, _ in items], "mechanism": self.method}

    def load_state_dict(self, state: dict) -> None:
        """Add the steps of a saved state, Opacus's too, to those taken.

        Steps are identified by the ledger that counted them. So those of a state loaded twice, of an earlier state of this
        accountant, or that two accountants have in common count once. Opacus's states have no ids, and are added whole.

        Raises:
            ValueError: the state is malformed; nothing has changed then.
        """
        try:
            entries = _entries(state)
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(f"malformed privacy record: {error}") from error
        self._ledger.merge(entries)


def _entries(state: dict) -> Mapping[str, Counts[Noise]]:
    """Read a saved state's counts by the ids of the ledgers; a state without ids gets a new one."""
    history = state["history"]
    ids = state.get("ids", [new_id()] * len(history))
    entries: dict[str, Counter[Noise]] = defaultdict(Counter)
    for id, (noise, rate, steps) in zip(ids, history, strict=True):
        if not isinstance(id, str):
            raise TypeError(f"an id must be a string, got {id!r}")
        checked = check_mechanism(rate, noise, steps)
        entries[id][checked.noise_multiplier, checked.sample_rate] += checked.steps
    return entries
