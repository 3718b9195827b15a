"""The accountant's promises: epsilon is never too low, hardly too high, and every call ends.

The references, none of which is the bound itself: dp-accounting's optimistic estimate, prv-accountant's lower bound, the exact
Gaussian mechanism, and an upper bound by RDP.
"""

import itertools
import json
import math
import random
import resource
import time
import warnings

import numpy as np
import pytest
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import rdp_privacy_accountant
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from scipy.integrate import quad

from fastloda.accounting import accountant, calibrate, compose, pld, prv, rdp
from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.calibrate import calibrate_noise
from fastloda.accounting.compose import PrivacyAccountingWarning, compose_epsilon
from fastloda.accounting.mechanism import Mechanism, merged
from fastloda.errors import UserError

# epsilon of 300 steps: 2.1, computed in a tenth of a second
RUN = {"sample_rate": 0.02, "noise_multiplier": 1.1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test an empty cache, on disk and in memory."""
    monkeypatch.setattr(calibrate, "user_cache_path", lambda name: tmp_path / name)
    compose.least_epsilon.cache_clear()
    return tmp_path / "fastloda" / "noise"


# -- against Google's PLD ------------------------------------------------------------------------------------


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def random_case(rng):
    """Draw one mechanism, or two in every fourth case, and a delta; epsilon is between about 0.2 and 200."""
    while True:
        mechanisms = [
            (log_uniform(rng, 1e-4, 0.5), log_uniform(rng, 0.3, 10), int(log_uniform(rng, 1, 5e3)))
            for _ in range(1 + (rng.random() < 0.25))
        ]
        delta = log_uniform(rng, 1e-9, 1e-3)
        rough, _ = compose.least_epsilon(tuple(Mechanism(*m) for m in mechanisms), delta, compare=False)
        if 0.2 < rough < 200:
            return mechanisms, delta


def pld_epsilon(mechanisms, delta, interval, pessimistic):
    total = None
    for q, sigma, steps in mechanisms:
        pld = from_gaussian_mechanism(
            sigma,
            sampling_prob=q,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(steps)
        total = pld if total is None else total.compose(pld)
    return total.get_epsilon_for_delta(delta)


def prv_lower(mechanisms, delta, upper):
    """Compute prv-accountant's own lower bound, or 0 where prv-accountant fails."""
    losses = [PoissonSubsampledGaussianMechanism(q, sigma) for q, sigma, _ in mechanisms]
    steps = [m[2] for m in mechanisms]
    try:
        judge = PRVAccountant(losses, max_self_compositions=steps, eps_error=upper / 200, delta_error=delta / 1000)
        return judge.compute_epsilon(delta, steps)[0]
    except (RuntimeError, AssertionError, ValueError):
        return 0.0


@pytest.mark.filterwarnings("ignore:The integral is probably divergent")  # a warning of prv-accountant itself
@pytest.mark.filterwarnings("ignore::fastloda.accounting.compose.PrivacyAccountingWarning")
def test_never_below_the_truth_and_hardly_above(counts, proof):
    cases, unsound, looseness, judged = counts(12, 1000), [], [], 0
    for seed in range(cases):
        mechanisms, delta = random_case(random.Random(seed))
        upper, steps = compose_epsilon(mechanisms, delta), sum(m[2] for m in mechanisms)
        # PLD's optimistic rounding loses half an interval per step; its pessimistic one (connecting the dots), next to nothing.
        low = pld_epsilon(mechanisms, delta, max(0.04 * upper / steps, 5e-5), pessimistic=False)
        high = pld_epsilon(mechanisms, delta, min(1e-2, upper / 400 / math.sqrt(steps)), pessimistic=True)
        lower = prv_lower(mechanisms, delta, upper) if steps < 2000 and upper < 50 else 0.0
        judged += lower > 0.98 * upper
        # prv-accountant misses the mean of its losses on some grids (its issue 36): then a fine PLD decides
        if upper < lower:
            low, lower = pld_epsilon(mechanisms, delta, 1e-4, pessimistic=False), 0.0
            assert low > 0.995 * high, "nothing decides"
        if upper < max(low, lower):
            unsound.append((seed, mechanisms, delta, low, lower, upper, high))
        if upper >= 1:
            looseness.append((upper / high - 1, seed))
    proof("accountant_pld_settings", cases)
    proof("accountant_pld_unsound", len(unsound))
    proof("accountant_pld_loosest_from_epsilon_1", max(looseness)[0])
    assert not unsound
    assert judged >= cases / 4  # the lower bound is within 2% of epsilon in at least a quarter of the cases
    assert max(looseness)[0] <= 0.005, max(looseness)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "pld"),
    [
        (0.005, 0.8, 10_000, 4.534),
        (0.01, 0.3, 1000, 69.816),
        (0.2, 0.6, 200, 58.963),  # prv-accountant fails here
    ],
)
def test_known_figures(q, sigma, steps, pld):
    assert pld * 0.9999 <= PrivacyAccountant(q, sigma).epsilon(1e-5, steps) <= pld * 1.005


