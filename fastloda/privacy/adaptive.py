"""A clipping bound that follows a quantile of the gradients' norms, privately (Andrew et al. 2021).

https://arxiv.org/abs/1905.03871, Algorithm 1. After each step the bound C moves towards the norm below which a given share
of the gradients lies. This move is a second release about the records, and its cost is part of the step's.

*Sensitivity.* With b_n = 1 if |g_n| <= C, else 0, the release is of  S = sum_n (b_n - 1/2)  over the samples of the batch.
Adding or removing one record adds or removes one term, +1/2 or -1/2, or none if the record was not drawn, is masked, or has
no finite gradient; the other terms stay, since C is the outcome of earlier releases. So S changes by at most 1/2.

*Cost.* A step releases (sum of clipped gradients + z_g C N(0, I),  S + sigma_b N(0, 1)). With each part divided by its noise's
standard deviation, this is one Gaussian mechanism of standard deviation 1, to whose mean one record adds a vector of squared
length at most 1 / z_g^2 + (1/2)^2 / sigma_b^2. With  z_g = (z^-2 - (2 sigma_b)^-2)^(-1/2)  this is 1 / z^2: the step costs
exactly what the accountant charges for noise multiplier z, Poisson amplification included (Theorem 1 of the paper).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource, gaussian
from fastloda.privacy.ranks import World
from fastloda.privacy.styles import Bound, Flat, check_positive

LARGEST_SHARE = 0.99  # the largest share of a step's cost that the count may take: the gradient's noise is then tenfold
DEFAULT_COUNT_NOISE = 1 / 20  # sigma_b over the expected batch size, as in the paper
LEAST_BOUND, LARGEST_BOUND = 1e-20, 1e20  # float32 holds the bound wherever noise may drive it


@dataclass(frozen=True)
class AdaptiveClipping(Flat):
    """The style of flat clipping whose bound starts at `initial`; a step multiplies it by exp(-learning_rate (b - quantile)).

    b is the noisy share of gradients that were not longer than the bound: (S + sigma_b N(0, 1)) / expected_batch_size + 1/2.
    The divisor is public, and neither S nor b is stored after the step.

    Attributes:
        quantile: the share of gradients that should not be clipped, in (0, 1).
        learning_rate: the learning rate of the bound's logarithm. With 0.2 and quantile 0.5 the bound changes tenfold in 23
            steps if all gradients are on one side of it.
        count_noise: sigma_b, the standard deviation of the noise on the count S; it must exceed noise_multiplier / 2.
            Default: expected_batch_size / 20.
        initial: the first bound. Default: max_grad_norm. It is public: do not take it from private gradients.
        min_bound, max_bound: the limits of the bound.
    """

    name: ClassVar[str] = "adaptive"
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None
    initial: float | None = None
    min_bound: float = LEAST_BOUND
    max_bound: float = LARGEST_BOUND

    def __post_init__(self):
        if not 0 < self.quantile < 1:
            raise UserError(f"quantile must be in (0, 1), got {self.quantile!r}")
        check_positive("learning_rate", self.learning_rate)
        if not LEAST_BOUND <= self.min_bound < self.max_bound <= LARGEST_BOUND:
            raise UserError(
                f"min_bound must be less than max_bound, both within {LEAST_BOUND} and {LARGEST_BOUND}, got {self.min_bound!r} "
                f"and {self.max_bound!r}"
            )
        for name in ("count_noise", "initial"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    def count_std(self, expected_batch_size: float) -> float:
        """Compute sigma_b, the standard deviation of the noise on the count S."""
        return expected_batch_size * DEFAULT_COUNT_NOISE if self.count_noise is None else self.count_noise

    def share(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Compute the count's share of a step's cost, the square of sensitivity over noise: (z / (2 sigma_b))^2.

        Raises:
            ValueError: the share exceeds `LARGEST_SHARE`.
        """
        std = self.count_std(expected_batch_size)
        share = (noise_multiplier / (2 * std)) ** 2
        if share > LARGEST_SHARE:
            default = "" if self.count_noise is not None else " (expected_batch_size / 20, the default)"
            least = noise_multiplier / (2 * math.sqrt(LARGEST_SHARE))
            raise UserError(
                f"count_noise must be at least {least:.4g} with noise_multiplier={noise_multiplier:.4g}, got {std}{default}"
            )
        return share

    def gradient_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Compute the gradient's noise multiplier z_g = (z^-2 - (2 sigma_b)^-2)^(-1/2); 0 if z = 0, without any noise."""
        return noise_multiplier / math.sqrt(1 - self.share(noise_multiplier, expected_batch_size))

    def moved(self, bound: float, below: float) -> float:
        """Compute the bound after `bound`, within the limits; below: b, the noisy share of gradients that were not longer."""
        log = math.log(bound) - self.learning_rate * (below - self.quantile)
        return math.exp(min(max(log, math.log(self.min_bound)), math.log(self.max_bound)))

    def bound_from(self, max_grad_norm: float) -> "MovingBound":
        """Make the bound that a run of steps starts with: `initial`, or max_grad_norm."""
        return MovingBound(self.initial or max_grad_norm, self)


class MovingBound(Bound):
    """The bound C of `AdaptiveClipping`, and the count S over the gradients observed since the last step.

    S is private, like the clipped sums. It leaves this object in `observed`, only to derive the source of the noise, and in
    `move`, with noise.
    """

    def __init__(self, value: float, style: AdaptiveClipping):
        super().__init__(value)
        self._style = style
        self.forget()

    def observe(self, norms: Tensor, mask: Tensor) -> None:
        """Add to S 1/2 for each gradient, of float64 `norms`, that is not longer than C, and -1/2 for each longer one."""
        self._count = self._count.to(norms.device) + centred_count(norms, self.value, mask)

    def forget(self) -> None:
        self._count = torch.zeros((), dtype=torch.float64)

    def observed(self, world: World) -> Sequence[Tensor]:
        return (world.sum_to_first({"count": self._count})["count"],)

    def move(
        self, noise_multiplier: float, expected_batch_size: float, world: World, generator: NoiseSource | None
    ) -> None:
        """Set C to C exp(-learning_rate (b - quantile)), which releases b: with noise, unless noise_multiplier is 0."""
        (count,) = self.observed(world)
        moved = count.new_tensor(self.value)
        if world.first:
            if noise_multiplier > 0:
                std = self._style.count_std(expected_batch_size)
                count = count + gaussian(count.shape, std, count.device, generator)
            moved.fill_(self._style.moved(self.value, count.item() / expected_batch_size + 0.5))
        world.copy_from_first([moved])
        self.value = moved.item()


def centred_count(norms: Tensor, bound: float, mask: Tensor) -> Tensor:
    """Compute S for float64 norms [samples]: a sample adds 1/2 if norm <= bound, else -1/2, and 0 if masked or not finite."""
    halves = torch.where(norms <= bound, 0.5, -0.5).to(norms.dtype)
    return torch.where(mask & norms.isfinite(), halves, 0.0).sum()
