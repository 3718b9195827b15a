"""How much privacy a training run has spent.

One idea: *several upper bounds, the smallest one is reported*. A cheap one (Renyi DP, or the plain Gaussian mechanism where
that is smaller) exists for every input; a tight one, by Google's dp-accounting, composes distributions of the privacy loss
(PLD) on a grid whose size the cheap bound has estimated beforehand. So nothing hangs, or fills the memory, and where no grid
will do the cheap bound stands, with a warning. Microsoft's prv-accountant bounds runs of equal steps from both sides: its
upper bound counts where it is the smallest one, and its lower one would show a tight bound that is too low.

The mechanism is DP-SGD's: sum the clipped gradients of a Poisson sample (rate q, clip 1), add N(0, sigma^2). Adjacency is adding
or removing one record. PLD composes both directions; PRV the worse one, the removal: q N(1, sigma^2) + (1 - q) N(0, sigma^2)
against N(0, sigma^2).

    RDP of the subsampled Gaussian   Mironov, Talwar, Zhang, https://arxiv.org/abs/1908.10530
    RDP to (epsilon, delta)          Canonne, Kamath, Steinke, https://arxiv.org/abs/2004.00010 (Prop. 12)
    the Gaussian mechanism, exactly  Balle, Wang, https://arxiv.org/abs/1805.06530 (Theorem 8)
    PLD, connecting the dots         Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, https://arxiv.org/abs/2207.04380
    PRV                              Gopi, Lee, Wutschitz, https://arxiv.org/abs/2106.02848
"""

import hashlib
import json
import math
import warnings
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism, identity
from platformdirs import user_cache_path
from prv_accountant import PoissonSubsampledGaussianMechanism
from prv_accountant.composers import Heterogeneous
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from prv_accountant.privacy_random_variables import PrivacyRandomVariableTruncated
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp
from scipy.stats import norm

from fastloda.accounting.ledger import Ledger, new_id
from fastloda.files import write_atomically

__all__ = ["PrivacyAccountant", "PrivacyAccountingWarning", "calibrate_noise", "compose_epsilon"]

METHODS = ("prv", "rdp")
VERSION = 1  # of the record in checkpoints and of the cache's files
STEPS = "steps"  # all that a PrivacyAccountant counts
REQUIRED = {"version", "sample_rate", "noise_multiplier", "steps", "method"}  # of its record
MIN_DELTA = 1e-14  # below it the tail of a composed distribution is rounding
MAX_STEPS = 10**12
MAX_EPSILON = 10**6  # a target beyond it asks for no privacy at all
CURVE_POINTS = 64
MAX_MECHANISMS = 256  # that are told apart
GRID = 2**20  # points of a PLD's grid at the most: some seconds, 300 MB
QUICK_GRID = 2**16  # of PRV's: a tenth of a second
# of dp-accounting and prv-accountant: raised where they can't compute
FAILURES = (ArithmeticError, AssertionError, IndexError, MemoryError, RuntimeError, ValueError)
NEARLY = 0.996  # the share of its target that calibration spends at least


class PrivacyAccountingWarning(UserWarning):
    """The reported epsilon is valid, but looser than a tight bound would have been."""


class Mechanism(NamedTuple):
    """`steps` releases of the Poisson-subsampled Gaussian mechanism."""

    sample_rate: float
    noise_multiplier: float
    steps: int


# -- the public face -----------------------------------------------------------------------------------------


