"""Bounds on membership attacks: never below what the best attack reaches, and close to it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from fastloda.accounting import membership, pld
from fastloda.accounting.compose import compose_epsilon
from fastloda.accounting.membership import MembershipBound

DELTA = 1e-5
RATES = (1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9)


def best_attack(rate: float, sample_rate: float, sigma: float) -> float:
    """Compute the true positive rate of the likelihood ratio test of one step, which by Neyman and Pearson is the best test.

    Without the record the released sum is N(0, sigma^2); with it, it is N(1, sigma^2) with probability sample_rate. The
    likelihood ratio rises with the sum, so that the test says "member" above a threshold.
    """
    threshold = norm.isf(rate)
    return sample_rate * norm.sf(threshold - 1 / sigma) + (1 - sample_rate) * rate


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("rate", RATES)
def test_a_full_batch_step_is_bounded_by_the_gaussian_trade_off_exactly(sigma, rate):
    bound, truth = MembershipBound.of_releases([(1.0, sigma, 1)], DELTA), best_attack(rate, 1.0, sigma)
    assert truth * (1 - 1e-12) <= bound.true_positive_rate(rate) <= truth * (1 + 1e-9)
    by_pairs = replace(bound, mu=np.inf).true_positive_rate(rate)  # bounded by tangents, as for a sampled step
    assert truth <= by_pairs <= 1.002 * truth


@pytest.mark.parametrize("sample_rate", [0.05, 0.3, 0.999])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 4.0])
@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.1])
def test_a_sampled_step_is_bounded_closely(sample_rate, sigma, rate):
    bound = MembershipBound.of_releases([(sample_rate, sigma, 1)], DELTA).true_positive_rate(rate)
    truth = best_attack(rate, sample_rate, sigma)
    assert truth <= bound <= 1.005 * truth + DELTA


def test_composed_steps_are_bounded_and_mu_is_that_of_the_gaussian():
    bound = MembershipBound.of_releases([(1.0, 4.0, 9), (1.0, 2.0, 4)], DELTA)  # mu^2 = 9/16 + 1
    assert bound.gdp_mu(DELTA) == pytest.approx(1.25, abs=1e-12)
    assert bound.advantage() == pytest.approx(2 * norm.cdf(0.625) - 1, abs=1e-12)
    by_pairs = replace(bound, mu=np.inf)
    assert 1.25 <= by_pairs.gdp_mu(DELTA) <= 1.253
    assert bound.advantage() <= by_pairs.advantage() <= 1.001 * bound.advantage()


def test_mu_covers_the_whole_curve_and_no_more():
    bound = MembershipBound.of_releases([(0.1, 1.0, 50)], DELTA)
    mu = bound.gdp_mu(DELTA)
    rates = np.geomspace(DELTA, 0.9, 300)
    found = np.array([bound.true_positive_rate(rate) for rate in rates])
    within = found <= 1 - DELTA
    reached = norm.cdf(norm.ppf(rates) + mu)
    assert (found <= reached)[within].all()
    assert (found > norm.cdf(norm.ppf(rates) + mu - 0.005))[within].any()


def test_attacks_reach_more_with_more_false_positives_more_steps_and_less_noise():
    rates = np.linspace(0.001, 0.999, 99)

    def found(*mechanism):
        bound = MembershipBound.of_releases([mechanism], DELTA)
        return np.array([bound.true_positive_rate(rate) for rate in rates])

    one = found(0.1, 1.0, 20)
    assert (np.diff(one) > 0).all() and (one >= rates).all()
    assert (found(0.1, 1.0, 40) > one).all() and (found(0.1, 0.8, 20) > one).all()


@pytest.mark.parametrize("mechanism", [(0.2, 1.0, 30), (0.01, 0.7, 500), (1.0, 3.0, 5)])
def test_the_whole_curve_never_allows_more_than_its_reported_point(mechanism):
    whole = MembershipBound.of_releases([mechanism], DELTA)
    alone = MembershipBound.of_promise(compose_epsilon([mechanism], DELTA), DELTA)
    for rate in RATES:
        assert whole.true_positive_rate(rate) <= alone.true_positive_rate(rate)
    assert whole.advantage() < alone.advantage()


def test_a_promise_alone_is_bounded_from_both_sides():
    bound = MembershipBound.of_promise(1.0, DELTA)
    assert bound.true_positive_rate(0.01) == pytest.approx(np.e * 0.01 + DELTA)
    assert bound.true_positive_rate(0.9) == pytest.approx(1 - (1 - DELTA - 0.9) / np.e)
    assert bound.advantage() == pytest.approx((np.e - 1 + 2 * DELTA) / (np.e + 1))


def test_where_there_is_no_tight_bound_the_rdp_bound_holds(monkeypatch):
    mechanisms = [(0.1, 1.0, 50)]
    tight = MembershipBound.of_releases(mechanisms, DELTA)

    def fails(*_):
        raise ValueError("too large a grid")

    monkeypatch.setattr(pld, "pld_deltas", fails)
    loose = MembershipBound.of_releases(mechanisms, DELTA)
    assert len(loose.epsilons) < len(tight.epsilons)
    for rate in (0.001, 0.01, 0.1):
        assert tight.true_positive_rate(rate) < loose.true_positive_rate(rate) < 4 * tight.true_positive_rate(rate)


def test_no_noise_bounds_nothing_and_no_step_tells_nothing():
    bare = MembershipBound.of_releases([(0.1, 0.0, 1)], DELTA)
    assert bare.true_positive_rate(0.01) == bare.advantage() == 1.0 and bare.gdp_mu(DELTA) == np.inf
    none = MembershipBound.of_releases([(0.1, 1.0, 0)], DELTA)
    assert none.true_positive_rate(0.01) == pytest.approx(0.01) and none.gdp_mu(DELTA) == none.advantage() == 0.0


@pytest.mark.parametrize("rate", [0, 1, -0.1, np.nan])
def test_a_rate_must_be_a_share(rate):
    with pytest.raises(ValueError, match="rate of errors"):
        MembershipBound.of_promise(1.0, DELTA).true_positive_rate(rate)
    with pytest.raises(ValueError, match="rate of errors"):
        membership.MembershipBound.of_promise(1.0, DELTA).gdp_mu(0.5)