# -- the cheap bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "sigma"), [(0.3, 0.6), (0.01, 0.5), (0.004, 3.0), (1e-4, 1.0), (0.999, 2.0)])
def test_rdp_at_integer_orders(q, sigma):
    theirs = rdp_privacy_accountant._compute_rdp_poisson_subsampled_gaussian(q, sigma, rdp.INTEGER)
    np.testing.assert_allclose(rdp._rdp(q, sigma)[-len(theirs) :], theirs, rtol=1e-9, atol=1e-13)


def moment_density(x, q, sigma, order):
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    return np.exp(order * log_ratio - x**2 / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("q", "sigma"), [(0.3, 0.6), (0.01, 0.5), (0.004, 3.0), (0.01, 0.1)])
def test_rdp_at_fractional_orders(q, sigma):
    # Adaptive quadrature, because dp-accounting's series does not converge at the first of these settings and is
    # 0.3% off.
    for index in range(30, 75, 4):
        order = rdp.FRACTIONAL[index]
        edges = np.linspace(-12 * sigma, order + 12 * sigma, 60)
        moment = sum(
            quad(moment_density, *ends, args=(q, sigma, order), epsabs=0, epsrel=1e-13)[0]
            for ends in itertools.pairwise(edges)
        )
        expected = math.log(moment) / (order - 1)
        assert rdp._rdp(q, sigma)[index] == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0, 40.0, 1e4])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_rate_one_is_the_exact_gaussian(sigma, delta):
    exact = get_epsilon_gaussian(sigma / math.sqrt(25), delta)
    epsilon = PrivacyAccountant(1.0, sigma).epsilon(delta, 25)
    assert exact * (1 - 1e-9) <= epsilon <= exact * (1 + 1e-6) + 1e-9


def test_rdp_is_above_prv_but_not_far():
    prv, rdp = PrivacyAccountant(**RUN), PrivacyAccountant(**RUN, method="rdp")
    assert rdp.epsilon(1e-5, 300) == rdp.epsilon_rdp(1e-5, 300) == prv.epsilon_rdp(1e-5, 300)
    assert prv.epsilon(1e-5, 300) < rdp.epsilon(1e-5, 300) < 1.3 * prv.epsilon(1e-5, 300)


# -- counting ------------------------------------------------------------------------------------------------


def test_steps_are_counted_and_cost():
    run = PrivacyAccountant(**RUN)
    assert (run.steps, run.epsilon(1e-5), run.epsilon_rdp(1e-5)) == (0, 0.0, 0.0)
    run.step()
    run.step(299)
    assert run.steps == 300
    assert run.epsilon(1e-5) == PrivacyAccountant(**RUN).epsilon(1e-5, 300) > run.epsilon(1e-5, np.int64(200)) > 0


def test_no_noise_is_no_privacy():
    run = PrivacyAccountant(0.01, 0.0)
    assert run.epsilon(1e-5) == 0.0
    run.step()
    assert run.epsilon(1e-5) == run.epsilon_rdp(1e-5) == math.inf
    assert run.epsilon_curve(1e-5, [0, 1, 2]) == [0.0, math.inf, math.inf]


