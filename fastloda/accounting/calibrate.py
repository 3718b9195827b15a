"""Calibration: the least noise that keeps to a given epsilon, stored on disk as the first guess for the same question."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import scipy  # its parts are imported when they are first used
from platformdirs import user_cache_path

from fastloda.accounting.compose import least_epsilon, warn_of_loose_bound
from fastloda.accounting.mechanism import (
    Mechanism,
    check_delta,
    check_noise,
    check_rate,
    check_real,
    check_steps,
    merged,
)
from fastloda.accounting.rdp import rdp_epsilon
from fastloda.errors import UserError
from fastloda.files import write_atomically

VERSION = 1  # the version of the cache's files
MAX_EPSILON = 10**6  # a target beyond it is no privacy at all
NEARLY = 0.996  # calibration spends at least this share of its target


def calibrate_noise(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, earlier: Sequence[Sequence] = ()
) -> float:
    """Find the smallest noise multiplier whose reported epsilon after `steps` is at most `target_epsilon`.

    `PrivacyAccountant(sample_rate, sigma).epsilon(delta, steps)` is then at most the target (exactly so on the same machine),
    and at most 0.5% under it where a tight bound can be computed. This takes 1 to 20 s. The answer is stored in the user's
    cache directory, but only as a first guess: it is verified like any other, so a wrong file costs time, not privacy.

    earlier: releases about the same records, as `compose_epsilon` takes them, whose cost is part of the same target.

    Raises:
        ValueError, TypeError: an argument is out of range, or earlier leaves less than a twentieth of the target.
    """
    target, delta = check_real(target_epsilon, "target_epsilon"), check_delta(delta)
    rate, steps = check_rate(sample_rate), check_steps(steps, least=1)
    if not 0 < target <= MAX_EPSILON:
        raise UserError(f"target_epsilon must be in (0, {MAX_EPSILON}], got {target_epsilon!r}")
    before = merged(earlier)
    if before and (spent := least_epsilon(before, delta)[0]) > 0.95 * target:
        raise UserError(
            f"earlier releases cost epsilon {spent:.3g} of the {target:g}: too little is left to train with"
        )
    question = {"target_epsilon": target, "delta": delta, "sample_rate": rate, "steps": steps}
    if before:
        question["earlier"] = [list(mechanism) for mechanism in before]

    best, trouble = math.inf, None

    def bound(sigma: float) -> float:
        nonlocal best, trouble
        epsilon, why = least_epsilon(merged([*before, (rate, sigma, steps)]), delta)
        if epsilon <= target and sigma < best:
            best, trouble = sigma, why
        return epsilon

    if (known := _recall(question)) is None or not NEARLY * target < bound(known) <= target:
        guess = _solve_noise(lambda sigma: rdp_epsilon((Mechanism(rate, sigma, steps),), delta), target)
        _solve_noise(bound, target, guess)
    if trouble:
        warn_of_loose_bound(trouble)
    _remember(question, best)
    return best


def _solve_noise(bound: Callable[[float], float], target: float, start: float = 1.0) -> float:
    """Find a noise multiplier at which `bound`, a decreasing function of it, is at the target or a little below."""

    def excess(log_sigma: float) -> float:
        share = bound(math.exp(log_sigma)) / target
        return 0.0 if NEARLY < share <= 1 else math.log(min(max(share, 1e-3), 1e3))

    low = high = math.log(start)
    step = 0.05
    while excess(high) > 0:
        low, high, step = high, high + step, 2 * step
    while excess(low) < 0:
        low, high, step = low - step, low, 2 * step
    return math.exp(scipy.optimize.brentq(excess, low, high, xtol=1e-6))


def _cache_file(question: dict) -> Path:
    content = json.dumps({"version": VERSION, **question}, sort_keys=True)
    return user_cache_path("fastloda") / "noise" / f"{hashlib.sha256(content.encode()).hexdigest()}.json"


def _recall(question: dict) -> float | None:
    """Read the noise multiplier stored for exactly this question; None if there is none."""
    try:
        answer = json.loads(_cache_file(question).read_text())
        sigma = answer.pop("noise_multiplier")
        return check_noise(sigma) if answer == {"version": VERSION, **question} else None
    except (OSError, TypeError, ValueError, LookupError, AttributeError, RecursionError):
        return None


def _remember(question: dict, sigma: float) -> None:
    """Store the noise multiplier for this question, if the cache can be written."""
    path = _cache_file(question)
    answer = {"version": VERSION, **question, "noise_multiplier": sigma}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(answer).encode())
    except OSError:
        pass
