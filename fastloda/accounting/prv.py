"""Lower and upper bounds for runs of equal steps, by Microsoft's prv-accountant, where that is quick.

It composes only the removal of a record, the worse direction: q N(1, sigma^2) + (1 - q) N(0, sigma^2) against N(0, sigma^2).
Gopi, Lee, Wutschitz, https://arxiv.org/abs/2106.02848
"""

import math

import numpy as np
from prv_accountant import PoissonSubsampledGaussianMechanism
from prv_accountant.composers import Heterogeneous
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from prv_accountant.privacy_random_variables import PrivacyRandomVariable, PrivacyRandomVariableTruncated
from scipy.stats import norm

from fastloda.accounting.mechanism import FAILURES, Mechanism
from fastloda.accounting.rdp import rdp_epsilon

QUICK_GRID = 2**16  # points of the grid: a tenth of a second


class _Truncated(PrivacyRandomVariableTruncated, PrivacyRandomVariable):
    """The privacy loss cut off at the grid's ends, with an exact mean.

    prv-accountant computes the mean from the CDF between fixed points, which fails on wide grids ("Discrete mean differs
    from continuous mean", its issue 36); the mean's error counts once per step. Here the integral is over the mechanism's
    output x, in which the integrand is smooth.
    """

    def mean(self) -> float:
        q, sigma = float(self.prv.p), float(self.prv.sigma)
        ends = np.array([self.t_min, self.t_max], dtype=np.longdouble)
        # x as a function of the loss; nan below the smallest loss, log(1 - q)
        low, high = (sigma**2 * np.log1p(np.expm1(ends) / q) + 0.5).astype(float)
        low, high = np.fmax(low, -12 * sigma), min(high, 1 + 12 * sigma)
        edges = np.linspace(low, high, 2 + int((high - low) / min(sigma, 2 * sigma * sigma)))
        nodes, weights = np.polynomial.legendre.leggauss(20)
        half = np.diff(edges)[:, None] / 2
        x = edges[:-1, None] + half * (nodes + 1)
        loss = np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * sigma * sigma))
        density = (1 - q) * norm.pdf(x, scale=sigma) + q * norm.pdf(x, loc=1, scale=sigma)
        return np.sum(half * weights * density * loss) / self.remaining_mass


def prv_epsilons(m: Mechanism, delta: float) -> tuple[float, float]:
    """Compute PRV's lower and upper bound on epsilon of equal steps; 0 and infinity if it can't do so, or not quickly."""
    delta_error = delta / 1000
    # The domain [-L, L] of Remark 5.6 in Gopi et al.: beyond it lies too little mass to matter, in sum or in any one step.
    one = m._replace(steps=1)
    limit = 3 + max(rdp_epsilon((m,), delta_error / 4), rdp_epsilon((one,), delta_error / 8 / m.steps))
    per_error = math.sqrt(m.steps / 2 * math.log(12 / delta_error))  # eps_error / mesh: Theorem 5.5
    mesh = 2 * limit / (QUICK_GRID - 2)
    eps_error = mesh * per_error
    # Each step's CDF is good to about 2^-53, and the tails are sums over the grid.
    rounding = m.steps * 2.0**-52 + QUICK_GRID * float(np.finfo(np.longdouble).eps)
    if eps_error > 0.05 * rdp_epsilon((m,), delta) or limit > 4000 or rounding > delta / 1000:
        return 0.0, math.inf
    domain = Domain(-limit, limit + mesh, QUICK_GRID)  # ty: ignore[abstract-class-instantiation]  # its abstract member is a static method
    try:
        with np.errstate(all="ignore"):
            loss = _Truncated(PoissonSubsampledGaussianMechanism(*m[:2]), domain.t_min(), domain.t_max())
            composed = Heterogeneous([CellCentred().discretise(loss, domain)]).compute_composition([m.steps])
            lower, _, upper = composed.compute_epsilon(delta - rounding, delta_error, eps_error)
    except FAILURES:
        return 0.0, math.inf
    return (lower, max(0.0, upper)) if lower <= upper < math.inf else (0.0, math.inf)
