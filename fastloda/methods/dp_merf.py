"""DP-MERF (Harder et al. 2021, https://arxiv.org/abs/2002.11603): one noisy mean embedding, and a generator that matches it.

An image has random Fourier features phi(x) of norm 1, and with its label the joint embedding phi(x) (x) onehot(y). The sum of the
records' embeddings changes by at most 1 when a record comes or goes: that is the sensitivity of the only release.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloda.data import LabelledImages

from .base import Budget, Sampler, Spent, Work
from .gaussian_release import noise_multipliers, noise_stream, release_class_sums
from .generator import class_means, fit_generator


@dataclass(frozen=True)
class DPMERF:
    """Attributes.

    features: random Fourier features, a cosine and a sine for each half.
    scale: the kernel's length scale in median distances between public images.
    steps, learning_rate: of the generator.
    """

    features: int = 2000
    scale: float = 0.5
    steps: int = 2000
    learning_rate: float = 2e-3
    name: str = "DP-MERF"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        frequencies = random_frequencies(public, self.features, self.scale, work.seed).to(work.device)
        (noise,) = noise_multipliers(budget, [1.0])
        embeddings = fourier_features(private.images.to(work.device), frequencies).cpu()
        what = ("sum of joint embeddings", embeddings, private.labels, private.num_classes)
        sums, release = release_class_sums(*what, noise, noise_stream(work.seed))
        # With the public count as divisor, and classes taken to be as frequent as one another.
        target = (sums / (budget.records / private.num_classes)).float().to(work.device)

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            means = class_means(fourier_features(images, frequencies), labels, private.num_classes)
            return (means - target).square().sum()

        options = {"steps": self.steps, "learning_rate": self.learning_rate}
        shape = tuple(private.images.shape[1:])
        return fit_generator(loss_of, shape, private.num_classes, Spent(budget.delta, (release,)), work, **options)


def random_frequencies(public: LabelledImages, features: int, scale: float, seed: int) -> Tensor:
    """[pixels, features / 2] of a Gaussian kernel, whose length is `scale` median distances between public images."""
    generator = torch.Generator().manual_seed(seed)
    some = public.images[:500].flatten(1)
    length = scale * torch.pdist(some).median()
    return torch.randn(some.shape[1], features // 2, generator=generator) / length


def fourier_features(images: Tensor, frequencies: Tensor) -> Tensor:
    """phi(x) = (cos(x w), sin(x w)) / sqrt(D / 2): [n, D], each of norm 1 (Rahimi & Recht 2007)."""
    angles = images.flatten(1) @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(frequencies.shape[1])