@pytest.mark.parametrize("method", ["prv", "rdp"])
def test_curve_is_a_rising_upper_bound(method):
    run = PrivacyAccountant(**RUN, method=method)
    counts = [0, 300, 1, 7, 150, 300, 80]
    curve = dict(zip(counts, run.epsilon_curve(1e-5, counts), strict=True))
    assert curve[0] == 0.0 and curve[300] == run.epsilon(1e-5, 300)
    assert [curve[c] for c in sorted(curve)] == sorted(curve.values())
    for count in set(counts) - {0}:
        fine = run.epsilon(1e-5, count)
        assert fine * 0.996 <= curve[count] <= fine * 1.02 + 0.02  # 0.996: `fine` has a slack of its own


def test_curve_of_every_step_of_a_run():
    run = PrivacyAccountant(**RUN)
    start = time.monotonic()
    curve = run.epsilon_curve(1e-5, range(1, 301))
    assert time.monotonic() - start < 20
    assert len(curve) == 300 and curve == sorted(curve) and curve[-1] == run.epsilon(1e-5, 300)
    assert len(set(curve)) <= accountant.CURVE_POINTS
    for count in (1, 2, 33, 299):  # between the computed counts, too
        assert curve[count - 1] >= run.epsilon(1e-5, count) * 0.996
    assert run.epsilon_curve(1e-5, []) == []


# -- several runs --------------------------------------------------------------------------------------------


def test_joint_composition_beats_adding():
    first, second, delta = (0.005, 0.8, 10_000), (0.01, 1.0, 2000), 1e-5
    joint = compose_epsilon([first, second], delta)
    added = sum(PrivacyAccountant(*m[:2]).epsilon(delta / 2, m[2]) for m in (first, second))
    assert joint == compose_epsilon([second, first], delta)
    assert 5.3 < joint < 5.36 and added > 7


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_every_noise_has_an_epsilon_that_falls_as_it_grows(rate):
    noises = [10.0**power for power in range(-320, 4)]
    epsilons = [rdp.rdp_epsilon((Mechanism(rate, noise, 1),), 1e-5) for noise in noises]
    assert epsilons[0] == math.inf and all(more >= less for more, less in itertools.pairwise(epsilons))
    least = [0.5 / noise / noise for noise in noises if 1e-150 < noise < 1e-3]
    assert all(a >= b for a, b in zip(epsilons[noises.index(1e-149) :], least, strict=False))


@pytest.mark.parametrize("delta", [1.1e-14, 1 - 2**-53])
def test_every_delta_has_an_epsilon(delta):
    assert 0 <= compose_epsilon([(1.0, 1.0, 1)], delta) < 40 and compose_epsilon([(1.0, 5e-324, 1)], delta) == math.inf


def test_composition_of_parts_is_the_whole():
    whole = PrivacyAccountant(0.02, 1.1).epsilon(1e-5, 300)
    assert compose_epsilon([(0.02, 1.1, 100), [0.02, 1.1, 200], (0.3, 2.0, 0)], 1e-5) == whole
    assert compose_epsilon([], 1e-5) == 0.0
    assert compose_epsilon([(0.02, 1.1, 100), (0.5, 0, 1)], 1e-5) == math.inf
    assert compose_epsilon([(1.0, 3.0, 9), (1, 1, 3)], 1e-5) == pytest.approx(get_epsilon_gaussian(0.5, 1e-5))


def test_composition_with_a_run_that_does_not_sample():
    mechanisms = [(1.0, 8.0, 4), (0.02, 1.1, 300)]
    epsilon, pld = compose_epsilon(mechanisms, 1e-5), pld_epsilon(mechanisms, 1e-5, 1e-4, pessimistic=True)
    assert pld * 0.9995 <= epsilon <= pld * 1.005


# -- calibration ---------------------------------------------------------------------------------------------


def test_calibration_is_never_over_and_hardly_under(counts, proof):
    cases, unders, slowest = counts(3, 60), [], 0.0
    for seed in range(cases):
        rng = random.Random(seed)
        target, delta = log_uniform(rng, 0.3, 50), log_uniform(rng, 1e-8, 1e-4)
        q, steps = log_uniform(rng, 1e-3, 0.3), int(log_uniform(rng, 10, 1e4))
        start = time.monotonic()
        sigma = calibrate_noise(target, delta, q, steps)
        slowest = max(slowest, time.monotonic() - start)
        compose.least_epsilon.cache_clear()
        pld._pld.cache_clear()
        epsilon = PrivacyAccountant(q, sigma).epsilon(delta, steps)
        assert epsilon <= target, (seed, target, delta, q, steps, sigma)
        unders.append(1 - epsilon / target)
    proof("calibration_targets", cases)
    proof("calibration_furthest_under", max(unders))
    proof("calibration_slowest_seconds", slowest)
    assert max(unders) <= 0.005
    assert slowest <= 60


