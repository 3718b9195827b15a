"""DP-MERF (Harder et al. 2021, https://arxiv.org/abs/2002.11603): one noisy mean embedding, which a generator learns to match.

The release and its sensitivity are those of `class_embeddings`.
"""

from dataclasses import dataclass

from torch import Tensor

from fastloda.synthesis.data import LabelledImages

from .base import Budget, Sampler, Spent, Work
from .class_embeddings import random_frequencies, release_class_embeddings
from .gaussian_release import noise_multipliers, noise_stream
from .generator import class_means, fit_generator


@dataclass(frozen=True)
class DPMERF:
    """The method DP-MERF.

    `features` is the number of random Fourier features, half of them cosines, half sines. `scale` is the kernel's length
    scale in median distances between public images. `steps`, `learning_rate` and `width` are the generator's.
    """

    features: int = 2000
    scale: float = 0.5
    steps: int = 2000
    learning_rate: float = 2e-3
    width: int = 64
    name: str = "DP-MERF"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        frequencies = random_frequencies(public, self.features, self.scale, work.seed)
        (noise,) = noise_multipliers(budget, [1.0])
        released, release = release_class_embeddings(
            private, frequencies, noise, budget.records, noise_stream(work.seed)
        )
        released = released.to(work.device)
        target = released.means.float()

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            means = class_means(released.embed(images), labels, private.num_classes)
            return (means - target).square().sum()

        options = {"steps": self.steps, "learning_rate": self.learning_rate, "width": self.width}
        shape = tuple(private.images.shape[1:])
        return fit_generator(loss_of, shape, private.num_classes, Spent(budget.delta, (release,)), work, **options)
