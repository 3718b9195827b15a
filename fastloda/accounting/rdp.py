"""The cheap upper bound, instant and for every input: Renyi DP, or the plain Gaussian mechanism where that is smaller.

RDP of the subsampled Gaussian   Mironov, Talwar, Zhang, https://arxiv.org/abs/1908.10530
RDP to (epsilon, delta)          Canonne, Kamath, Steinke, https://arxiv.org/abs/2004.00010 (Prop. 12)
the Gaussian mechanism, exactly  Balle, Wang, https://arxiv.org/abs/1805.06530 (Theorem 8)
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, lru_cache

import numpy as np
import scipy  # its parts are imported when they are first used

from fastloda.accounting.mechanism import Mechanism

MAX_MECHANISMS = 256  # more are merged by `worst_of_similar`


# epsilon(order) is flat at its minimum: with neighbouring orders 10 to 15% apart at most 0.2% is lost.
FRACTIONAL = 1 + np.geomspace(1e-3, 11, 100)
INTEGER = np.unique(np.geomspace(12, 2**15, 60).round())
ORDERS = np.concatenate([FRACTIONAL, INTEGER])


def rdp_epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Compute the cheap upper bound on epsilon: infinite without noise, 0 without steps, exact at rate 1."""
    if not mechanisms:
        return 0.0
    if any(m.noise_multiplier == 0 for m in mechanisms) or not math.isfinite(gaussian_mu(mechanisms)):
        return math.inf
    few = worst_of_similar(mechanisms)
    rdp = sum(m.steps * _rdp(m.sample_rate, m.noise_multiplier) for m in few)
    by_order = rdp + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    # Without sampling the steps cost more, so that their exact epsilon is an upper bound too.
    return max(0.0, min(float(by_order.min()), _gaussian_epsilon(gaussian_mu(few), delta)))


def gaussian_mu(mechanisms: Iterable[Mechanism]) -> float:
    """Compute the mean of the Gaussian, of std 1, to which the steps compose without sampling: mu^2 = sum of 1 / sigma^2."""
    return math.hypot(*(math.sqrt(m.steps) / m.noise_multiplier for m in mechanisms))


def worst_of_similar(mechanisms: tuple[Mechanism, ...]) -> tuple[Mechanism, ...]:
    """Merge mechanisms into few that cost at least as much: similar ones all get their largest rate and least noise.

    A mechanism with less noise, or a larger rate, costs more, since the other can be computed from its output. Mechanisms are
    similar if their epsilons differ by about 0.1%, or more if there are too many. Those of rate 1 compose to one Gaussian.
    """
    plain = [m for m in mechanisms if m.sample_rate == 1]
    sampled = [m for m in mechanisms if m.sample_rate < 1]
    width = 1e-3
    while len(cells := _cells(sampled, width)) > MAX_MECHANISMS:
        width *= 2
    columns = (zip(*cell, strict=True) for cell in cells)
    worst = [Mechanism(max(rates), min(noises), sum(steps)) for rates, noises, steps in columns]
    return (*worst, Mechanism(1.0, 1 / gaussian_mu(plain), 1)) if plain else tuple(worst)


def _cells(mechanisms: list[Mechanism], width: float) -> list[list[Mechanism]]:
    """Group the mechanisms by the cells of a grid; between neighbouring cells epsilon differs by a share of about `width`."""
    cells = defaultdict(list)
    for m in mechanisms:
        # The less noise there is, the more a change of it matters.
        noise = math.log(m.noise_multiplier) - min(0.5 / m.noise_multiplier / m.noise_multiplier, 1e9)
        cells[math.floor(math.log(m.sample_rate) / width), math.floor(noise / width)].append(m)
    return list(cells.values())


@lru_cache(maxsize=2 * MAX_MECHANISMS)
def _rdp(q: float, sigma: float) -> np.ndarray:
    """Compute the Renyi divergence of one step at each a of ORDERS, with x ~ N(0, sigma^2):

    log E[(1 - q + q exp((2x - 1) / (2 sigma^2)))^a] / (a - 1)
    """
    if q == 1 or sigma < 0.05:  # the plain Gaussian: exact at q = 1, and a bound where noise is next to nothing
        with np.errstate(over="ignore"):
            return ORDERS / 2 / sigma / sigma
    # Fractional orders go by the trapezoid rule, exponentially accurate here: its step h is small against the
    # Gaussian's width sigma and against pi sigma^2, the distance of the integrand's branch points from the
    # real line.
    h = min(sigma, sigma * sigma) / 2
    x = np.arange(-10 * sigma, FRACTIONAL[-1] + 10 * sigma, h)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma * sigma))
    fractional = scipy.special.logsumexp(
        scipy.stats.norm.logpdf(x, scale=sigma) + FRACTIONAL[:, None] * ratio, axis=1
    ) + math.log(h)
    moments = np.concatenate([fractional, _log_moments(q, sigma)])
    return (moments + 1e-14 * ORDERS) / (ORDERS - 1)  # the summand covers rounding


@cache
def _binomials() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """List the binomial theorem's terms for all INTEGER orders, joined: order, k, log(order over k), where each order begins."""
    orders = np.repeat(INTEGER, INTEGER.astype(int) + 1)
    k = np.concatenate([np.arange(order + 1) for order in INTEGER])
    log_gamma = scipy.special.gammaln
    return orders, k, log_gamma(orders + 1) - log_gamma(k + 1) - log_gamma(orders - k + 1), np.flatnonzero(k == 0)


def _log_moments(q: float, sigma: float) -> np.ndarray:
    """Compute the logarithm of the expectation in `_rdp` for INTEGER orders, by the binomial theorem."""
    orders, k, log_binomial, starts = _binomials()
    terms = log_binomial + k * math.log(q) + (orders - k) * math.log1p(-q) + k * (k - 1) / (2 * sigma * sigma)
    largest = np.maximum.reduceat(terms, starts)
    terms -= np.repeat(largest, INTEGER.astype(int) + 1)
    return largest + np.log(np.add.reduceat(np.exp(terms), starts))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Solve for epsilon e of N(mu, 1) against N(0, 1): Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu) = delta.

    The unknown is t with e = mu^2/2 + mu t: then the terms are Phi(-t) and exp(-t^2/2) erfcx((mu + t)/sqrt(2)) / 2, which keep
    their digits for every mu.
    """
    mu = max(mu, 1e-12)  # below it the difference of the two terms is rounding

    def excess(t: float) -> float:
        plus = scipy.special.log_ndtr(-t)
        minus = math.log(scipy.special.erfcx((mu + t) / math.sqrt(2)) / 2) - t * t / 2
        covered = min(0.0, minus - plus) - 1e-14  # against rounding
        return plus + math.log(-math.expm1(covered)) - math.log(delta)

    least = max(-mu / 2, -40.0)  # epsilon 0, or where Phi(-t) is 1
    if excess(least) <= 0:
        return 0.0
    most = math.sqrt(-2 * math.log(delta))  # by the tail bound, Phi(-t) <= exp(-t^2/2) / 2
    t = scipy.optimize.brentq(excess, least, most, xtol=1e-13, rtol=1e-14) + 1e-12
    return mu * (mu / 2 + t) * (1 + 1e-11) + 1e-12