@pytest.mark.parametrize("target", [1e-2, 500.0, 1e5])
def test_calibration_at_the_extremes_is_valid_and_ends(target):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sigma = calibrate_noise(target, 1e-6, 0.05, 20)
        assert PrivacyAccountant(0.05, sigma).epsilon(1e-6, 20) <= target
    assert len(caught) in (0, 2) and {w.category for w in caught} <= {PrivacyAccountingWarning}


def test_calibration_at_rate_one_is_exact():
    sigma = calibrate_noise(2.0, 1e-5, 1.0, 9)
    assert 0.996 * 2 <= get_epsilon_gaussian(sigma / 3, 1e-5) <= 2.0


QUESTION = (4.0, 1e-5, 0.02, 300)


def count_evaluations(monkeypatch):
    calls, original = [], pld.pld_epsilon
    monkeypatch.setattr(pld, "pld_epsilon", lambda *a: calls.append(a) or original(*a))
    return lambda: len(calls)


def test_calibration_is_remembered_and_verified(cache, monkeypatch):
    sigma = calibrate_noise(*QUESTION)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["noise_multiplier"] == sigma
    compose.least_epsilon.cache_clear()
    evaluations = count_evaluations(monkeypatch)
    assert calibrate_noise(*QUESTION) == sigma
    assert evaluations() == 1
    assert [f.name for f in cache.iterdir()] == [file.name]  # no temporary file left


@pytest.mark.parametrize(
    "spoil",
    [
        lambda known: "",
        lambda known: "{" * 100_000,
        lambda known: "[]",
        lambda known: "\udcff",
        lambda known: json.dumps({**known, "noise_multiplier": "0.7"}),
        lambda known: json.dumps({**known, "noise_multiplier": math.nan}),
        lambda known: json.dumps({**known, "version": 0}),
        lambda known: json.dumps({**known, "steps": 7, "noise_multiplier": 0.01}),
        lambda known: json.dumps({**known, "noise_multiplier": 0}),
        lambda known: json.dumps(
            {**known, "noise_multiplier": 0.5}
        ),  # far too little noise, in a file that looks right
        lambda known: json.dumps({**known, "noise_multiplier": 1e300}),
    ],
)
def test_a_wrong_cache_file_costs_time_and_never_privacy(cache, spoil):
    known = dict(
        zip(("target_epsilon", "delta", "sample_rate", "steps"), QUESTION, strict=True),
        version=calibrate.VERSION,
    )
    file = calibrate._cache_file({k: v for k, v in known.items() if k != "version"})
    cache.mkdir(parents=True)
    file.write_bytes(spoil(known).encode(errors="surrogateescape"))
    sigma = calibrate_noise(*QUESTION)
    assert 0.995 * 4 <= PrivacyAccountant(0.02, sigma).epsilon(1e-5, 300) <= 4
    assert json.loads(file.read_text()) == {**known, "noise_multiplier": sigma}


@pytest.mark.parametrize("change", [{"version": 2}, {"steps": 299}, {"delta": 2e-5}, {"extra": 1}])
def test_only_the_answer_to_the_same_question_is_recalled(cache, change):
    question = dict(zip(("target_epsilon", "delta", "sample_rate", "steps"), QUESTION, strict=True))
    calibrate._remember(question, 0.75)
    assert calibrate._recall(question) == 0.75
    (file,) = cache.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert calibrate._recall(question) is None