class PrivacyAccountant:
    """Counts private steps and bounds the epsilon they have cost.

    `sample_rate` q in (0, 1] is the probability with which each record enters a batch, independently (Poisson
    sampling); `noise_multiplier` is the noise's standard deviation on the sum of clipped gradients, in units
    of `max_grad_norm`. Noise 0 is allowed and costs an infinite epsilon. `method` is "prv" (tight) or "rdp".
    `earlier` are releases about the same records, as `compose_epsilon` takes them: every epsilon covers them too.

    Every epsilon returned is an upper bound for add/remove adjacency. With "prv" it is at most 0.5% loose for
    epsilon >= 1 where a tight bound can be computed; where it can't, RDP answers and one
    `PrivacyAccountingWarning` per accountant says why.
    """

    def __init__(
        self, sample_rate: float, noise_multiplier: float, method: str = "prv", earlier: Sequence[Sequence] = ()
    ):
        self.sample_rate = _check_rate(sample_rate)
        self.noise_multiplier = _check_noise(noise_multiplier)
        self.method = _check_method(method)
        self.earlier = _merged(earlier)
        self._ledger = Ledger()
        self._warned = False

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._ledger.total.get(STEPS, 0)

    def step(self, count: int = 1) -> None:
        """Record `count` steps more. Raises TypeError or ValueError unless `count` is an integer >= 1."""
        _check_steps(self.steps + _check_steps(count, "count", least=1))
        self._ledger.count(STEPS, int(count))

    def epsilon(self, delta: float, steps: int | None = None) -> float:
        """Upper bound on epsilon after `steps` (default: those taken); a new count takes 0.05 to 5 s."""
        delta, spent = _check_delta(delta), self._spent(steps)
        if self.method == "rdp":
            return _cheap_epsilon(spent, delta)
        epsilon, trouble = _epsilon(spent, delta)
        self._warn(trouble)
        return epsilon

    def epsilon_rdp(self, delta: float, steps: int | None = None) -> float:
        """The RDP bound (exact Gaussian at `sample_rate` 1): instant, typically 5 to 15% looser."""
        return _cheap_epsilon(self._spent(steps), _check_delta(delta))

    def epsilon_curve(self, delta: float, step_counts: Iterable[int]) -> list[float]:
        """Upper bounds on epsilon at `step_counts`, in their order: for plots and progress bars.

        They never decrease with the count, and the last one agrees with `epsilon`. Beyond 64 distinct counts, 64
        are computed (denser where epsilon rises fast) and each of the others gets the value of the next larger
        one. Some seconds: ask once, for the whole range.
        """
        delta, counts = _check_delta(delta), [_check_steps(count) for count in step_counts]
        distinct = sorted({count for count in counts if count > 0})
        start = self.epsilon(delta, 0)
        if not distinct:
            return [start] * len(counts)
        final = self.epsilon(delta, distinct[-1])
        knots = [distinct[i] for i in _spread(len(distinct))]
        runs = [self._spent(count) for count in knots[:-1]]
        if self.method == "rdp":
            bounds = [_cheap_epsilon(run, delta) for run in runs]
        else:
            bounds = [_epsilon(run, delta, compare=False)[0] for run in runs]
        bounds = list(accumulate([*(min(bound, final) for bound in bounds), final], max))
        return [bounds[bisect_left(knots, count)] if count else start for count in counts]

    def state_dict(self) -> dict[str, int | float | str | dict | list]:
        """The record that belongs into a checkpoint: plain JSON types.

        `steps` are all those taken; `loaded` are the ones among them that other accountants have counted, by their ids.
        """
        own = self._ledger.id
        return {
            "version": VERSION,
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "method": self.method,
            "earlier": [list(mechanism) for mechanism in self.earlier],
            "id": own,
            "loaded": {id: counts[STEPS] for id, counts in self._ledger.entries.items() if id != own},
        }

    def load_state_dict(self, state: dict) -> None:
        """Add a record's steps to those taken. What was spent stays spent, and steps that are here already count once.

        Those are known by the accountant that counted them: a record loaded twice, an earlier one of this accountant, what two
        accountants had in common. A record that says no `id` is added whole.

        Raises ValueError, and changes nothing, if the record is malformed or is of another mechanism.
        `method` may differ: it is a way of looking at the record, and this accountant keeps its own.
        """
        if not isinstance(state, dict) or not REQUIRED <= set(state) <= set(self.state_dict()):
            keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"a privacy record holds {sorted(self.state_dict())}, got {keys}")
        if type(state["version"]) is not int or state["version"] != VERSION:
            raise ValueError(f"privacy record of version {state['version']!r}, this is version {VERSION}")
        try:
            rate, noise = _check_rate(state["sample_rate"]), _check_noise(state["noise_multiplier"])
            _check_method(state["method"])
            earlier, entries = _merged(state.get("earlier", ())), _entries(state)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"malformed privacy record: {error}") from error
        if (rate, noise, earlier) != (self.sample_rate, self.noise_multiplier, self.earlier):
            raise ValueError(
                f"the record is of sample_rate={rate}, noise_multiplier={noise}, earlier={[*earlier]}; this run has "
                f"sample_rate={self.sample_rate}, noise_multiplier={self.noise_multiplier}, earlier={[*self.earlier]}"
            )
        self._ledger.merge(entries)

    def __repr__(self) -> str:
        return (
            f"PrivacyAccountant(sample_rate={self.sample_rate}, noise_multiplier={self.noise_multiplier}, "
            f"method={self.method!r}, steps={self.steps})"
        )

    def _spent(self, steps: int | None) -> tuple[Mechanism, ...]:
        steps = self.steps if steps is None else _check_steps(steps)
        return _merged([*self.earlier, (self.sample_rate, self.noise_multiplier, steps)])

    def _warn(self, trouble: str | None) -> None:
        if trouble and not self._warned:
            self._warned = True
            _warn(trouble, stacklevel=4)


