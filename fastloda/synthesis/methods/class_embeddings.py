"""The mean embedding of each class of private images, from one noisy release.

DP-MERF trains a generator to match it, a `PublicChoice` chooses public images by it, and images are moved toward it.

An image has random Fourier features phi(x) of norm 1 (Rahimi & Recht 2007), and together with its label the joint embedding
phi(x) (x) onehot(y). Adding or removing a record changes the sum of the records' embeddings by at most 1, which is the release's
sensitivity.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource
from fastloda.synthesis.data import LabelledImages

from .base import Release
from .gaussian_release import ClassSums, release_class_sums

WHAT = "sum of joint embeddings"


@dataclass(frozen=True)
class ClassEmbeddings(ClassSums):
    """The released sums of phi, and phi's frequencies [pixels, D / 2] float32, made from public images and a seed."""

    frequencies: Tensor

    def embed(self, images: Tensor) -> Tensor:
        """Compute phi of images, differentiably: [n, C, H, W] -> [n, D], of norm 1."""
        return fourier_features(images, self.frequencies)

    def to(self, device: torch.device) -> "ClassEmbeddings":
        """Copy the embeddings, with their tensors moved to the device."""
        return replace(self, frequencies=self.frequencies.to(device), sums=self.sums.to(device))


def release_class_embeddings(
    private: LabelledImages, frequencies: Tensor, noise_multiplier: float, records: int, noise: NoiseSource
) -> tuple[ClassEmbeddings, Release]:
    """Release noisy sums of sensitivity 1, and describe the release; noise_multiplier is the noise's standard deviation."""
    embeddings = fourier_features(private.images[:], frequencies)
    what = (WHAT, embeddings, private.labels, private.num_classes)
    sums, release = release_class_sums(*what, noise_multiplier, noise)
    return ClassEmbeddings(sums, noise_multiplier, records, frequencies), release


def random_frequencies(public: LabelledImages, features: int, scale: float, seed: int) -> Tensor:
    """Draw the frequencies [pixels, features / 2] of a Gaussian kernel; its length is `scale` median distances of public images.

    Raises:
        ValueError: half of the distances are zero, so that there is no such length.
    """
    generator = torch.Generator().manual_seed(seed)
    some = public.images[:500].flatten(1)
    length = scale * torch.pdist(some).median() if len(some) > 1 else torch.zeros(())
    if not 0 < length < math.inf:
        raise UserError(
            f"the public images are too few or too alike to choose from: half of the pairs of the first {len(some)} are equal"
        )
    return torch.randn(some.shape[1], features // 2, generator=generator) / length


def fourier_features(images: Tensor, frequencies: Tensor) -> Tensor:
    """Compute phi(x) = (cos(x w), sin(x w)) / sqrt(D / 2): [n, D], each of norm 1."""
    angles = images.flatten(1) @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(frequencies.shape[1])
