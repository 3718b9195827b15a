"""What a private step claims: the numbers from which its epsilon was computed."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.compose import PrivacyAccountingWarning
from fastloda.errors import UserError
from fastloda.privacy.styles import check_max_grad_norm
from fastloda.training.settings import PrivateTraining


@dataclass(frozen=True)
class Claim:
    """The claim of DP-SGD about one step, and how often the step is taken.

    Attributes:
        noise_multiplier: standard deviation of the noise on the clipped sum, divided by max_grad_norm; > 0.
        max_grad_norm: L2 bound on one record's contribution to the clipped sum.
        expected_batch_size: divisor of the noisy sum; 1 where the step releases the sum itself.
        sample_rate: probability with which a record enters a step.
        steps: number of steps of a training run.
        delta: the delta for which epsilon is computed.

    Raises:
        ValueError, TypeError: a number is out of range; without noise there is no claim to audit.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    sample_rate: float = 1.0
    steps: int = 1
    delta: float = 1e-5

    def __post_init__(self):
        check_max_grad_norm(self.max_grad_norm)
        if not 0 < self.expected_batch_size < math.inf:
            raise UserError(f"expected_batch_size must be positive and finite, got {self.expected_batch_size!r}")
        if not self.noise_multiplier > 0:
            raise UserError(f"noise_multiplier must be > 0, got {self.noise_multiplier!r}: no noise, no claim")
        accountant = PrivacyAccountant(self.sample_rate, self.noise_multiplier)
        if not accountant.epsilon_rdp(self.delta, self.steps):  # checks the other numbers
            raise UserError(f"steps must be >= 1, got {self.steps!r}")

    @classmethod
    def of(cls, settings: PrivateTraining) -> "Claim":
        """Make the claim of a trainer's settings."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})

    @property
    def mu(self) -> float:
        """The mu for which the step without sampling is claimed to be mu-GDP (Dong et al., https://arxiv.org/abs/1905.02383)."""
        return 1 / self.noise_multiplier

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on each coordinate of the released gradient."""
        return self.noise_multiplier * self.max_grad_norm / self.expected_batch_size

    def epsilons(self, mus: Sequence[float]) -> list[float]:
        """Compute the epsilon of the whole training for each of `mus`, a step's mu, all by the same accounting method."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PrivacyAccountingWarning)
                return [self._epsilon(mu, "prv") for mu in mus]
        except PrivacyAccountingWarning:
            return [self._epsilon(mu, "rdp") for mu in mus]

    def _epsilon(self, mu: float, method: str) -> float:
        noise = 0.0 if math.isinf(mu) else 1 / max(mu, 1e-9)
        return PrivacyAccountant(self.sample_rate, noise, method).epsilon(self.delta, self.steps) if mu > 0 else 0.0
