"""The history of private steps, of any noise and any sample rate, with the interface of Opacus's accountants."""

import warnings
from typing import Any

from fastloda.accountant import Mechanism, PrivacyAccountant, _cheap_epsilon, compose_epsilon

METHODS = ("prv", "rdp")
IGNORED = {"alphas", "eps_error", "delta_error"}


class HistoryAccountant:
    """Counts steps by (noise_multiplier, sample_rate), and composes them all.

    Args:
        method: "prv" (tight; see `compose_epsilon`) or "rdp" (instant, looser). Both are upper bounds.

    Raises:
        ValueError: another method. Opacus's "gdp" is an approximation that can lie below the true epsilon.
    """

    def __init__(self, method: str = "prv"):
        if method not in METHODS:
            why = ": it is an approximation that can lie below the true epsilon" if method == "gdp" else ""
            raise ValueError(f"accountant must be one of {METHODS}, got {method!r}{why}")
        self.method = method
        self._steps: dict[tuple[float, float], int] = {}

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise_multiplier, sample_rate, steps), as in Opacus."""
        return [(*key, steps) for key, steps in self._steps.items()]

    def __len__(self) -> int:
        """Steps taken."""
        return sum(self._steps.values())

    def mechanism(self) -> str:
        return self.method

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one step."""
        key = (noise_multiplier, sample_rate)
        self._steps[key] = self._steps.get(key, 0) + 1

    def get_epsilon(self, delta: float, **settings: Any) -> float:
        """Upper bound on epsilon for all steps together; 0 before the first, infinite without noise.

        settings: Opacus's alphas, eps_error and delta_error; not needed here, and ignored with a warning.

        Raises:
            ValueError, TypeError: delta is not in (0, 1).
        """
        if unknown := settings.keys() - IGNORED:
            raise TypeError(f"get_epsilon does not know {sorted(unknown)}")
        if settings:
            warnings.warn(
                f"{sorted(settings)} ignored: orders and errors are chosen for the least upper bound", stacklevel=2
            )
        spent = [(rate, noise, steps) for noise, rate, steps in self.history]
        if self.method == "prv" or not spent:
            return compose_epsilon(spent, delta)
        PrivacyAccountant(*spent[0][:2], "rdp").epsilon(delta, 1)  # checks delta
        return _cheap_epsilon(tuple(Mechanism(*item) for item in sorted(spent)), delta)

    def state_dict(self) -> dict:
        """Plain values, in Opacus's form."""
        return {"history": [list(item) for item in self.history], "mechanism": self.method}

    def load_state_dict(self, state: dict) -> None:
        """Continue a record, Opacus's own too. What was spent stays spent: of equal steps the larger count is kept.

        Raises:
            ValueError: the record is malformed; nothing has changed then.
        """
        try:
            history = {(float(noise), float(rate)): int(steps) for noise, rate, steps in state["history"]}
            compose_epsilon([(rate, noise, 0) for noise, rate in history], 0.5)  # checks noise and rate
            if min(history.values(), default=0) < 0:
                raise ValueError("a negative number of steps")
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(f"malformed privacy record: {error}") from error
        for key, steps in history.items():
            self._steps[key] = max(steps, self._steps.get(key, 0))
