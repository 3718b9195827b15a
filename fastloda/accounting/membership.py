"""Bounds on membership attacks: how well anyone can tell from all that was released whether a certain record was used.

An attack accuses a record of having been used. If the releases are (epsilon, delta)-private for adding or removing a record,
the attack's true positive rate t and false positive rate f obey

    t <= e^epsilon f + delta    and    1 - f <= e^epsilon (1 - t) + delta

All pairs of epsilon and delta that the accountant can prove hold at once, so that the smallest of their bounds holds.

the region of (f, t)       Kairouz, Oh, Viswanath, https://arxiv.org/abs/1311.0776 (Theorem 2.1 and Remark 2.2)
Gaussian DP (mu)           Dong, Roth, Su, https://arxiv.org/abs/1905.02383
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy  # its parts are imported when they are first used

from fastloda.accounting.compose import least_epsilon
from fastloda.accounting.mechanism import FAILURES, Mechanism, check_delta, check_real, merged
from fastloda.accounting.rdp import gaussian_mu, rdp_epsilon, worst_of_similar
from fastloda.errors import UserError

PAIRS = 2000  # pairs of a whole curve: its chords are then within 1e-5 of it
RATES = 10_000  # false positive rates at which the curve is compared with a Gaussian's: mu is within 0.001


@dataclass(frozen=True, eq=False)
class MembershipBound:
    """The upper bound on every membership attack that follows from some proven pairs of epsilon and delta.

    Attributes:
        epsilons, deltas: the pairs, float64 [pairs]; the releases are private for each of them.
        mu: such that one number from N(mu, 1) or N(0, 1) reveals at least as much as the releases; infinity if none is known.
    """

    epsilons: np.ndarray
    deltas: np.ndarray
    mu: float = math.inf

    @classmethod
    def of_promise(cls, epsilon: float, delta: float) -> Self:
        """Make the bound that follows from (epsilon, delta) alone."""
        return cls(np.array([float(epsilon)]), np.array([check_delta(delta)]))

    @classmethod
    def of_releases(cls, mechanisms: Iterable[tuple[float, float, int]], delta: float) -> Self:
        """Make the bound that follows from the accountant's whole curve, most exact near `delta`; this takes 0.1 to 5 s.

        mechanisms: releases about the same records, as `compose_epsilon` takes them.

        Raises:
            ValueError, TypeError: a number is out of range.
        """
        spent, delta = merged(mechanisms), check_delta(delta)
        epsilons, deltas = _curve(spent, delta)
        reported = least_epsilon(spent, delta)[0]  # so that the curve's bound is never looser than the reported pair's
        mu = gaussian_mu(spent) if _noisy(spent) else math.inf
        return cls(np.append(epsilons, reported), np.append(deltas, delta), mu)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Compute the largest share of used records that an attack can accuse, if it accuses this share of unused records."""
        rate = _check_rate(false_positive_rate)
        with np.errstate(over="ignore"):
            accused = np.exp(self.epsilons) * rate + self.deltas
            spared = 1 - np.exp(-self.epsilons) * (1 - self.deltas - rate)
        gaussian = float(scipy.special.ndtr(scipy.special.ndtri(rate) + self.mu))
        return min(1.0, float(accused.min()), float(spared.min()), gaussian)

    def advantage(self) -> float:
        """Compute the largest difference between an attack's true and false positive rates, 0 to 1."""
        with np.errstate(over="ignore"):
            pairs = 1 - 2 * (1 - self.deltas) / (1 + np.exp(self.epsilons))
        return min(1.0, float(pairs.min()), float(2 * scipy.special.ndtr(self.mu / 2) - 1))

    def gdp_mu(self, least_rate: float) -> float:
        """Compute a mu of Gaussian DP that covers every attack with false positive and false negative rates >= least_rate.

        No such attack does better than one that tells N(mu, 1) from N(0, 1). Attacks with rarer errors are left out: for them a
        sampled mechanism can be as revealing as one that uses every record in every step.
        """
        z = np.linspace(scipy.special.ndtri(_check_rate(least_rate, below=0.5)), 0, RATES // 2 + 1)
        z = np.append(z, -z[-2::-1])
        found = np.array([self.true_positive_rate(rate) for rate in scipy.special.ndtr(z)])
        # Between two false positive rates, the true one is at most that of the larger.
        within = found[:-1] <= 1 - least_rate
        reached = scipy.special.ndtri(np.minimum(found[1:], 1 - least_rate)) - z[:-1]
        return min(self.mu, max(0.0, float(reached[within].max()))) if within.any() else self.mu


def _curve(spent: tuple[Mechanism, ...], delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute pairs of epsilon and delta that bound the releases: by PLD, or by RDP where PLD fails or is not needed."""
    if _noisy(spent) and any(m.sample_rate < 1 for m in spent):
        from fastloda.accounting.pld import pld_deltas  # not at the top: its library takes seconds to import

        # A pair with an epsilon beyond log(1 / rate) bounds no attack whose errors have that rate.
        epsilons = np.linspace(0, -math.log(min(delta, 1e-5)), PAIRS)
        try:
            return epsilons, pld_deltas(worst_of_similar(spent), epsilons, delta)
        except FAILURES:
            pass
    deltas = scipy.special.expit(np.linspace(-27, 9, PAIRS // 4))  # 2e-12 to 0.9999
    return np.array([rdp_epsilon(spent, float(each)) for each in deltas]), deltas


def _noisy(spent: tuple[Mechanism, ...]) -> bool:
    return all(m.noise_multiplier > 0 for m in spent)


def _check_rate(value: float, below: float = 1.0) -> float:
    if not 0 < (rate := check_real(value, "a rate of errors")) < below:
        raise UserError(f"a rate of errors must be in (0, {below:g}), got {value!r}")
    return rate