def test_a_cache_that_cannot_be_written_is_no_cache(cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    sigma = calibrate_noise(*QUESTION)
    assert 0.995 * 4 <= PrivacyAccountant(0.02, sigma).epsilon(1e-5, 300) <= 4


# -- releases before a run ------------------------------------------------------------------------------------

EARLIER = ((1.0, 5.0, 1), (0.01, 1.0, 100))


def test_a_run_counts_what_was_released_before_it():
    run = PrivacyAccountant(**RUN, earlier=EARLIER)
    own = (RUN["sample_rate"], RUN["noise_multiplier"], 300)
    assert (
        run.epsilon(1e-5, 300) == compose_epsilon([*EARLIER, own], 1e-5) > PrivacyAccountant(**RUN).epsilon(1e-5, 300)
    )
    assert run.epsilon(1e-5) == compose_epsilon(EARLIER, 1e-5) > 0
    curve = run.epsilon_curve(1e-5, [0, 100, 300])
    assert curve == sorted(curve) and (curve[0], curve[2]) == (run.epsilon(1e-5), run.epsilon(1e-5, 300))
    assert run.epsilon_rdp(1e-5, 300) > run.epsilon(1e-5, 300)


def test_a_plain_gaussian_and_a_sampled_one_compose_to_what_google_says():
    mechanisms = [(1.0, 5.3, 1), (0.178, 9.54, 100)]
    theirs = pld_epsilon(mechanisms, 1e-5, 1e-4, pessimistic=True)
    assert theirs * 0.999 <= compose_epsilon(mechanisms, 1e-5) <= theirs * 1.01


def test_noise_is_calibrated_for_what_is_left(cache):
    sigma = calibrate_noise(*QUESTION, earlier=EARLIER)
    assert sigma > calibrate_noise(*QUESTION)
    assert 0.99 * 4 <= PrivacyAccountant(0.02, sigma, earlier=EARLIER).epsilon(1e-5, 300) <= 4
    assert calibrate_noise(*QUESTION, earlier=EARLIER) == sigma  # recalled


@pytest.mark.parametrize("earlier", [((1.0, 0.5, 1),), ((1.0, 0.0, 1),), ((1.0, 1.12, 1),)])
def test_nothing_is_left_to_train_with(earlier):
    with pytest.raises(ValueError, match="too little is left"):
        calibrate_noise(*QUESTION, earlier=earlier)


def test_a_record_of_other_earlier_releases_is_refused():
    run, other = PrivacyAccountant(**RUN, earlier=EARLIER), PrivacyAccountant(**RUN, earlier=EARLIER[:1])
    run.step(5)
    again = PrivacyAccountant(**RUN, earlier=EARLIER)
    again.load_state_dict(json.loads(json.dumps(run.state_dict())))
    assert again.steps == 5
    for wrong in (other, PrivacyAccountant(**RUN)):
        with pytest.raises(ValueError, match="record"):
            wrong.load_state_dict(run.state_dict())
        assert wrong.steps == 0


# -- hostile input -------------------------------------------------------------------------------------------

VALID = {"target_epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.02, "noise_multiplier": 1.1, "steps": 300}


def everything(target_epsilon, delta, sample_rate, noise_multiplier, steps):
    """Every public call that takes the argument in question."""
    run = PrivacyAccountant(0.02, 1.1)
    return {
        "target_epsilon": [lambda: calibrate_noise(target_epsilon, delta, sample_rate, steps)],
        "delta": [
            lambda: calibrate_noise(target_epsilon, delta, sample_rate, steps),
            lambda: compose_epsilon([(sample_rate, noise_multiplier, steps)], delta),
            lambda: run.epsilon(delta),
            lambda: run.epsilon_rdp(delta),
            lambda: run.epsilon_curve(delta, [steps]),
        ],
        "sample_rate": [
            lambda: calibrate_noise(target_epsilon, delta, sample_rate, steps),
            lambda: compose_epsilon([(sample_rate, noise_multiplier, steps)], delta),
            lambda: PrivacyAccountant(sample_rate, noise_multiplier),
        ],
        "noise_multiplier": [
            lambda: compose_epsilon([(sample_rate, noise_multiplier, steps)], delta),
            lambda: PrivacyAccountant(sample_rate, noise_multiplier),
        ],
        "steps": [
            lambda: calibrate_noise(target_epsilon, delta, sample_rate, steps),
            lambda: compose_epsilon([(sample_rate, noise_multiplier, steps)], delta),
            lambda: run.epsilon(delta, steps),
            lambda: run.epsilon_rdp(delta, steps),
            lambda: run.epsilon_curve(delta, [steps]),
        ],
    }


NOT_FINITE = [math.nan, math.inf, -math.inf]
HUGE = 10**400  # an integer beyond the floats
BAD = {
    "target_epsilon": [0, 0.0, -1.0, 1e300, HUGE, *NOT_FINITE],
    "delta": [0, 0.0, 1, 1.0, 2.0, -1e-5, 1e-14, 1e-300, HUGE, *NOT_FINITE],
    "sample_rate": [0, 0.0, -0.1, 1.0001, 50, HUGE, *NOT_FINITE],
    "noise_multiplier": [-1.0, -1e-300, HUGE, *NOT_FINITE],
    "steps": [-1, 10**13, HUGE],
}
WRONG_TYPE = ["1", None, True, np.True_, 1j, [1], np.ones(1)]
CASES = [(name, value, ValueError) for name, values in BAD.items() for value in values]
CASES += [(name, value, TypeError) for name in BAD for value in WRONG_TYPE]
CASES += [("steps", value, TypeError) for value in (1.0, 300.0, 1e4, *NOT_FINITE)]


@pytest.mark.parametrize(("name", "value", "error"), CASES, ids=lambda x: repr(x)[:20])
def test_bad_input_is_refused_at_once_with_its_value(name, value, error):
    for index, call in enumerate(everything(**{**VALID, name: value})[name]):
        if name == "steps" and value is None and index in (2, 3):
            continue  # None is the default there: the steps taken
        start = time.monotonic()
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, (TypeError, UserError))  # our own check refused it, not a library
        assert name in str(caught.value) or name == "steps"
        assert repr(value)[:20] in str(caught.value)
        assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-5, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_counts_leave_the_record_alone(count, error):
    run = PrivacyAccountant(**RUN)
    run.step(3)
    with pytest.raises(error, match="count"):
        run.step(count)
    assert run.steps == 3


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="method.*'pld'"):
        PrivacyAccountant(0.1, 1.0, method="pld")
    with pytest.raises(ValueError, match="each mechanism is"):
        compose_epsilon([(0.1, 1.0)], 1e-5)
    with pytest.raises(ValueError, match="each mechanism is"):
        compose_epsilon(["abc"], 1e-5)
    with pytest.raises(ValueError, match="steps must be from 1"):
        calibrate_noise(1.0, 1e-5, 0.1, 0)


