"""The joint epsilon of several runs on the same records: the smallest of several upper bounds.

The cheap bound (`rdp.py`) exists for every input. Where the tight one (`pld.py`) can't be computed the cheap one is reported,
with a warning. A second tight one (`prv.py`) bounds runs of equal steps from both sides: its upper bound counts where it is the
smallest, and its lower bound would show that the first tight one is too low.
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache

from fastloda.accounting.mechanism import FAILURES, Mechanism, check_delta, merged
from fastloda.accounting.rdp import rdp_epsilon, worst_of_similar


class PrivacyAccountingWarning(UserWarning):
    """The warning that the reported epsilon is valid, but looser than a tight bound would be."""


def compose_epsilon(mechanisms: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Compute an upper bound on epsilon of several runs on the same records.

    Each of `mechanisms` is a run's `(sample_rate, noise_multiplier, steps)`. They are composed jointly: the result is much less
    than the sum of the runs' epsilons, and one delta covers all runs.

    Raises:
        ValueError, TypeError: a number is out of range.
    """
    delta, spent = check_delta(delta), merged(mechanisms)
    epsilon, trouble = least_epsilon(spent, delta)
    if trouble:
        warn_of_loose_bound(trouble)
    return epsilon


@lru_cache(maxsize=1024)
def least_epsilon(mechanisms: tuple[Mechanism, ...], delta: float, compare: bool = True) -> tuple[float, str | None]:
    """Compute the smallest of the bounds; also return why there is no tight one among them, or None if there is one.

    compare: whether to use prv-accountant too, where that is quick.
    """
    cheap = rdp_epsilon(mechanisms, delta)
    if cheap in (0.0, math.inf) or all(m.sample_rate == 1 for m in mechanisms):
        return cheap, None
    from fastloda.accounting.pld import pld_epsilon  # not at the top: their libraries take seconds to import
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
    """Warn that the RDP bound is reported in place of a tight one; trouble: the reason."""
    text = f"there is no tight bound here ({trouble}); epsilon is the RDP bound: valid, but looser"
    warnings.warn(text, PrivacyAccountingWarning, stacklevel)
