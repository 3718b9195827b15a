"""Epsilon of a person with several records: never below the truth, hardly above it, and below general group privacy.

The references: the hockey-stick divergence of one step by numeric integration, that of many steps by sampled privacy losses,
the exact Gaussian mechanism at rate 1, and the group privacy of any mechanism.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import binom, norm

from fastloda.accounting import groups
from fastloda.accounting.compose import PrivacyAccountingWarning, compose_epsilon
from fastloda.accounting.groups import group_epsilon
from fastloda.accounting.mechanism import MIN_DELTA


def log_ratio(x, q, sigma, records):
    """Compute the log of (the mixture's density / that of N(0, sigma^2)) at x [n]."""
    drawn = np.arange(records + 1)
    return logsumexp(drawn * (x[..., None] - drawn / 2) / sigma**2, axis=-1, b=binom.pmf(drawn, records, q))


def delta_of_one_step(epsilon, q, sigma, records):
    """Compute the larger of both directions' hockey-stick divergences, by Gauss-Legendre integration over 2,000 pieces."""
    edges = np.linspace(-12 * sigma, records + 12 * sigma, 2001)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (nodes + 1)
    loss, density = log_ratio(x, q, sigma, records), norm.pdf(x, scale=sigma)
    removed, added = np.maximum(np.exp(loss) - math.exp(epsilon), 0), np.maximum(1 - np.exp(epsilon + loss), 0)
    return max(float((half * weights * density * lost).sum()) for lost in (removed, added))


@pytest.mark.parametrize(
    ("q", "sigma", "records"), [(0.1, 1.0, 2), (0.02, 0.7, 5), (0.3, 2.0, 10), (0.5, 0.5, 3), (0.001, 0.6, 5)]
)
def test_one_step_is_the_integral(q, sigma, records):
    for delta in (1e-3, 1e-6):
        epsilon = group_epsilon([(q, sigma, 1)], delta, records)
        assert delta_of_one_step(epsilon, q, sigma, records) <= delta * (1 + 1e-4)
        assert delta_of_one_step(0.98 * epsilon, q, sigma, records) > delta


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "records"), [(0.05, 1.0, 20, 2), (0.02, 1.0, 40, 5), (0.1, 3.0, 30, 10)]
)
def test_many_steps_are_what_drawn_losses_say(q, sigma, steps, records):
    delta, draws, rng = 1e-2, 100_000, np.random.default_rng(0)
    epsilon = group_epsilon([(q, sigma, steps)], delta, records)
    estimates = {}
    for direction in ("removed", "added"):
        losses = np.zeros(draws)
        for _ in range(steps):
            x = sigma * rng.standard_normal(draws)
            x += rng.binomial(records, q, draws) if direction == "removed" else 0
            losses += log_ratio(x, q, sigma, records) * (1 if direction == "removed" else -1)
        for at in (epsilon, 0.97 * epsilon):
            lost = -np.expm1(np.minimum(at - losses, 0))
            estimates[direction, at] = lost.mean(), 4 * lost.std() / math.sqrt(draws)
    assert all(found - error <= delta for (_, at), (found, error) in estimates.items() if at == epsilon)
    assert max(found - error for (_, at), (found, error) in estimates.items() if at < epsilon) > delta


def general_group_privacy(mechanisms, delta, records):
    """Bound epsilon: (e, d)-DP for one record is (m e, d (exp(m e) - 1) / (exp(e) - 1))-DP for m (Vadhan 2017, Lemma 2.2)."""
    best = math.inf
    for single in np.geomspace(MIN_DELTA * 1.01, delta, 20):
        e = compose_epsilon(mechanisms, single)
        if single * math.expm1(records * e) <= delta * math.expm1(e):
            best = min(best, records * e)
    return best


@pytest.mark.filterwarnings("ignore::fastloda.accounting.compose.PrivacyAccountingWarning")
@pytest.mark.parametrize("records", [2, 3])
def test_it_is_below_general_group_privacy(records):
    mechanisms = [(0.01, 1.0, 1000)]
    general, found = general_group_privacy(mechanisms, 1e-6, records), group_epsilon(mechanisms, 1e-6, records)
    assert compose_epsilon(mechanisms, 1e-6) < found < 0.95 * general


@pytest.mark.parametrize("mechanisms", [[(0.02, 1.1, 300)], [(0.01, 1.0, 100), (1.0, 8.0, 1)]])
def test_one_record_costs_what_it_always_does_and_more_cost_more(mechanisms):
    bounds = [group_epsilon(mechanisms, 1e-5, records) for records in (1, 2, 5, 10)]
    assert bounds[0] == compose_epsilon(mechanisms, 1e-5)
    assert all(less < more for less, more in zip(bounds, bounds[1:]))


def test_without_sampling_it_is_the_gaussian_of_so_many_times_the_sensitivity():
    for records in (2, 10):
        assert group_epsilon([(1.0, 20.0, 30)], 1e-5, records) == compose_epsilon([(1.0, 20.0 / records, 30)], 1e-5)


@settings(max_examples=15, deadline=None)
@given(
    q=st.sampled_from([1e-3, 0.02, 0.3]),
    sigma=st.sampled_from([0.8, 2.0, 6.0]),
    steps=st.integers(1, 40),
    records=st.integers(2, 12),
)
def test_it_lies_between_the_mean_and_the_most_that_a_person_may_do(q, sigma, steps, records):
    """It is at least the epsilon of one record, and at most that of m records that are all drawn whenever any of them is."""
    found = group_epsilon([(q, sigma, steps)], 1e-5, records)
    together = 1 - (1 - q) ** records
    assert compose_epsilon([(q, sigma, steps)], 1e-5) <= found
    assert found <= compose_epsilon([(together, sigma / records, steps)], 1e-5) * (1 + 1e-9)


def test_the_bound_that_always_exists_is_reported_with_a_warning(monkeypatch):
    mechanisms = [(0.01, 3.0, 50)]
    tight = group_epsilon(mechanisms, 1e-5, 3)
    with pytest.warns(PrivacyAccountingWarning, match="more than 64 records.*valid, but looser"):
        assert group_epsilon(mechanisms, 1e-5, 65) > tight
    monkeypatch.setattr(groups, "MOST_RECORDS", 2)
    with pytest.warns(PrivacyAccountingWarning):
        assert group_epsilon(mechanisms, 1e-5, 3) > tight


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([(0.1, 1.0, 10)], 1e-5, 0), ValueError),
        (([(0.1, 1.0, 10)], 1e-5, 2.5), TypeError),
        (([(0.1, 1.0, 10)], 0.0, 2), ValueError),
        (([(0.1, 1.0)], 1e-5, 2), ValueError),
    ],
)
def test_bad_input_is_refused(arguments, error):
    with pytest.raises(error, match=r"."):
        group_epsilon(*arguments)


def test_nothing_costs_nothing_and_no_noise_everything():
    assert group_epsilon([], 1e-5, 5) == 0.0
    assert group_epsilon([(0.1, 0.0, 1)], 1e-5, 5) == math.inf