@pytest.mark.filterwarnings("ignore::fastloda.accounting.compose.PrivacyAccountingWarning")
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.01, 0.1, 1000, 1e-5),  # prv-accountant hangs
        (0.01, 0.02, 100, 1e-5),
        (0.01, 1e-3, 100, 1e-5),
        (0.5, 1e-300, 1, 1e-5),
        (0.5, 5e-324, 1, 1e-5),
        (0.01, 1e300, 1000, 1e-5),
        (1.0, 1e300, 1000, 1e-13),
        (1e-300, 1.0, 1000, 1e-5),
        (1e-6, 0.5, 100, 1e-5),
        (1 - 1e-16, 1.0, 10, 1e-5),
        (0.01, 1.0, 10**12, 1e-5),
        (0.01, 1.0, 1, 0.999),
        (0.01, 1.0, 10**5, 1.1e-14),
        (0.2, 0.6, 200, 1e-5),  # prv-accountant fails
    ],
)
def test_extreme_but_legal_input_ends_with_a_bound(q, sigma, steps, delta):
    start = time.monotonic()
    run = PrivacyAccountant(q, sigma)
    epsilon = run.epsilon(delta, steps)
    assert 0 <= epsilon <= run.epsilon_rdp(delta, steps)
    assert time.monotonic() - start < 60


# -- time and memory -----------------------------------------------------------------------------------------


def exponential(rate, steps, start=2.0, end=0.8):
    """A schedule that lowers the noise at every step."""
    return [(rate, start * (end / start) ** (i / steps), 1) for i in range(steps)]