def _entries(state: dict) -> dict[str, dict[str, int]]:
    """Who counted how many of a record's steps."""
    own, loaded = _check_id(state.get("id", new_id())), state.get("loaded", {})
    counts = {_check_id(id): _check_steps(steps) for id, steps in loaded.items() if id != own}
    counts[own] = _check_steps(_check_steps(state["steps"]) - sum(counts.values()), "steps beyond those of `loaded`")
    return {id: {STEPS: steps} for id, steps in counts.items()}


def compose_epsilon(mechanisms: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Upper bound on epsilon of several runs on the same records.

    Each is `(sample_rate, noise_multiplier, steps)`. They are composed jointly, which gives much less than
    the sum of the runs' epsilons, and one delta covers all.
    """
    delta, spent = _check_delta(delta), _merged(mechanisms)
    epsilon, trouble = _epsilon(spent, delta)
    if trouble:
        _warn(trouble)
    return epsilon


def rdp_epsilon(mechanisms: Iterable[tuple[float, float, int]], delta: float) -> float:
    """The same by Renyi DP alone (exact Gaussian at rate 1): instant, looser."""
    return _cheap_epsilon(_merged(mechanisms), _check_delta(delta))


def check_mechanism(sample_rate: float, noise_multiplier: float, steps: int) -> Mechanism:
    """A mechanism of checked numbers. Raises TypeError or ValueError."""
    return Mechanism(_check_rate(sample_rate), _check_noise(noise_multiplier), _check_steps(steps))


def _merged(mechanisms: Iterable[Sequence]) -> tuple[Mechanism, ...]:
    """Checked; those of one rate and noise are one, those without steps none."""
    steps = Counter()
    for item in mechanisms:
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 3:
            raise ValueError(f"each mechanism is (sample_rate, noise_multiplier, steps), got {item!r}")
        checked = check_mechanism(*item)
        steps[checked[:2]] += checked.steps
    return tuple(Mechanism(*key, _check_steps(count)) for key, count in sorted(steps.items()) if count)


def calibrate_noise(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, earlier: Sequence[Sequence] = ()
) -> float:
    """The smallest noise multiplier whose reported epsilon after `steps` is at most `target_epsilon`.

    Never over it, and at most 0.5% under it where a tight bound can be computed: `PrivacyAccountant(sample_rate,
    sigma).epsilon(delta, steps)` is <= target to the last bit, on the same machine. 1 to 20 s. The answer is
    kept in the user's cache directory, but only as a first guess: it is verified like any other, so a wrong
    file costs time, not privacy.

    `earlier` releases about the same records, as `compose_epsilon` takes them, are paid from the same target; ValueError where
    they leave less than a twentieth of it.
    """
    target, delta = _check_real(target_epsilon, "target_epsilon"), _check_delta(delta)
    rate, steps = _check_rate(sample_rate), _check_steps(steps, least=1)
    if not 0 < target <= MAX_EPSILON:
        raise ValueError(f"target_epsilon must be in (0, {MAX_EPSILON}], got {target_epsilon!r}")
    before = _merged(earlier)
    if before and (spent := _epsilon(before, delta)[0]) > 0.95 * target:
        raise ValueError(
            f"earlier releases cost epsilon {spent:.3g} of the {target:g}: too little is left to train with"
        )
    question = {"target_epsilon": target, "delta": delta, "sample_rate": rate, "steps": steps}
    if before:
        question["earlier"] = [list(mechanism) for mechanism in before]

    best, trouble = math.inf, None

    def bound(sigma: float) -> float:
        nonlocal best, trouble
        epsilon, why = _epsilon(_merged([*before, (rate, sigma, steps)]), delta)
        if epsilon <= target and sigma < best:
            best, trouble = sigma, why
        return epsilon

    if (known := _recall(question)) is None or not NEARLY * target < bound(known) <= target:
        guess = _solve_noise(lambda sigma: _cheap_epsilon((Mechanism(rate, sigma, steps),), delta), target)
        _solve_noise(bound, target, guess)
    if trouble:
        _warn(trouble)
    _remember(question, best)
    return best


# -- the cheap bound: RDP, or the Gaussian mechanism without subsampling -------------------------------------

# epsilon(order) is flat at its minimum: neighbours 10 to 15% apart lose at most 0.2%.
FRACTIONAL = 1 + np.geomspace(1e-3, 11, 100)
INTEGER = np.unique(np.geomspace(12, 2**15, 60).round())
ORDERS = np.concatenate([FRACTIONAL, INTEGER])


def _cheap_epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """Upper bound on epsilon at once, for any input: inf without noise, 0 without steps, exact at rate 1."""
    if not mechanisms:
        return 0.0
    if any(m.noise_multiplier == 0 for m in mechanisms) or not math.isfinite(_gaussian_mu(mechanisms)):
        return math.inf
    few = _rounded(mechanisms)
    rdp = sum(m.steps * _rdp(m.sample_rate, m.noise_multiplier) for m in few)
    by_order = rdp + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    # Not sampling at all is a worse mechanism.
    return max(0.0, min(float(by_order.min()), _gaussian_epsilon(_gaussian_mu(few), delta)))


def _gaussian_mu(mechanisms: Iterable[Mechanism]) -> float:
    """Gaussians, not sampled, compose to one, of mean mu and standard deviation 1: mu^2 = sum of 1 / sigma^2."""
    return math.hypot(*(math.sqrt(m.steps) / m.noise_multiplier for m in mechanisms))


def _rounded(mechanisms: tuple[Mechanism, ...]) -> tuple[Mechanism, ...]:
    """Few mechanisms that cost at least as much: of similar ones, all have the largest rate and the least noise.

    Less noise, or a larger rate, is a worse mechanism, for the better one can be made from its output. Similar are those whose
    epsilons differ by about 0.1%, or more where there are too many. What is not sampled is one Gaussian.
    """
    plain = [m for m in mechanisms if m.sample_rate == 1]
    sampled = [m for m in mechanisms if m.sample_rate < 1]
    width = 1e-3
    while len(cells := _cells(sampled, width)) > MAX_MECHANISMS:
        width *= 2
    columns = (zip(*cell, strict=True) for cell in cells)
    worst = [Mechanism(max(rates), min(noises), sum(steps)) for rates, noises, steps in columns]
    return (*worst, Mechanism(1.0, 1 / _gaussian_mu(plain), 1)) if plain else tuple(worst)


def _cells(mechanisms: list[Mechanism], width: float) -> list[list[Mechanism]]:
    """The mechanisms by cells of a grid, from one to the next of which epsilon changes by about `width`."""
    cells = defaultdict(list)
    for m in mechanisms:
        # The less noise there is, the more it matters.
        noise = math.log(m.noise_multiplier) - min(0.5 / m.noise_multiplier / m.noise_multiplier, 1e9)
        cells[math.floor(math.log(m.sample_rate) / width), math.floor(noise / width)].append(m)
    return list(cells.values())


@lru_cache(maxsize=2 * MAX_MECHANISMS)
def _rdp(q: float, sigma: float) -> np.ndarray:
    """Renyi divergence of one step at ORDERS a, x ~ N(0, sigma^2):

    log E[(1 - q + q exp((2x - 1) / (2 sigma^2)))^a] / (a - 1)
    """
    if q == 1 or sigma < 0.05:  # the plain Gaussian: exact at q = 1, and a bound where noise is next to nothing
        with np.errstate(over="ignore"):
            return ORDERS / 2 / sigma / sigma
    # Fractional orders by the trapezoid rule, exponentially accurate here: the step is small against the
    # Gaussian's width sigma and against pi sigma^2, the distance of the integrand's branch points from the
    # real line.
    h = min(sigma, sigma * sigma) / 2
    x = np.arange(-10 * sigma, FRACTIONAL[-1] + 10 * sigma, h)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma * sigma))
    fractional = logsumexp(norm.logpdf(x, scale=sigma) + FRACTIONAL[:, None] * ratio, axis=1) + math.log(h)
    moments = np.concatenate([fractional, _log_moments(q, sigma)])
    return (moments + 1e-14 * ORDERS) / (ORDERS - 1)  # the summand covers rounding


# of the binomial theorem, for all INTEGER orders, one after another: order, k, log(order over k), and where each begins
_N = np.repeat(INTEGER, INTEGER.astype(int) + 1)
_K = np.concatenate([np.arange(order + 1) for order in INTEGER])
_LOG_BINOMIAL = gammaln(_N + 1) - gammaln(_K + 1) - gammaln(_N - _K + 1)
_STARTS = np.flatnonzero(_K == 0)


def _log_moments(q: float, sigma: float) -> np.ndarray:
    """The same expectation for integer orders."""
    terms = _LOG_BINOMIAL + _K * math.log(q) + (_N - _K) * math.log1p(-q) + _K * (_K - 1) / (2 * sigma * sigma)
    largest = np.maximum.reduceat(terms, _STARTS)
    terms -= np.repeat(largest, INTEGER.astype(int) + 1)
    return largest + np.log(np.add.reduceat(np.exp(terms), _STARTS))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon e of N(mu, 1) against N(0, 1): Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu) = delta."""
    mu = max(mu, 1e-12)  # below it the difference of the two terms is rounding

    def excess(epsilon: float) -> float:
        plus = log_ndtr(mu / 2 - epsilon / mu)
        minus = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        covered = min(0.0, minus - plus) - 1e-14  # against rounding
        return plus + math.log(-math.expm1(covered)) - math.log(delta)

    # The Gaussian tail bound of the privacy loss: always enough.
    top = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1e-9
    if not math.isfinite(top):
        return math.inf
    if excess(0.0) <= 0:
        return 0.0
    return min(top, brentq(excess, 0.0, top, xtol=1e-13, rtol=1e-12) * (1 + 1e-11) + 1e-12)


def _solve_noise(bound: Callable[[float], float], target: float, start: float = 1.0) -> float:
    """A noise multiplier at which `bound`, which falls with it, is at the target or a little below."""

    def excess(log_sigma: float) -> float:
        share = bound(math.exp(log_sigma)) / target
        return 0.0 if NEARLY < share <= 1 else math.log(min(max(share, 1e-3), 1e3))

    low = high = math.log(start)
    step = 0.05
    while excess(high) > 0:
        low, high, step = high, high + step, 2 * step
    while excess(low) < 0:
        low, high, step = low - step, low, 2 * step
    return math.exp(brentq(excess, low, high, xtol=1e-6))


# -- the tight bounds: PLD, and PRV beside it ------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float, compare: bool = True) -> tuple[float, str | None]:
    """The smallest of the bounds, and what kept a tight one from being there (None: nothing did).

    compare: with prv-accountant, where that is quick.
    """
    cheap = _cheap_epsilon(mechanisms, delta)
    if cheap in (0.0, math.inf) or all(m.sample_rate == 1 for m in mechanisms):
        return cheap, None
    try:
        few = _rounded(mechanisms)
        tight = _pld_epsilon(few, delta)
        lower, upper = _prv_epsilons(few[0], delta) if compare and len(few) == 1 else (0.0, math.inf)
        if tight < lower:
            raise ValueError(f"dp-accounting says {tight:.6g} at most, and prv-accountant {lower:.6g} at least")
        return min(cheap, tight, upper), None
    except FAILURES as error:
        return cheap, str(error) or type(error).__name__


def _pld_epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """PLD's upper bound. Raises ValueError, before any work, where the grid would be too large."""
    total = sum(m.steps for m in mechanisms)
    lost = delta / 1e5  # what the tails that are cut off may hold, in all; it counts as infinite losses
    spans = sum(_span(m, lost / total) for m in mechanisms)
    reach = _cheap_epsilon(mechanisms, 1e-15)
    # Connecting the dots errs by the square of the interval over a step's usual loss.
    wanted = min(_cheap_epsilon(mechanisms, min(delta, 1e-5)) / 96 / math.sqrt(total), 0.5)
    least = (2 * spans + reach) / GRID
    if least > 4 * wanted:
        raise ValueError(f"a grid of {(2 * spans + reach) / wanted:.1g} points would be needed, more than {4 * GRID}")
    interval = 2.0 ** math.floor(math.log2(max(wanted, 2 * least)))  # few different ones, so that PLDs are found again
    rounding = (total + (2 * spans + reach) / interval) * 2.0**-52  # of a Fourier transform and its powers
    if rounding > delta / 2:
        raise ValueError(f"delta {delta:.3g} is within rounding, {rounding:.1g}, of so many steps")
    log_lost, lost = math.floor(math.log(lost / total)), lost / len(mechanisms)
    with np.errstate(all="ignore"):
        nothing = identity(interval)
        parts = [_power(_pld(*m[:2], interval, log_lost), m.steps, nothing, lost) for m in mechanisms]
        while len(parts) > 1:  # by twos: short ones with short ones
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [a.compose(b, lost) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
        epsilon = parts[0].get_epsilon_for_delta(delta - rounding)
    if not math.isfinite(epsilon):
        raise ValueError(f"it returned {epsilon}")
    return epsilon


def _span(m: Mechanism, lost: float) -> float:
    """How far a step's privacy losses reach, but for a probability of `lost`."""
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
    """Equal steps composed; many in stages, for dp-accounting's bound on the length of the result is loose for many.

    nothing: no step at all; composed with it, a result loses its empty ends.
    """
    if steps <= 2048:
        return pld.self_compose(steps, lost) if steps > 1 else pld
    many, rest = divmod(steps, 1024)
    stage = pld.self_compose(1024, lost / many).compose(nothing, lost / many)
    composed = _power(stage, many, nothing, lost).compose(nothing, lost)
    return composed.compose(_power(pld, rest, nothing, lost), lost) if rest else composed


class _Truncated(PrivacyRandomVariableTruncated):
    """A privacy loss cut off at the grid's ends, with an exact mean.

    prv-accountant integrates its CDF between fixed points and misses it on wide grids ("Discrete mean differs
    from continuous mean", its issue 36); the mean's error counts once per step. In terms of the mechanism's
    output x all is smooth.
    """

    def mean(self) -> float:
        q, sigma = float(self.prv.p), float(self.prv.sigma)
        ends = np.array([self.t_min, self.t_max], dtype=np.longdouble)
        # x as a function of the loss; nan below the smallest one, log(1 - q)
        low, high = (sigma**2 * np.log1p(np.expm1(ends) / q) + 0.5).astype(float)
        low, high = np.fmax(low, -12 * sigma), min(high, 1 + 12 * sigma)
        edges = np.linspace(low, high, 2 + int((high - low) / min(sigma, 2 * sigma * sigma)))
        nodes, weights = np.polynomial.legendre.leggauss(20)
        half = np.diff(edges)[:, None] / 2
        x = edges[:-1, None] + half * (nodes + 1)
        loss = np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * sigma * sigma))
        density = (1 - q) * norm.pdf(x, scale=sigma) + q * norm.pdf(x, loc=1, scale=sigma)
        return np.sum(half * weights * density * loss) / self.remaining_mass


