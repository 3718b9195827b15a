"""Epsilon of any runs on the same records together: several upper bounds, the smallest one is reported.

The cheap one (`rdp.py`) exists for every input. Where the tight one (`pld.py`) can't be had it stands, with a warning. A second
tight one (`prv.py`) bounds runs of equal steps from both sides: its upper bound counts where it is the smallest one, and its
lower one would show a tight bound that is too low.
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache

from fastloda.accounting.mechanism import FAILURES, Mechanism, check_delta, merged
from fastloda.accounting.rdp import rdp_epsilon, worst_of_similar


class PrivacyAccountingWarning(UserWarning):
    """The reported epsilon is valid, but looser than a tight bound would have been."""


def compose_epsilon(mechanisms: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Upper bound on epsilon of several runs on the same records.

    Each is `(sample_rate, noise_multiplier, steps)`. They are composed jointly, which gives much less than
    the sum of the runs' epsilons, and one delta covers all.
    """
    delta, spent = check_delta(delta), merged(mechanisms)
    epsilon, trouble = least_epsilon(spent, delta)
    if trouble:
        warn_of_loose_bound(trouble)
    return epsilon


@lru_cache(maxsize=1024)
def least_epsilon(mechanisms: tuple[Mechanism, ...], delta: float, compare: bool = True) -> tuple[float, str | None]:
    """The smallest of the bounds, and what kept a tight one from being there (None: nothing did).

    compare: with prv-accountant, where that is quick.
    """
    cheap = rdp_epsilon(mechanisms, delta)
    if cheap in (0.0, math.inf) or all(m.sample_rate == 1 for m in mechanisms):
        return cheap, None
    from fastloda.accounting.pld import pld_epsilon  # here, for their libraries take seconds to import
    from fastloda.accounting.prv import prv_epsilons

    try:
        few = worst_of_similar(mechanisms)
        tight = pld_epsilon(few, delta)
        lower, upper = prv_epsilons(few[0], delta) if compare and len(few) == 1 else (0.0, math.inf)
        if tight < lower:
            raise ValueError(f"dp-accounting says {tight:.6g} at most, and prv-accountant {lower:.6g} at least")
        return min(cheap, tight, upper), None
    except FAILURES as error:
        return cheap, str(error) or type(error).__name__


def warn_of_loose_bound(trouble: str, stacklevel: int = 3) -> None:
    """Say that RDP's bound stands in for a tight one, and what kept that from being there."""
    text = f"there is no tight bound here ({trouble}); epsilon is the RDP bound: valid, but looser"
    warnings.warn(text, PrivacyAccountingWarning, stacklevel)
