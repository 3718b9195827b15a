"""Group privacy: an upper bound on epsilon for a person with several records, where the unit of privacy is one record.

A step draws J ~ Binomial(m, q) of a person's m records, each independently, so that the person changes the step's sum by a
vector of length at most J C, whatever the other records are. Such a step is dominated, in both directions of add/remove, by the
scalar pair

    sum_j P(J = j) N(j, sigma^2)    and    N(0, sigma^2),

a mixture of Gaussians: Choquette-Choo, Ganesh, Steinke, Thakurta, https://arxiv.org/abs/2310.15526 (Corollary 4.7: each vector
may be replaced by its length), used for a user's examples by Charles et al., https://arxiv.org/abs/2407.07737. Lengths may be
replaced by larger ones, since the best test between the two distributions is a threshold, which then errs less. Dominating
pairs compose, also where later steps depend on earlier ones (Zhu, Dong, Wang, https://arxiv.org/abs/2106.08567). For m = 1 this
is the pair from which a record's epsilon is computed.

If all m records entered a batch as soon as one does, and changed its sum by m C, the step would be a subsampled Gaussian of
rate 1 - (1 - q)^m and noise sigma / m, which dominates the mixture, since J <= m 1[J > 0]. That bound is looser, and exists for
every input.
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss
from scipy.special import logsumexp
from scipy.stats import binom

from fastloda.accounting.compose import PrivacyAccountingWarning, least_epsilon
from fastloda.accounting.mechanism import FAILURES, Mechanism, check_delta, check_steps, merged
from fastloda.accounting.pld import pld_epsilon
from fastloda.accounting.rdp import worst_of_similar

MOST_RECORDS = 64  # for more the mixture would take long, and the looser bound is returned
ALWAYS = 0.999  # from this rate on all records count as drawn in every step, which only raises the bound
BISECTIONS = 60  # halvings of a bracket of some hundred standard deviations, down to rounding


def group_epsilon(mechanisms: Iterable[tuple[float, float, int]], delta: float, records: int) -> float:
    """Compute an upper bound on epsilon of a person with `records` records, in runs that count epsilon for one record.

    >>> group_epsilon([(0.01, 1.0, 1000)], 1e-6, records=5)  # where one record's epsilon is 2.1, five records' is 13.0

    It is less than the general bound for group privacy: `records` times the epsilon at a much smaller delta. It holds for
    adding or removing any part of these records. Training by owner (`DPTrainer(owners=...)`) has an epsilon that holds for any
    number of records, and is usually smaller.

    It is not valid for runs whose noise is correlated over steps (`bands` > 1): the sums that two records of a person change
    may then overlap from one round to the next, which the count of rounds does not cover.

    Args:
        mechanisms: the runs, each `(sample_rate, noise_multiplier, steps)`, as `compose_epsilon` takes them.
        delta: the delta for which epsilon is bounded.
        records: the largest number of records of one person, at least 1. Beyond 64 the bound is looser.

    Raises:
        ValueError, TypeError: a number is out of range.
    """
    delta, spent, members = check_delta(delta), merged(mechanisms), check_steps(records, "records", least=1)
    loose, _ = least_epsilon(merged(_drawn_together(mechanism, members) for mechanism in spent), delta)
    if loose in (0.0, math.inf) or members == 1 or all(m.sample_rate == 1 for m in spent):
        return loose
    try:
        return _tight_epsilon(spent, delta, members, loose)
    except FAILURES as error:
        warnings.warn(
            f"there is no tight bound here ({str(error) or type(error).__name__}); epsilon is that of records which are drawn "
            "together: valid, but looser",
            PrivacyAccountingWarning,
            stacklevel=2,
        )
        return loose


def _tight_epsilon(spent: tuple[Mechanism, ...], delta: float, members: int, loose: float) -> float:
    """Compute the bound from the mixtures, each time with a grid made for the last result, until it falls by less than 1%."""
    if members > MOST_RECORDS:
        raise ValueError(f"for more than {MOST_RECORDS} records it is not computed")
    pairs = [(_drawn_together(mechanism, members), mechanism) for mechanism in worst_of_similar(spent)]
    together, single = merged(worse for worse, _ in pairs), {worse[:2]: mechanism[:2] for worse, mechanism in pairs}
    before, found = math.inf, loose
    while found < 0.99 * before:
        before = found
        try:
            found = min(before, pld_epsilon(together, delta, lambda *m: _pld(*single[m[:2]], members, *m[2:]), before))
        except FAILURES:
            if before == loose:
                raise
    return found


def _drawn_together(m: Mechanism, members: int) -> Mechanism:
    """Make the mechanism, which costs more, in which all members enter a batch as soon as one does."""
    rate = -math.expm1(members * math.log1p(-m.sample_rate)) if m.sample_rate < 1 else 1.0
    return Mechanism(rate, m.noise_multiplier / members, m.steps)


class _GroupLoss(MixtureGaussianPrivacyLoss):
    """The privacy loss of the mixture, with an inverse that is exact to rounding; dp-accounting's errs by 1e-6 up or down."""

    def inverse_privacy_losses(self, privacy_losses: np.ndarray, precision: float = 0.0) -> np.ndarray:
        """Find the x at which the loss, which falls with x, is each of privacy_losses; outside the bracket there is no mass."""
        reach = 100 * self._standard_deviation + 2 * self.sensitivities.max()
        low, high = np.full(len(privacy_losses), -reach), np.full(len(privacy_losses), reach)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = self._losses(middle) > privacy_losses
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return (low + high) / 2

    def _losses(self, x: np.ndarray) -> np.ndarray:
        sign = -1 if self.adjacency_type == AdjacencyType.REMOVE else 1
        moved = self.sensitivities * (sign * x[:, None] - self.sensitivities / 2) / self._standard_deviation**2
        return -sign * logsumexp(moved, axis=1, b=self.sampling_probs)


@lru_cache(maxsize=8)
def _pld(q: float, sigma: float, members: int, interval: float, log_lost: int) -> PrivacyLossDistribution:
    if q > ALWAYS:
        return from_gaussian_mechanism(
            sigma / members, value_discretization_interval=interval, log_mass_truncation_bound=log_lost
        )
    drawn = list(range(members + 1))
    chances = binom.pmf(drawn, members, q).tolist()
    pmfs = (
        _pmf(_GroupLoss(sigma, drawn, chances, log_mass_truncation_bound=log_lost, adjacency_type=direction), interval)
        for direction in (AdjacencyType.REMOVE, AdjacencyType.ADD)
    )
    return PrivacyLossDistribution(*pmfs)


def _pmf(loss: _GroupLoss, interval: float) -> PLDPmf:
    """Put the losses on the grid by connecting the dots, as dp-accounting does for its own mechanisms."""
    tail = loss.privacy_loss_tail()
    first = math.floor(loss.privacy_loss(tail.upper_x_truncation) / interval)
    last = math.ceil(loss.privacy_loss(tail.lower_x_truncation) / interval)
    deltas = loss.get_delta_for_epsilon((np.arange(first, last + 1) * interval).tolist())
    return create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)
