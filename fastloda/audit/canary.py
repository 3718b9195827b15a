"""A white-box canary: how well an observer of the releases can tell whether one record was in the batch.

The observer projects each released gradient on the canary's own contribution (Nasr et al., https://arxiv.org/abs/2302.07956),
which neighbour replay has measured exactly. If the step is a Gaussian mechanism, the projections with and without the canary
have two normal distributions whose means are mu standard deviations apart.
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, norm

from fastloda.audit.claim import Claim
from fastloda.audit.report import Finding

PILOT = 20  # one in 20 of the observations without the canary is used to place the threshold only


class GaussianMu:
    """The bounds on mu from projections with (`inside`) and without (`outside`) the canary, if normal with equal variance.

    For N projections each, t = mu_hat sqrt(N/2) is noncentral t; its normal approximation is Johnson and Welch's (Biometrika
    31, 1940).
    """

    def __init__(self, inside: np.ndarray, outside: np.ndarray):
        a, b = len(inside), len(outside)
        self._root, df = math.sqrt(a * b / (a + b)), a + b - 2
        pooled = math.sqrt((inside.var() * a + outside.var() * b) / df)
        gap = inside.mean() - outside.mean()
        self.estimate = gap / pooled if pooled > 0 else math.inf
        t = self.estimate * self._root
        self._centre = t * (1 - 1 / (4 * df))
        self._spread = math.sqrt(1 + t * t / (2 * df)) if math.isfinite(t) else 1.0

    def lower(self, significance: float) -> float:
        """Compute a lower bound on mu, which exceeds the true mu with probability `significance`."""
        return max(0.0, (self._centre - norm.isf(significance) * self._spread) / self._root)

    def p_value(self, mu: float) -> float:
        """Compute the p-value of the claim that the true value is at most `mu`."""
        return float(norm.sf((self._centre - mu * self._root) / self._spread))


class CountedMu:
    """The bounds on mu from wrong guesses at one threshold: two Clopper-Pearson bounds, each at half the significance.

    For a mu-GDP mechanism, Phi^-1(1 - false positive rate) + Phi^-1(1 - false negative rate) <= mu.
    """

    def __init__(self, inside: np.ndarray, outside: np.ndarray, threshold: float):
        self._positives, self._negatives = int((outside > threshold).sum()), int((inside <= threshold).sum())
        self._out, self._in = len(outside), len(inside)

    def lower(self, significance: float) -> float:
        false_positives = _upper(self._positives, self._out, significance / 2)
        false_negatives = _upper(self._negatives, self._in, significance / 2)
        return max(0.0, float(norm.isf(false_positives) + norm.isf(false_negatives)))

    def p_value(self, mu: float) -> float:
        """Compute the significance at which the lower bound reaches `mu`; 1 if it never does."""

        def excess(log_p: float) -> float:
            return self.lower(math.exp(log_p)) - mu

        if excess(0.0) <= 0:
            return 1.0
        return 0.0 if excess(-600.0) >= 0 else math.exp(brentq(excess, -600.0, 0.0, xtol=1e-6))


def _upper(successes: int, trials: int, significance: float) -> float:
    """Compute Clopper-Pearson's upper bound on a probability."""
    return 1.0 if successes >= trials else float(beta.isf(significance, successes + 1, trials - successes))


def guess(inside: np.ndarray, outside: np.ndarray, share: float) -> CountedMu:
    """Count wrong guesses at a threshold: the mean of a pilot part of `outside` plus half of the canary's `share`."""
    pilot = max(10, len(outside) // PILOT)
    return CountedMu(inside, outside[pilot:], outside[:pilot].mean() + share / 2)


def findings(gaussian: GaussianMu, counted: CountedMu, claim: Claim, record: str, observations: int) -> list[Finding]:
    """Compare both estimates of mu with the claim."""
    meaning = (
        "The canary is told apart better than the claim allows: too little noise, or too large a share of one record"
    )
    p = gaussian.p_value(claim.mu)
    measured = f"mu {gaussian.estimate:.4g}, claimed {claim.mu:.4g}; {record}, {observations} observations each way"
    counts = f"mu >= {counted.lower(1e-3):.4g} at 99.9% from counts of wrong guesses"
    return [
        Finding("canary, as a Gaussian", measured, meaning, p),
        Finding("canary, by counts", counts, meaning, counted.p_value(claim.mu)),
    ]
