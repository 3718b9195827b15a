"""How much privacy a training run has spent.

One idea: *two upper bounds, the smaller one is reported*. A cheap one (Renyi DP, or the plain Gaussian
mechanism where that is smaller) exists for every input; a tight one, Microsoft's PRV accountant, is run on a
grid whose cost the cheap bound has estimated beforehand. So nothing hangs, and where PRV cannot work the
cheap bound stands, with a warning.

The mechanism is DP-SGD's: sum the clipped gradients of a Poisson sample (rate q, clip 1), add N(0, sigma^2).
Adjacency is adding or removing one record. PRV composes the removal, q N(1, sigma^2) + (1 - q) N(0, sigma^2)
against N(0, sigma^2). That it is the worse direction is proved for RDP (Mironov et al. 2019); for the
composed hockey-stick divergence the tests check it, against an accountant that takes the maximum of both
directions.

    RDP of the subsampled Gaussian   Mironov, Talwar, Zhang, https://arxiv.org/abs/1908.10530
    RDP to (epsilon, delta)          Canonne, Kamath, Steinke, https://arxiv.org/abs/2004.00010 (Prop. 12)
    the Gaussian mechanism, exactly  Balle, Wang, https://arxiv.org/abs/1805.06530 (Theorem 8)
    PRV                              Gopi, Lee, Wutschitz, https://arxiv.org/abs/2106.02848
"""

import hashlib
import json
import math
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
from platformdirs import user_cache_path
from prv_accountant import PoissonSubsampledGaussianMechanism
from prv_accountant.composers import Heterogeneous
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from prv_accountant.privacy_random_variables import PrivacyRandomVariableTruncated
from scipy.fft import next_fast_len
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp
from scipy.stats import norm

from fastloda.files import write_atomically
from fastloda.ledger import Ledger, new_id

__all__ = ["PrivacyAccountant", "PrivacyAccountingWarning", "calibrate_noise", "compose_epsilon"]

METHODS = ("prv", "rdp")
VERSION = 1  # of the record in checkpoints and of the cache's files
STEPS = "steps"  # all that a PrivacyAccountant counts
REQUIRED = {"version", "sample_rate", "noise_multiplier", "steps", "method"}  # of its record
MIN_DELTA = 1e-14  # below it the tail of a composed distribution is rounding
MAX_STEPS = 10**12
MAX_EPSILON = 10**6  # a target beyond it asks for no privacy at all
CURVE_POINTS = 64
MAX_TRIES = 8  # of a calibration, 2 to 4 are usual
NEARLY = 0.998  # the share of the target at which calibration aims; it accepts 0.996 to 1


class PrivacyAccountingWarning(UserWarning):
    """The reported epsilon is valid, but looser than the PRV accountant's would have been."""


class Mechanism(NamedTuple):
    """`steps` releases of the Poisson-subsampled Gaussian mechanism."""

    sample_rate: float
    noise_multiplier: float
    steps: int


class Effort(NamedTuple):
    """What PRV may cost: its error as a share of epsilon, and its grid's points (1 us and 100 bytes each)."""

    precision: float
    max_points: int


FINE = Effort(precision=1 / 400, max_points=2**22)
COARSE = Effort(precision=1 / 100, max_points=2**17)
WORST_PRECISION = 1 / 20  # a PRV bound looser than this is not worth having beside RDP


# -- the public face -----------------------------------------------------------------------------------------