def _prv_epsilons(m: Mechanism, delta: float) -> tuple[float, float]:
    """PRV's lower and upper bound of equal steps; 0 and infinity where it has none, or not at once."""
    delta_error = delta / 1000
    # The domain [-L, L] of Remark 5.6 in Gopi et al.: beyond it lies too little mass to matter, in sum or in any one step.
    one = m._replace(steps=1)
    limit = 3 + max(_cheap_epsilon((m,), delta_error / 4), _cheap_epsilon((one,), delta_error / 8 / m.steps))
    per_error = math.sqrt(m.steps / 2 * math.log(12 / delta_error))  # eps_error / mesh: Theorem 5.5
    mesh = 2 * limit / (QUICK_GRID - 2)
    eps_error = mesh * per_error
    # Each step's CDF is good to about 2^-53, and the tails are sums over the grid.
    rounding = m.steps * 2.0**-52 + QUICK_GRID * float(np.finfo(np.longdouble).eps)
    if eps_error > 0.05 * _cheap_epsilon((m,), delta) or limit > 4000 or rounding > delta / 1000:
        return 0.0, math.inf
    domain = Domain(-limit, limit + mesh, QUICK_GRID)
    try:
        with np.errstate(all="ignore"):
            loss = _Truncated(PoissonSubsampledGaussianMechanism(*m[:2]), domain.t_min(), domain.t_max())
            composed = Heterogeneous([CellCentred().discretise(loss, domain)]).compute_composition([m.steps])
            lower, _, upper = composed.compute_epsilon(delta - rounding, delta_error, eps_error)
    except FAILURES:
        return 0.0, math.inf
    return (lower, max(0.0, upper)) if lower <= upper < math.inf else (0.0, math.inf)


