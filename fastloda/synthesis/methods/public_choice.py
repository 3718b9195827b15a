"""A private choice of public images: those that resemble the private ones, class by class, by one noisy release.

The release is that of DP-MERF: for each class the sum of the records' embeddings phi(x), plus noise (`class_embeddings`). Each
public image of the class then gets a weight, so that the weighted mean of phi agrees with the released mean m as far as the noise
allows, and the weights are otherwise as even as possible:

    minimise over w  KL(w || even) + |sum_i w_i phi(x_i) - m|^2 / (2 tau^2)

This is convex, and solved in its dual, w_i = exp(theta . phi(x_i)) / Z (maximum entropy with relaxed constraints: Dudik et al.
2007, https://jmlr.org/papers/v8/dudik07a.html). Images drawn by their weights are then bent, or moved pixel by pixel, so that
their means agree better (`moved`): no weights can produce what no public image has. A public model that is trained further on
them starts private fine-tuning nearer to the private images. Spending a part of the budget on choosing public data is the idea
of PrivImage (Li et al. 2024, https://arxiv.org/abs/2311.12850), which chooses classes of public images (`class_queries`).

Everything after the release is computed from it and from public data, and costs no more privacy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion.pretrain import PublicTraining

from .class_embeddings import WHAT, ClassEmbeddings, random_frequencies, release_class_embeddings
from .gaussian_release import ClassSums
from .moves import Reach, moved
from .warm_up import OneRelease

FURTHER = PublicTraining(steps=600, learning_rate=1e-3, ema_decay=0.99)


@dataclass(frozen=True)
class PublicChoice(OneRelease):
    """The settings of a choice of public images.

    Attributes:
        noise_multiplier: standard deviation of the released sums' noise; their sensitivity is 1.
        training: settings of the further training.
        features: number of random Fourier features, half of them cosines, half sines.
        scale: length scale of the kernel in median distances between public images.
        tolerance: tau, in standard deviations of the released means' noise. A larger value makes the weights more even.
        drawn: number of images drawn by their weights, with replacement, for further training of the public model.
        reach: how far these images are moved easily, toward where their means agree with the released ones.
    """

    noise_multiplier: float = 5.0
    training: PublicTraining = field(default_factory=lambda: FURTHER)
    features: int = 2000
    scale: float = 0.5
    tolerance: float = 4.0
    drawn: int = 20_000
    reach: Reach = Reach(0.3)

    kind: ClassVar[str] = "choice"
    what: ClassVar[str] = WHAT
    released_as: ClassVar[type[ClassSums]] = ClassEmbeddings

    def __post_init__(self):
        super().__post_init__()
        if self.features < 2 or self.drawn < 1 or not self.scale > 0 or not self.tolerance > 0:
            raise UserError(f"choice needs features >= 2, drawn >= 1, scale > 0 and tolerance > 0; got {self}")

    def pool(self, public: LabelledImages, names: Sequence[str]) -> LabelledImages:
        pool = super().pool(public, names)
        self._frequencies(pool, seed=0)  # this refuses them
        return pool

    def _frequencies(self, pool: LabelledImages, seed: int) -> Tensor:
        return random_frequencies(pool, self.features, self.scale, seed)

    def sums(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> ClassEmbeddings:
        """Release the noisy sum of each class's random features: phi has norm 1, so that the sensitivity is 1."""
        made = release_class_embeddings(private, self._frequencies(pool, seed), self.noise_multiplier, records, noise)
        return made[0]

    def weights(self, public: LabelledImages, released: ClassEmbeddings) -> Tensor:
        """Compute a weight for each public image, [n] float64; each class's weights have the same sum, and all together 1."""
        weights = torch.zeros(len(public), dtype=torch.float64)
        for label, mean in enumerate(released.means):
            members = (public.labels == label).nonzero()[:, 0]
            features = released.embed(public.images[members]).double()
            weights[members] = tilted(features, mean, self.tolerance * released.noise) / len(released.means)
        return weights

    def draw(self, public: LabelledImages, weights: Tensor, seed: int) -> LabelledImages:
        """Draw `drawn` images by their weights, with replacement."""
        generator = torch.Generator().manual_seed(seed)
        index = torch.multinomial(weights, self.drawn, replacement=True, generator=generator)
        return public[index]

    def training_images(
        self, pool: LabelledImages, released: ClassEmbeddings, seed: int, progress: bool = True
    ) -> LabelledImages:
        """Choose `drawn` public images, and move them."""
        drawn = self.draw(pool, self.weights(pool, released), seed)
        return moved(drawn, released, self.reach, seed, progress)


def tilted(features: Tensor, target: Tensor, tau: float) -> Tensor:
    """Compute the weights w [n], of sum 1, that minimise KL(w || even) + |features^T w - target|^2 / (2 tau^2)."""
    theta = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=60, line_search_fn="strong_wolfe")

    def negative_dual() -> Tensor:
        optimizer.zero_grad()
        loss = (features @ theta).logsumexp(0) - theta @ target + tau**2 / 2 * theta @ theta
        loss.backward()
        return loss

    optimizer.step(negative_dual)
    return (features @ theta.detach()).softmax(0)
