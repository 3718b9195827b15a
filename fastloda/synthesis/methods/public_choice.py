"""A private choice of public images: those that resemble the private ones, class by class, by one noisy release.

The release is that of DP-MERF: each class's sum of the records' embeddings phi(x), plus noise (`class_embeddings`). Each public
image of the class then has a weight, such that the weighted mean of phi agrees with the released one as far as its noise lets it
be known, and the weights are otherwise as even as can be:

    minimise over w  KL(w || even) + |sum_i w_i phi(x_i) - m|^2 / (2 tau^2)

which is convex, and solved in its dual, w_i = exp(theta . phi(x_i)) / Z (maximum entropy with relaxed constraints: Dudik et al.
2007, https://jmlr.org/papers/v8/dudik07a.html).  Images drawn by their weights are then moved a little, pixel by pixel, to where
their means agree better (`moved`): what no public image has, no weight can give.  A public model that is trained further on them
starts private fine-tuning nearer to the private images.  To spend a part of the budget on choosing public data is the idea of
PrivImage (Li et al. 2024, https://arxiv.org/abs/2311.12850), which asks for classes of public images instead.

All that follows the release is computed from it and from public data, and costs no more privacy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from fastloda.errors import UserError
from fastloda.synthesis.data import LabelledImages, relabelled
from fastloda.synthesis.diffusion import UNet
from fastloda.synthesis.diffusion.pretrain import PublicTraining, pretrain

from .base import Release
from .class_embeddings import ClassEmbeddings, random_frequencies, release_class_embeddings
from .pixel_moves import moved

FURTHER = PublicTraining(steps=600, learning_rate=1e-3, ema_decay=0.99)


@dataclass(frozen=True)
class PublicChoice:
    """The settings of a choice of public images.

    Attributes:
        noise_multiplier: standard deviation of the released sums' noise; their sensitivity is 1.
        features: number of random Fourier features, half of them cosines, half sines.
        scale: length scale of the kernel in median distances between public images.
        tolerance: tau, in standard deviations of the released means' noise. A larger value keeps more different images.
        drawn: number of images drawn by their weights, with replacement, for further training of the public model.
        reach: distance, for pixels in [-1, 1], by which a pixel of these images may easily be moved; 0 leaves them as they
            are.
        training: settings of the further training.
    """

    noise_multiplier: float = 5.0
    features: int = 2000
    scale: float = 0.5
    tolerance: float = 4.0
    drawn: int = 20_000
    reach: float = 0.3
    training: PublicTraining = field(default_factory=lambda: FURTHER)

    def __post_init__(self):
        if not 0 < self.noise_multiplier < float("inf"):
            raise UserError(f"choice.noise_multiplier must be positive and finite, got {self.noise_multiplier}")
        if self.features < 2 or self.drawn < 1 or not self.scale > 0 or not self.tolerance > 0:
            raise UserError(f"choice needs features >= 2, drawn >= 1, scale > 0 and tolerance > 0; got {self}")
        if not 0 <= self.reach < float("inf"):
            raise UserError(f"choice.reach must be finite and not negative, got {self.reach}")

    def check(self, public: LabelledImages, classes: int) -> None:
        """Refuse public images from which nothing can be chosen, before anything is released to choose them by.

        Raises:
            ValueError: a class of the private images has no public ones, or `random_frequencies` refuses.
        """
        for label in range(classes):
            if not (public.labels == label).any():
                raise UserError(f"there is no public image of class {public.class_names[label]} to choose")
        random_frequencies(public, self.features, self.scale, seed=0)

    def release(
        self, private: LabelledImages, public: LabelledImages, records: int, seed: int, noise: Generator
    ) -> tuple[ClassEmbeddings, Release]:
        """Release the noisy sum of each class's embeddings.

        `records` is the public, nominal number of private ones; `seed` makes the embedding, together with public images only.
        """
        frequencies = random_frequencies(public, self.features, self.scale, seed)
        return release_class_embeddings(private, frequencies, self.noise_multiplier, records, noise)

    def weights(self, public: LabelledImages, released: ClassEmbeddings) -> Tensor:
        """Compute a weight for each public image, [n] float64; each class's weights have the same sum, and all together 1.

        Raises:
            ValueError: a class has no public images.
        """
        self.check(public, len(released.means))
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
        self, public: LabelledImages, released: ClassEmbeddings, seed: int, progress: bool = True
    ) -> LabelledImages:
        """Choose `drawn` public images, and move them."""
        return moved(self.draw(public, self.weights(public, released), seed), released, self.reach, progress)

    def train_further(
        self,
        model: UNet,
        public: LabelledImages,
        released: ClassEmbeddings,
        seed: int,
        *,
        class_names: Sequence[str] = (),
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> UNet:
        """Train the public model, whose classes are `class_names`, on `training_images`; it continues from the checkpoint."""
        images = self.training_images(public, released, seed, progress)
        images = relabelled(images, class_names) if class_names else images
        settings = replace(self.training, seed=seed)
        return pretrain(model, images, settings, checkpoint=checkpoint, progress=progress)


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
