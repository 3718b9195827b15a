"""Each class's mean embedding of the private images, by one noisy release.

It is what DP-MERF's generator is trained to give, public images are chosen by, and images are moved toward.

An image has random Fourier features phi(x) of norm 1 (Rahimi & Recht 2007), and with its label the joint embedding
phi(x) (x) onehot(y). The sum of the records' embeddings changes by at most 1 when a record comes or goes: that is the release's
sensitivity.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from fastloda.data import LabelledImages
from fastloda.files import write_atomically

from .base import Release
from .gaussian_release import release_class_sums

WHAT = "sum of joint embeddings"


@dataclass(frozen=True)
class ClassEmbeddings:
    """What was released; all that later work may know of the private images.

    Attributes:
        frequencies: of phi, [pixels, D / 2] float32; made from public images and a seed.
        sums: of each class's embeddings, with noise, [classes, D] float64.
        noise_multiplier: that noise's standard deviation.
        records: the public, nominal number of private ones; classes are taken to be as frequent as one another.
    """

    frequencies: Tensor
    sums: Tensor
    noise_multiplier: float
    records: int

    def embed(self, images: Tensor) -> Tensor:
        """phi: [n, C, H, W] -> [n, D], of norm 1, differentiable."""
        return fourier_features(images, self.frequencies)

    @property
    def means(self) -> Tensor:
        """Of each class, [classes, D] float64."""
        return self.sums / self._of_each

    @property
    def noise(self) -> float:
        """Standard deviation of each number of the means."""
        return self.noise_multiplier / self._of_each

    @property
    def release(self) -> Release:
        """What was released, and at which cost."""
        return Release(WHAT, 1.0, self.noise_multiplier, 1)

    @property
    def _of_each(self) -> float:
        return self.records / len(self.sums)

    def to(self, device: torch.device) -> "ClassEmbeddings":
        """With its tensors there."""
        return replace(self, frequencies=self.frequencies.to(device), sums=self.sums.to(device))

    def save(self, path: Path) -> None:
        """Write it as safetensors, atomically."""
        tensors = {
            "frequencies": self.frequencies,
            "sums": self.sums,
            "noise_multiplier": torch.tensor(self.noise_multiplier, dtype=torch.float64),
            "records": torch.tensor(self.records),
        }
        write_atomically(path, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: Path) -> "ClassEmbeddings":
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of `save`'s, or damaged.
        """
        try:
            tensors = load_file(path)
            numbers = tensors["noise_multiplier"].item(), tensors["records"].item()
            return cls(tensors["frequencies"], tensors["sums"], *numbers)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is no release of `fastloda choose`, or is damaged: {error}") from error


def release_class_embeddings(
    private: LabelledImages, frequencies: Tensor, noise_multiplier: float, records: int, generator: Generator
) -> tuple[ClassEmbeddings, Release]:
    """The noisy sums, and their record; noise_multiplier: standard deviation of the noise, the sensitivity being 1."""
    embeddings = fourier_features(private.images[:], frequencies)
    what = (WHAT, embeddings, private.labels, private.num_classes)
    sums, release = release_class_sums(*what, noise_multiplier, generator)
    return ClassEmbeddings(frequencies, sums, noise_multiplier, records), release


def random_frequencies(public: LabelledImages, features: int, scale: float, seed: int) -> Tensor:
    """[pixels, features / 2] of a Gaussian kernel, whose length is `scale` median distances between public images.

    Raises:
        ValueError: half of these are equal, so that there is no such length.
    """
    generator = torch.Generator().manual_seed(seed)
    some = public.images[:500].flatten(1)
    length = scale * torch.pdist(some).median() if len(some) > 1 else torch.zeros(())
    if not 0 < length < math.inf:
        raise ValueError(
            f"the public images are too few or too alike to choose from: half of the pairs of the first {len(some)} are equal"
        )
    return torch.randn(some.shape[1], features // 2, generator=generator) / length


def fourier_features(images: Tensor, frequencies: Tensor) -> Tensor:
    """phi(x) = (cos(x w), sin(x w)) / sqrt(D / 2): [n, D], each of norm 1."""
    angles = images.flatten(1) @ frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(frequencies.shape[1])
