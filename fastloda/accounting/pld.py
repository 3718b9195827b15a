"""A tight upper bound: Google's dp-accounting composes distributions of the privacy loss (PLD) on a grid.

The cheap bound estimates the grid's size beforehand, so that nothing hangs or fills the memory. The method, "connecting the
dots": Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, https://arxiv.org/abs/2207.04380
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism, identity
from scipy.stats import norm

from fastloda.accounting.mechanism import Mechanism
from fastloda.accounting.rdp import rdp_epsilon

PLDOf = Callable[[float, float, float, int], PrivacyLossDistribution]
GRID = 2**20  # the most points of the grid: some seconds, 300 MB


def pld_epsilon(
    mechanisms: tuple[Mechanism, ...], delta: float, pld_of: PLDOf | None = None, rough: float | None = None
) -> float:
    """Compute PLD's upper bound on epsilon.

    Args:
        mechanisms: the mechanisms to compose.
        delta: the delta for which epsilon is bounded.
        pld_of: function (sample_rate, noise_multiplier, interval, log of the mass that may be cut off) -> distribution of one
            step that is at least as private. Default: that of the subsampled Gaussian itself.
        rough: an estimate of epsilon, for which the grid is made. Default: the cheap bound.

    Raises:
        ValueError: the grid would be too large or rounding too coarse for this delta, or dp-accounting gives no finite bound.
    """
    composed, rounding = _composed(mechanisms, delta, pld_of, rough)
    with np.errstate(all="ignore"):
        epsilon = composed.get_epsilon_for_delta(delta - rounding)
    if not math.isfinite(epsilon):
        raise ValueError(f"it returned {epsilon}")
    return epsilon


def pld_deltas(mechanisms: tuple[Mechanism, ...], epsilons: np.ndarray, delta: float) -> np.ndarray:
    """Compute PLD's upper bounds on delta at several epsilons >= 0, in ascending order, on the grid that is made for `delta`.

    Raises:
        ValueError: as for `pld_epsilon`.
    """
    composed, rounding = _composed(mechanisms, delta)
    with np.errstate(all="ignore"):
        deltas = np.asarray(composed.get_delta_for_epsilon(epsilons.tolist()), dtype=float)
    if not np.isfinite(deltas).all():
        raise ValueError("it returned a delta that is not finite")
    return np.clip(deltas, 0, 1) + rounding


def _composed(
    mechanisms: tuple[Mechanism, ...], delta: float, pld_of: PLDOf | None = None, rough: float | None = None
) -> tuple[PrivacyLossDistribution, float]:
    """Compose the mechanisms' distributions; also return the error by which rounding may make a delta too small.

    The arguments are those of `pld_epsilon`.

    Raises:
        ValueError: the grid would be too large or rounding too coarse for this delta.
    """
    total = sum(m.steps for m in mechanisms)
    lost = delta / 1e5  # the probability that all tails cut off may hold; its losses count as infinite
    spans = sum(_span(m, lost / total) for m in mechanisms)
    reach = 4 * rough if rough else rdp_epsilon(mechanisms, 1e-15)
    # The method's error is proportional to the square of the interval over a step's typical loss.
    wanted = min((rough or rdp_epsilon(mechanisms, min(delta, 1e-5))) / 96 / math.sqrt(total), 0.5)
    least = (2 * spans + reach) / GRID
    if least > 4 * wanted:
        raise ValueError(f"a grid of {(2 * spans + reach) / wanted:.1g} points would be needed, more than {4 * GRID}")
    interval = 2.0 ** math.floor(math.log2(max(wanted, 2 * least)))  # a power of 2, so that cached PLDs are found again
    rounding = (total + (2 * spans + reach) / interval) * 2.0**-52  # the error of a Fourier transform and its powers
    if rounding > delta / 2:
        raise ValueError(f"delta {delta:.3g} is within rounding, {rounding:.1g}, of so many steps")
    log_lost, lost = math.floor(math.log(lost / total)), lost / len(mechanisms)
    with np.errstate(all="ignore"):
        nothing = identity(interval)
        parts = [_power((pld_of or _pld)(*m[:2], interval, log_lost), m.steps, nothing, lost) for m in mechanisms]
        while len(parts) > 1:  # in pairs, so that short distributions are composed with short ones
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [a.compose(b, lost) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
    return parts[0], rounding


def _span(m: Mechanism, lost: float) -> float:
    """Compute a bound on a step's privacy loss, which is exceeded with probability `lost` at most."""
    q, sigma = m[:2]
    largest = (0.5 - norm.ppf(lost / 10) * sigma) / sigma / sigma
    return largest if q == 1 else float(np.logaddexp(math.log1p(-q), math.log(q) + largest)) - math.log1p(-q)


@lru_cache(maxsize=8)
def _pld(q: float, sigma: float, interval: float, log_lost: int) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        log_mass_truncation_bound=log_lost,
    )


def _power(
    pld: PrivacyLossDistribution, steps: int, nothing: PrivacyLossDistribution, lost: float
) -> PrivacyLossDistribution:
    """Compose equal steps; many of them in stages, since dp-accounting's bound on the result's length is loose for many.

    nothing: the distribution of no step at all; composing a result with it cuts off the result's empty ends.
    """
    if steps <= 2048:
        return pld.self_compose(steps, lost) if steps > 1 else pld
    many, rest = divmod(steps, 1024)
    stage = pld.self_compose(1024, lost / many).compose(nothing, lost / many)
    composed = _power(stage, many, nothing, lost).compose(nothing, lost)
    return composed.compose(_power(pld, rest, nothing, lost), lost) if rest else composed