class PrivacyAccountant:
    """Counts private steps and bounds the epsilon they have cost.

    `sample_rate` q in (0, 1] is the probability with which each record enters a batch, independently (Poisson
    sampling); `noise_multiplier` is the noise's standard deviation on the sum of clipped gradients, in units
    of `max_grad_norm`. Noise 0 is allowed and costs an infinite epsilon. `method` is "prv" (tight) or "rdp".
    `earlier` are releases about the same records, as `compose_epsilon` takes them: every epsilon covers them too.

    Every epsilon returned is an upper bound for add/remove adjacency. With "prv" it is at most 0.5% loose for
    epsilon >= 1 where PRV works; where it does not, RDP answers and one `PrivacyAccountingWarning` per
    accountant says why.
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
        """Upper bound on epsilon after `steps` (default: those taken); a new count takes 0.05 to 10 s."""
        delta, spent = _check_delta(delta), self._spent(steps)
        if self.method == "rdp":
            return _cheap_epsilon(spent, delta)
        epsilon, trouble = _epsilon(spent, delta)
        self._warn(trouble)
        return epsilon

    def epsilon_rdp(self, delta: float, steps: int | None = None) -> float:
        """The RDP bound (exact Gaussian at `sample_rate` 1): instant, typically 5 to 15% looser than PRV."""
        return _cheap_epsilon(self._spent(steps), _check_delta(delta))

    def epsilon_curve(self, delta: float, step_counts: Iterable[int]) -> list[float]:
        """Upper bounds on epsilon at `step_counts`, in their order: for plots and progress bars.

        They never decrease with the count. One coarse discretisation serves all, about 2% above `epsilon`,
        with which the last value agrees. Beyond 64 distinct counts, 64 are computed (denser where epsilon
        rises fast) and each of the others gets the value of the next larger one. Some seconds: ask once, for
        the whole range.
        """
        delta, counts = _check_delta(delta), [_check_steps(count) for count in step_counts]
        distinct = sorted({count for count in counts if count > 0})
        start = self.epsilon(delta, 0)
        if not distinct:
            return [start] * len(counts)
        whole, final = self._spent(distinct[-1]), self.epsilon(delta, distinct[-1])
        knots = [distinct[i] for i in _spread(len(distinct))]
        runs = [self._spent(count) for count in knots[:-1]]
        if self.method == "rdp":
            bounds = [_cheap_epsilon(run, delta) for run in runs]
        else:
            bounds = [_epsilon(run, delta, COARSE, whole)[0] for run in runs]
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

    Never over it, and at most 0.5% under it where PRV works: `PrivacyAccountant(sample_rate,
    sigma).epsilon(delta, steps)` is <= target to the last bit, on the same machine. 1 to 60 s. The answer is
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
    # Infinite noise is as good as this: what it adds to epsilon is rounding.
    if before and _cheap_epsilon(_merged([*before, (rate, 1e4 * math.sqrt(steps), steps)]), delta) > 0.95 * target:
        raise ValueError(
            f"earlier releases cost epsilon {_epsilon(before, delta)[0]:.3g} of the {target:g}: too little is left to train with"
        )

    def run(sigma: float) -> tuple[Mechanism, ...]:
        return _merged([*before, (rate, sigma, steps)])

    def cheap(sigma: float) -> float:
        return _cheap_epsilon(run(sigma), delta)

    def coarse(sigma: float) -> float:
        return _epsilon(run(sigma), delta, COARSE)[0]

    low, best = 0.0, _solve_noise(cheap, target)
    while cheap(best) > target:  # within the solver's tolerance
        best *= 1.001
    # From here on `best` is feasible: what is reported is never above the cheap bound. The coarse grid is the
    # ruler by which a sigma is chosen, since its ratio to the fine one hardly moves with sigma.
    question = {"target_epsilon": target, "delta": delta, "sample_rate": rate, "steps": steps}
    if before:
        question["earlier"] = [list(mechanism) for mechanism in before]
    sigma = _recall(question)
    if sigma is None or not 0.99 * target < cheap(sigma) < math.inf:
        sigma = _solve_noise(coarse, target * (NEARLY + COARSE.precision - FINE.precision), start=best)
    for _ in range(MAX_TRIES):
        epsilon, trouble = _epsilon(run(sigma), delta)
        if epsilon > target:
            low = max(low, sigma)
        else:
            best = min(best, sigma)
            if epsilon > target * (2 * NEARLY - 1):
                break
        ratio = max(epsilon / coarse(sigma), 1e-3)
        sigma = _solve_noise(coarse, target * NEARLY / ratio, start=sigma)
        if not low < sigma < best:
            sigma = math.sqrt(max(low, best / 2) * best)
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
    if any(m.noise_multiplier == 0 for m in mechanisms):
        return math.inf
    rdp = sum(m.steps * _rdp(m.sample_rate, m.noise_multiplier) for m in mechanisms)
    by_order = rdp + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    # Not sampling at all is a worse mechanism, and Gaussians compose to one with mu^2 = sum of 1 / sigma^2.
    mu = math.hypot(*(math.sqrt(m.steps) / m.noise_multiplier for m in mechanisms))
    return max(0.0, min(float(by_order.min()), _gaussian_epsilon(mu, delta)))


@lru_cache(maxsize=256)
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
    moments = np.concatenate([fractional, [_log_moment(int(a), q, sigma) for a in INTEGER]])
    return (moments + 1e-14 * ORDERS) / (ORDERS - 1)  # the summand covers rounding


def _log_moment(a: int, q: float, sigma: float) -> float:
    """The same expectation by the binomial theorem, for an integer order."""
    k = np.arange(a + 1)
    log_binomial = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
    log_weight = k * math.log(q) + (a - k) * math.log1p(-q)
    return logsumexp(log_binomial + log_weight + k * (k - 1) / (2 * sigma * sigma))


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
    """The noise multiplier at which `bound` falls to `target`, to 1e-5."""

    def excess(log_sigma: float) -> float:
        return math.log(max(bound(math.exp(log_sigma)), 1e-300) / target)

    low = high = math.log(start)
    step = 0.05
    while excess(high) > 0:
        low, high, step = high, high + step, 2 * step
    while excess(low) < 0:
        low, high, step = low - step, low, 2 * step
    return math.exp(brentq(excess, low, high, xtol=1e-5))


# -- the tight bound: PRV ------------------------------------------------------------------------------------


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


class _Grid(NamedTuple):
    composer: Heterogeneous
    eps_error: float
    delta_error: float
    rounding: float


@lru_cache(maxsize=4)
def _discretise(capacity: tuple[Mechanism, ...], delta: float, effort: Effort) -> _Grid:
    """A grid good for any counts up to those in `capacity`.

    Raises ValueError, before any work, where that is unsafe or too costly.
    """
    total, delta_error = sum(m.steps for m in capacity), delta / 1000
    # The steps asked for may be half of the capacity, and the error should be small against their epsilon
    # too. Where the cheap bound is far too high, the fine grid's error would be as well: so a coarse grid
    # estimates first.
    half_way = tuple(m._replace(steps=max(1, m.steps // 2)) for m in capacity)
    epsilon = _epsilon(half_way, delta, COARSE)[0] if effort == FINE else _cheap_epsilon(half_way, delta)
    # The domain [-L, L] of Remark 5.6 in Gopi et al.: beyond it lies too little mass to matter, in sum or in
    # any one step.
    spread = [_cheap_epsilon(capacity, delta_error / 4)]
    spread += [_cheap_epsilon((m._replace(steps=1),), delta_error / 8 / total) for m in capacity]
    limit = max(spread) + 3
    if limit > 0.4 * math.log(np.finfo(np.longdouble).max):
        raise ValueError(f"privacy losses of up to {limit:.3g} are possible")
    per_error = math.sqrt(total / 2 * math.log(12 / delta_error))  # mesh = eps_error / per_error: Theorem 5.5
    wanted = effort.precision * max(epsilon, math.sqrt(epsilon))  # relative precision below 1 would cost too much
    useless = WORST_PRECISION * _cheap_epsilon(capacity, delta)
    points = 2 * limit * per_error / useless
    if points > effort.max_points:
        raise ValueError(f"a grid of {points:.1g} points would be needed, more than {effort.max_points}")
    eps_error = max(min(wanted, useless), 2 * limit * per_error / effort.max_points)

    half = next_fast_len(math.ceil(limit * per_error / eps_error) + 1, real=True)
    # Each step's CDF is good to about 2^-53, and the tails are sums over the grid.
    rounding = total * 2.0**-52 + 2 * half * float(np.finfo(np.longdouble).eps)
    if rounding > delta / 2:
        raise ValueError(f"delta {delta:.3g} is within rounding, {rounding:.1g}, of so many steps")
    mesh = limit / (half - 1)
    domain = Domain(-limit, limit + mesh, 2 * half)  # as `Domain.create_aligned`, but of a size that FFTs like
    steps = [PoissonSubsampledGaussianMechanism(m.sample_rate, m.noise_multiplier) for m in capacity]
    cut = [_Truncated(step, domain.t_min(), domain.t_max()) for step in steps]
    composer = Heterogeneous([CellCentred().discretise(loss, domain) for loss in cut])
    return _Grid(composer, eps_error, delta_error, rounding)


def _prv_epsilon(
    mechanisms: tuple[Mechanism, ...], delta: float, effort: Effort, capacity: tuple[Mechanism, ...]
) -> float:
    """PRV's upper bound. Raises where there is none."""
    # Room for the next power of two: a run that asks at every step builds few grids, and asks the same one.
    room = tuple(m._replace(steps=1 << (m.steps - 1).bit_length()) for m in capacity)
    with np.errstate(all="ignore"):
        grid = _discretise(room, delta, effort)
        composed = grid.composer.compute_composition([m.steps for m in mechanisms])
        _, _, upper = composed.compute_epsilon(delta - grid.rounding, grid.delta_error, grid.eps_error)
    if not math.isfinite(upper):
        raise ValueError(f"it returned {upper}")
    return max(0.0, upper)


@lru_cache(maxsize=1024)
def _epsilon(
    mechanisms: tuple[Mechanism, ...],
    delta: float,
    effort: Effort = FINE,
    capacity: tuple[Mechanism, ...] | None = None,
) -> tuple[float, str | None]:
    """The smaller of both bounds, and what kept PRV from giving one (None: nothing did)."""
    cheap = _cheap_epsilon(mechanisms, delta)
    if cheap in (0.0, math.inf) or all(m.sample_rate == 1 for m in mechanisms):
        return cheap, None
    try:
        return min(cheap, _prv_epsilon(mechanisms, delta, effort, capacity or mechanisms)), None
    except (ArithmeticError, AssertionError, IndexError, MemoryError, RuntimeError, ValueError) as error:
        return cheap, str(error) or type(error).__name__


def _warn(trouble: str, stacklevel: int = 3) -> None:
    text = f"the PRV accountant cannot be used here ({trouble}); epsilon is the RDP bound: valid, but looser"
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