ABUNDANT = {
    "a thousand noises": lambda: exponential(0.004, 1000),
    "twenty thousand noises": lambda: exponential(0.001, 20_000),
    "noises at several rates": lambda: [m for rate in (0.001, 0.002, 0.003) for m in exponential(rate, 40)],
    "a thousand rates": lambda: [(0.0005 + i * 1e-7, 2.0, 10) for i in range(1000)],
    "a thousand noises without sampling": lambda: [(1.0, 20 + i, 1) for i in range(1000)],
    "anything": lambda: [
        (log_uniform(rng, 1e-5, 0.9), log_uniform(rng, 0.02, 50), rng.randrange(1, 1000))
        for rng in map(random.Random, range(3000))
    ],
    "tiny rate, many steps": lambda: [(1e-3, 3.0, 100_000)],
    "tiny rate, a great many steps": lambda: [(1e-4, 1.0, 10**7)],
    "next to no noise": lambda: [(0.01, 1e-4, 100)],
}


@pytest.mark.filterwarnings("ignore::fastloda.accounting.compose.PrivacyAccountingWarning")
@pytest.mark.parametrize("mechanisms", ABUNDANT.values(), ids=ABUNDANT)
def test_no_account_takes_a_minute_or_a_gibibyte(mechanisms):
    mechanisms = mechanisms()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    epsilon = compose_epsilon(mechanisms, 1e-6)
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert 0 < epsilon <= rdp.rdp_epsilon(merged(mechanisms), 1e-6) * (1 + 1e-12)


@pytest.mark.parametrize(
    "question",
    [(1, 1e-6, 1e-4, 100_000), (1e-5, 0.5, 1.0, 1), (1e-5, 0.5, 0.5, 10), (2.0, 1e-7, 1e-3, 10**6)],
    ids=repr,
)
def test_no_calibration_takes_a_minute(question):
    target, delta, rate, steps = question
    start = time.monotonic()
    sigma = calibrate_noise(*question)
    assert time.monotonic() - start < 60
    assert 0.95 * target <= PrivacyAccountant(rate, sigma).epsilon(delta, steps) <= target


def test_a_schedule_of_noises_costs_hardly_more_than_its_steps_one_by_one():
    schedule = exponential(0.01, 40, end=1.98)  # about 20 fall into one cell of the grid
    few = rdp.worst_of_similar(tuple(Mechanism(*m) for m in schedule))
    exact = pld_epsilon(schedule, 1e-5, 2e-4, pessimistic=True)
    assert exact * 0.9995 <= compose_epsilon(schedule, 1e-5) <= exact * 1.005
    assert sum(m.steps for m in few) == 40 > len(few)


@pytest.mark.parametrize("most", [3, 20])
def test_rounding_costs_at_least_as_much(monkeypatch, most):
    monkeypatch.setattr(rdp, "MAX_MECHANISMS", most)
    rng = random.Random(most)
    mechanisms = tuple(
        Mechanism(log_uniform(rng, 0.01, 0.05), log_uniform(rng, 0.8, 2), rng.randrange(1, 9)) for _ in range(40)
    )
    few = rdp.worst_of_similar(mechanisms)
    assert len(few) <= most and sum(m.steps for m in few) == sum(m.steps for m in mechanisms)
    exact, rounded = (sum(m.steps * rdp._rdp(*m[:2]) for m in some) for some in (mechanisms, few))
    assert (rounded >= exact * (1 - 1e-12)).all()
    assert rdp.worst_of_similar(few) == few


def test_prv_accountant_is_asked_and_heard(monkeypatch):
    spent = (Mechanism(**RUN, steps=300),)
    lower, upper = prv.prv_epsilons(*spent, 1e-5)
    assert 0.97 * upper < lower < pld.pld_epsilon(spent, 1e-5) < upper
    epsilon = compose.least_epsilon(spent, 1e-5)[0]
    compose.least_epsilon.cache_clear()
    monkeypatch.setattr(prv, "prv_epsilons", lambda m, delta: (0.0, 0.9 * epsilon))
    assert compose.least_epsilon(spent, 1e-5) == (0.9 * epsilon, None)
    compose.least_epsilon.cache_clear()
    monkeypatch.setattr(prv, "prv_epsilons", lambda m, delta: (1.1 * epsilon, 1.2 * epsilon))
    with pytest.warns(PrivacyAccountingWarning, match="dp-accounting says .* prv-accountant .* at least"):
        assert compose_epsilon(spent, 1e-5) == PrivacyAccountant(**RUN).epsilon_rdp(1e-5, 300)


