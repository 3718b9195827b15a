"""The mechanism that is accounted for: the sum of a Poisson sample's clipped gradients, plus Gaussian noise.

Each record enters the sample with probability `sample_rate`, independently; the noise's standard deviation is
`noise_multiplier` times the bound on a record's contribution. Data sets are adjacent if they differ by adding or removing one
record.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from fastloda.errors import UserError

MIN_DELTA = 1e-14  # below it the tail of a composed distribution is lost in rounding
MAX_STEPS = 10**12
# The errors that dp-accounting and prv-accountant raise where they can't compute.
FAILURES = (ArithmeticError, AssertionError, IndexError, MemoryError, RuntimeError, ValueError)


class Mechanism(NamedTuple):
    """The mechanism that makes `steps` releases with the same sample rate and noise."""

    sample_rate: float
    noise_multiplier: float
    steps: int


def check_mechanism(sample_rate: float, noise_multiplier: float, steps: int) -> Mechanism:
    """Check the numbers of a mechanism, and make it.

    Raises:
        TypeError, ValueError: a number is out of range, or no number; the message names it.
    """
    return Mechanism(check_rate(sample_rate), check_noise(noise_multiplier), check_steps(steps))


def merged(mechanisms: Iterable[Sequence]) -> tuple[Mechanism, ...]:
    """Check mechanisms, merge those of equal rate and noise, and drop those without steps.

    Raises:
        TypeError, ValueError: an item is no triple of numbers in range.
    """
    steps = Counter()
    for item in mechanisms:
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 3:
            raise UserError(f"each mechanism is (sample_rate, noise_multiplier, steps), got {item!r}")
        checked = check_mechanism(*item)
        steps[checked[:2]] += checked.steps
    return tuple(Mechanism(*key, check_steps(count)) for key, count in sorted(steps.items()) if count)


def check_real(value: float, name: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{name} must be finite, got {value!r}")
    return number


def check_rate(value: float) -> float:
    if not 0 < (rate := check_real(value, "sample_rate")) <= 1:
        raise UserError(f"sample_rate must be in (0, 1], got {value!r}")
    return rate


def check_noise(value: float) -> float:
    if (noise := check_real(value, "noise_multiplier")) < 0:
        raise UserError(f"noise_multiplier must be >= 0, got {value!r}")
    return noise


def check_delta(value: float) -> float:
    if not MIN_DELTA < (delta := check_real(value, "delta")) < 1:
        raise UserError(f"delta must be in ({MIN_DELTA}, 1), got {value!r}")
    return delta


def check_steps(value: int, name: str = "steps", least: int = 0) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= MAX_STEPS:
        raise UserError(f"{name} must be from {least} to {MAX_STEPS}, got {value!r}")
    return int(value)
