"""Warm-ups before private training: a noisy release, by which the public images and the public model are improved.

Each warm-up releases one sum over the records of each class, of an embedding whose norm is at most 1: its sensitivity is 1, and a
record that is not finite contributes zero. Everything later is computed from the sums and from public data, and costs no more
privacy. Several warm-ups in a row release all their sums first, so that no interruption makes some of them be drawn again.
"""

from abc import ABCMeta, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastloda.errors import UserError
from fastloda.files import write_atomically
from fastloda.privacy.noise import NoiseSource
from fastloda.synthesis.data import LabelledImages, listed, only
from fastloda.synthesis.diffusion import Process, UNet
from fastloda.synthesis.diffusion.pretrain import PublicTraining, pretrain

from .base import Release
from .gaussian_release import ClassSums

Released = Mapping[str, ClassSums]  # kind of a warm-up -> what it released


class WarmUp(Protocol):
    """A release about the private images, and the further training of a public model that uses it."""

    @property
    def releases(self) -> tuple[Release, ...]:
        """What is released, with its cost in privacy; both follow from the settings alone."""

    def pool(self, public: LabelledImages, names: Sequence[str]) -> LabelledImages:
        """Select the public images that it works with, for private classes of these names.

        Raises:
            UserError: these images can't be used; this is known before anything is released.
        """

    def release(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> Released:
        """Release the noisy sums.

        `records` is the public, nominal number of private records; the embeddings depend only on `seed` and the pool.
        """

    def train_further(
        self,
        model: UNet,
        pool: LabelledImages,
        released: Released,
        seed: int,
        *,
        numbers: Tensor | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> LabelledImages:
        """Train the public model in place, and resume from the checkpoint; return the images of private classes that it saw.

        `numbers` [private classes] are the model's labels of the private classes; None: the same.
        """


@dataclass(frozen=True)
class OneRelease(metaclass=ABCMeta):  # not the base ABC: it is no dataclass, and the command line would not expand it
    """A warm-up with one release; subclasses define what is summed, and on which images the model is trained afterwards.

    Attributes:
        noise_multiplier: standard deviation of the released sums' noise; their sensitivity is 1.
        training: settings of the further training.
    """

    noise_multiplier: float
    training: PublicTraining

    kind: ClassVar[str]  # its name among several warm-ups, and that of its option
    what: ClassVar[str]  # what is summed, for statements
    released_as: ClassVar[type[ClassSums]] = ClassSums
    must_come_first: ClassVar[bool] = False  # whether it needs all public classes, which no other leaves

    def __post_init__(self):
        if not 0 < self.noise_multiplier < float("inf"):
            raise UserError(f"{self.kind}.noise_multiplier must be positive and finite, got {self.noise_multiplier}")
        if self.training.seed != PublicTraining.seed:
            raise UserError(f"{self.kind}.training.seed would be ignored: the seed is that of the whole run")

    @property
    def releases(self) -> tuple[Release, ...]:
        return (Release(self.what, 1.0, self.noise_multiplier, 1),)

    def pool(self, public: LabelledImages, names: Sequence[str]) -> LabelledImages:
        """Select the public images of the private classes."""
        present = {public.class_names[label] for label in public.labels.unique().tolist()}
        if missing := [name for name in names if name not in present]:
            raise UserError(f"there is no public image of class {listed(missing)} to choose")
        return only(public, names)

    def release(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> Released:
        return {self.kind: self.sums(private, pool, records, seed, noise)}

    def train_further(
        self,
        model: UNet,
        pool: LabelledImages,
        released: Released,
        seed: int,
        *,
        numbers: Tensor | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> LabelledImages:
        images = self.training_images(pool, released[self.kind], seed, progress)
        labels = images.labels if numbers is None else numbers[images.labels]
        ours = LabelledImages(images.images, labels, model.config.num_classes)
        options = {"process": self.process(model), "checkpoint": checkpoint, "progress": progress}
        pretrain(model, ours, replace(self.training, seed=seed), **options)
        return images

    @abstractmethod
    def sums(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> ClassSums:
        """Release the noisy sum of each class's embeddings."""

    @abstractmethod
    def training_images(
        self, pool: LabelledImages, released: ClassSums, seed: int, progress: bool = True
    ) -> LabelledImages:
        """Make the images of the private classes on which the model is trained."""

    def process(self, model: UNet) -> Process:
        """Choose the noise levels at which the model is trained: all levels of its own process."""
        return model.process

    def next_pool(self, pool: LabelledImages, images: LabelledImages) -> LabelledImages:
        """Choose the public images with which the next warm-up starts: the same pool."""
        return pool


@dataclass(frozen=True)
class InTurn:
    """Several warm-ups in a row, used as one: each trains the model further, on the public images that the previous one left.

    Raises:
        UserError: there is none, or one does not fit its place.
    """

    parts: tuple[OneRelease, ...]

    def __post_init__(self):
        kinds = [part.kind for part in self.parts]
        if not kinds or len(set(kinds)) < len(kinds):
            raise UserError(f"several warm-ups must be of different kinds, and at least one, got {listed(kinds)}")
        if late := [part.kind for part in self.parts[1:] if part.must_come_first]:
            raise UserError(
                f"{listed(late)} must come first: the other warm-ups leave only public images of the private classes"
            )

    @property
    def releases(self) -> tuple[Release, ...]:
        return tuple(release for part in self.parts for release in part.releases)

    def pool(self, public: LabelledImages, names: Sequence[str]) -> LabelledImages:
        return self.parts[0].pool(public, names)

    def release(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> Released:
        made = [part.release(private, pool, records, seed, noise) for part in self.parts]
        return {kind: sums for each in made for kind, sums in each.items()}

    def train_further(
        self,
        model: UNet,
        pool: LabelledImages,
        released: Released,
        seed: int,
        *,
        numbers: Tensor | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> LabelledImages:
        for part in self.parts:
            own = checkpoint and checkpoint.with_name(f"{part.kind}-{checkpoint.name}")
            options = {"numbers": numbers, "checkpoint": own, "progress": progress}
            images = part.train_further(model, pool, released, seed, **options)
            pool = part.next_pool(pool, images)
        return images


def save_released(path: Path, released: Released) -> None:
    """Write releases to `path` as safetensors, atomically."""
    tensors = {
        f"{kind}.{name}": torch.as_tensor(np.asarray(value))
        for kind, sums in released.items()
        for name, value in vars(sums).items()
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def load_released(path: Path, parts: Iterable[OneRelease]) -> Released:
    """Load the releases of warm-ups that `save_released` wrote; warm-ups that the file does not contain are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of `save_released`, or is damaged.
    """
    fields = defaultdict(dict)
    try:
        for name, tensor in load_file(path).items():
            kind, _, field = name.rpartition(".")
            fields[kind][field] = tensor if tensor.dim() else tensor.item()
        return {part.kind: part.released_as(**fields[part.kind]) for part in parts if part.kind in fields}
    except (SafetensorError, TypeError) as error:
        raise UserError(f"{path} is no release of `fastloda choose`, or is damaged: {error}") from error