# -- fallback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("Cannot compute epsilon"), ZeroDivisionError(), AssertionError()])
def test_fallback_is_the_rdp_bound_and_says_so_once(monkeypatch, error):
    def broken(*args):
        raise error

    monkeypatch.setattr(pld, "pld_epsilon", broken)
    run = PrivacyAccountant(**RUN)
    with pytest.warns(PrivacyAccountingWarning, match="RDP bound: valid, but looser") as caught:
        assert run.epsilon(1e-5, 300) == run.epsilon_rdp(1e-5, 300)
        run.epsilon(1e-5, 200)
        run.epsilon_curve(1e-5, [1, 2, 3])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (str(error) or type(error).__name__) in str(caught[0].message)


def test_fallback_outside_the_safe_domain():
    run = PrivacyAccountant(0.01, 1.0)
    with pytest.warns(PrivacyAccountingWarning, match="within rounding") as caught:
        assert run.epsilon(1e-13, 10**5) == run.epsilon_rdp(1e-13, 10**5)
    assert len(caught) == 1
    with pytest.warns(PrivacyAccountingWarning, match="points would be needed"):
        assert compose_epsilon([(1e-4, 1.0, 10**10)], 1e-5) == PrivacyAccountant(1e-4, 1.0).epsilon_rdp(1e-5, 10**10)


def test_a_bug_is_not_a_fallback(monkeypatch):
    def buggy(*args):
        raise TypeError("a bug")

    monkeypatch.setattr(pld, "pld_epsilon", buggy)
    with pytest.raises(TypeError, match="a bug"):
        PrivacyAccountant(**RUN).epsilon(1e-5, 300)


def test_no_warning_where_there_is_a_tight_bound():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PrivacyAccountant(**RUN).epsilon(1e-5, 300) < PrivacyAccountant(**RUN).epsilon_rdp(1e-5, 300)


# -- the record ----------------------------------------------------------------------------------------------


def test_record_round_trip():
    run = PrivacyAccountant(0.1, 1.0, method="rdp")
    run.step(17)
    state = json.loads(json.dumps(run.state_dict()))
    mechanism = {"version": 1, "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 17, "method": "rdp"}
    assert state == mechanism | {"earlier": [], "bands": 1, "id": state["id"], "loaded": {}}
    fresh = PrivacyAccountant(np.float64(0.1), 1)
    fresh.load_state_dict(state)
    assert (fresh.steps, fresh.method) == (17, "prv")
    assert fresh.epsilon_rdp(1e-5) == run.epsilon(1e-5)


def test_loading_never_lowers_what_was_spent():
    run = PrivacyAccountant(**RUN)
    old = run.state_dict()
    run.step(5)
    run.load_state_dict(old)
    assert run.steps == 5


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 1.2},
        {"sample_rate": 0.01},
        {"sample_rate": 0.0},
        {"noise_multiplier": math.nan},
        {"steps": -1},
        {"steps": 3.0},
        {"steps": "3"},
        {"steps": True},
        {"version": 2},
        {"version": True},
        {"method": "none"},
        {"method": []},
        {"extra": 1},
        {"id": 7},
        {"id": None},
        {"loaded": None},
        {"loaded": {"a": -1}},
        {"loaded": {"a": 10}},  # more than all steps
        {"loaded": {7: 1}},
    ],
    ids=repr,
)
def test_other_records_are_refused(change):
    run = PrivacyAccountant(**RUN)
    run.step(2)
    with pytest.raises(ValueError, match="record"):
        run.load_state_dict({**run.state_dict(), "steps": 9, **change})
    assert run.steps == 2


@pytest.mark.parametrize("state", [None, [], {}, {"steps": 3}, "record"], ids=repr)
def test_malformed_records_are_refused(state):
    with pytest.raises(ValueError, match="privacy record"):
        PrivacyAccountant(**RUN).load_state_dict(state)


@pytest.mark.parametrize("noise", [5e-324, 1e-308, 1e-160])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_next_to_no_noise_costs_everything(noise, rate):
    assert compose_epsilon([(rate, noise, 10), (0.1, 1.0, 3), (1.0, 2.0, 1)], 1e-5) == math.inf
