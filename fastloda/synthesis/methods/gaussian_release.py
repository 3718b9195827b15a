"""Sums over all records, released once with Gaussian noise: without sampling and without iterations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloda.accounting.calibrate import calibrate_noise
from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource, gaussian, noise_of
from fastloda.randomness import Secret
from fastloda.synthesis.data import ByteImages

from .base import Budget, Release


def noise_multipliers(budget: Budget, shares: Sequence[float]) -> list[float]:
    """Compute the noise of several Gaussian releases that spend the budget together, in the given shares (which sum to 1).

    Gaussian mechanisms compose to one mechanism whose noise_multiplier^-2 is the sum of theirs.
    """
    if any(share <= 0 for share in shares) or not math.isclose(sum(shares), 1):
        raise UserError(f"shares of a budget must be positive and sum to 1, got {shares}")
    total = calibrate_noise(budget.epsilon, budget.delta, sample_rate=1.0, steps=1)
    return [total / math.sqrt(share) for share in shares]


@dataclass(frozen=True)
class ClassSums:
    """The released sum of an embedding over the records of each class: all that later work may know about the private images.

    Attributes:
        sums: noisy sums, [classes, d] float64; one record changes them by at most 1.
        noise_multiplier: standard deviation of the noise on the sums.
        records: public, nominal number of private records; all classes are taken to be equally frequent.
    """

    sums: Tensor
    noise_multiplier: float
    records: int

    @property
    def means(self) -> Tensor:
        """The mean embedding of each class, [classes, d] float64; the divisor is the nominal count, never the true one."""
        return self.sums / self._of_each

    @property
    def noise(self) -> float:
        """The standard deviation of the noise on each number of the means."""
        return self.noise_multiplier / self._of_each

    @property
    def _of_each(self) -> float:
        return self.records / len(self.sums)


def noise_stream(seed: int | None) -> NoiseSource:
    """Make the source of a release's noise, seeded by the operating system if seed is None."""
    return noise_of(Secret(Secret.of_seed(seed).digest("release")), torch.device("cpu"))


def release_class_sums(
    what: str, features: Tensor, labels: Tensor, num_classes: int, noise_multiplier: float, noise: NoiseSource
) -> tuple[Tensor, Release]:
    """Release the sum of each class's features, [num_classes, d] float64, plus N(0, noise_multiplier^2).

    The features [records, d] have L2 norm at most 1: one record changes one row by at most 1, which is the sensitivity. Longer
    ones are shortened to norm 1, and those that are not finite contribute zero. Also returns the release's description.
    """
    features = features.double()
    norms = features.norm(dim=1, keepdim=True)
    bounded = (features / norms.clamp(min=1.0)).where(norms.isfinite(), 0.0)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, bounded)
    return sums + gaussian(sums.shape, noise_multiplier, sums.device, noise), Release(what, 1.0, noise_multiplier, 1)


@torch.no_grad()
def alone(function: Callable[[Tensor], Tensor], images: Tensor | ByteImages) -> Tensor:
    """Compute a function of each image separately: [n, ...].

    In a batch, the rounding of an image's result can depend on the number of other images. Where two results are nearly equal,
    this would change the vote of another record.
    """
    return torch.cat([function(image[:]) for image in images.split(1)])
