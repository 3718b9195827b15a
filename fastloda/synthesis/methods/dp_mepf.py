"""DP-MEPF (Harder et al. 2023, https://arxiv.org/abs/2205.12900): noisy moments of an encoder's features, matched by a generator.

Three sums over the records of each class are released: of the features, of their squares, and of ones. Each record's features
are scaled to norm 1, and so are their squares, which otherwise would have a norm of at most 1: each sum's sensitivity is 1, and
it is used fully. Class means are noisy sums divided by noisy counts, so that no private count is used.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastloda.synthesis.data import LabelledImages

from .base import Budget, Sampler, Spent, Work
from .gaussian_release import noise_multipliers, noise_stream, release_class_sums
from .generator import class_means, fit_generator
from .public_classifier import public_classifier


@dataclass(frozen=True)
class DPMEPF:
    """The method DP-MEPF.

    `shares` divide the budget among the sums of features, the sums of their squares, and the counts.
    `encoder_steps` trains the encoder, a small classifier of public images; the outputs of all its layers are the features.
    `steps`, `learning_rate` and `width` are the generator's.
    """

    shares: tuple[float, float, float] = (0.6, 0.3, 0.1)
    encoder_steps: int = 800
    steps: int = 2000
    learning_rate: float = 2e-3
    width: int = 64
    name: str = "DP-MEPF"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        encoder = Perceptual(public_classifier(public, self.encoder_steps, work).features)
        first, second, ones = _batched_moments(encoder, private.images, work.device)
        noises = noise_multipliers(budget, self.shares)
        stream, classes = noise_stream(work.seed), private.num_classes
        contents = zip(("sum of features", "sum of squared features", "class counts"), (first, second, ones), noises)
        released = [release_class_sums(what, x, private.labels, classes, noise, stream) for what, x, noise in contents]
        (*sums, counts), releases = zip(*released)
        targets = [(total / counts.clamp(min=1.0)).float().to(work.device) for total in sums]

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            found = [class_means(moment, labels, classes) for moment in encoder(images)]
            return sum((a - b).square().sum() for a, b in zip(found, targets, strict=True))

        options = {"steps": self.steps, "learning_rate": self.learning_rate, "width": self.width}
        return fit_generator(
            loss_of, tuple(private.images.shape[1:]), classes, Spent(budget.delta, tuple(releases)), work, **options
        )


class Perceptual(nn.Module):
    """The outputs of a frozen network's layers, joined: images [n, C, H, W] to both moments' features [n, d], of norm 1."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for layer in self.layers:
            images = layer(images)
            outputs.append(images.flatten(1))
        features = torch.cat(outputs, dim=1)
        return F.normalize(features), F.normalize(features.square())


@torch.no_grad()
def _batched_moments(encoder: Perceptual, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both moments' features of all images, and a column of ones."""
    parts = [encoder(part.to(device)) for part in images.split(512)]
    first, second = (torch.cat([part[i].cpu() for part in parts]) for i in range(2))
    return first, second, torch.ones(len(images), 1)