def _warn(trouble: str, stacklevel: int = 3) -> None:
    text = f"there is no tight bound here ({trouble}); epsilon is the RDP bound: valid, but looser"
    warnings.warn(text, PrivacyAccountingWarning, stacklevel)


def _spread(count: int) -> list[int]:
    """At most CURVE_POINTS indices into `count` sorted items, quadratically spaced, the last one included."""
    if count <= CURVE_POINTS:
        return list(range(count))
    return sorted({round((i / (CURVE_POINTS - 1)) ** 2 * (count - 1)) for i in range(CURVE_POINTS)})


# -- calibrated noise on disk --------------------------------------------------------------------------------


def _cache_file(question: dict) -> Path:
    content = json.dumps({"version": VERSION, **question}, sort_keys=True)
    return user_cache_path("fastloda") / "noise" / f"{hashlib.sha256(content.encode()).hexdigest()}.json"


def _recall(question: dict) -> float | None:
    """The noise multiplier kept for exactly this question, or None."""
    try:
        answer = json.loads(_cache_file(question).read_text())
        sigma = answer.pop("noise_multiplier")
        return _check_noise(sigma) if answer == {"version": VERSION, **question} else None
    except (OSError, TypeError, ValueError, LookupError, AttributeError, RecursionError):
        return None


def _remember(question: dict, sigma: float) -> None:
    """A cache that cannot be written is no cache."""
    path = _cache_file(question)
    answer = {"version": VERSION, **question, "noise_multiplier": sigma}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(answer).encode())
    except OSError:
        pass


# -- checks --------------------------------------------------------------------------------------------------


def _check_real(value: float, name: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def _check_rate(value: float) -> float:
    if not 0 < (rate := _check_real(value, "sample_rate")) <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], got {value!r}")
    return rate


def _check_noise(value: float) -> float:
    if (noise := _check_real(value, "noise_multiplier")) < 0:
        raise ValueError(f"noise_multiplier must be >= 0, got {value!r}")
    return noise


def _check_delta(value: float) -> float:
    if not MIN_DELTA < (delta := _check_real(value, "delta")) < 1:
        raise ValueError(f"delta must be in ({MIN_DELTA}, 1), got {value!r}")
    return delta


def _check_steps(value: int, name: str = "steps", least: int = 0) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= MAX_STEPS:
        raise ValueError(f"{name} must be from {least} to {MAX_STEPS}, got {value!r}")
    return int(value)


def _check_id(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"id must be a string, got {value!r}")
    return value


def _check_method(value: str) -> str:
    if value not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {value!r}")
    return value
