"""Class queries: which of many public classes resemble each private class, from one noisy release of votes.

The idea is PrivImage's (Li et al. 2024, https://arxiv.org/abs/2311.12850). A classifier of the public images finds the few
classes that a private image resembles most; the image votes for them in the histogram of its own class. Public images of the
classes with the most votes then get the private class's name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fastloda.errors import UserError
from fastloda.privacy.noise import NoiseSource
from fastloda.synthesis.classify import train_classifier
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion.pretrain import PublicTraining

from .gaussian_release import ClassSums, alone, release_class_sums
from .public_choice import FURTHER
from .warm_up import OneRelease


@dataclass(frozen=True)
class ClassQueries(OneRelease):
    """The settings of class queries.

    Attributes:
        noise_multiplier: standard deviation of the released votes' noise; all votes of an image together have norm 1.
        training: settings of the further training.
        votes: number of public classes that an image votes for.
        kept: number of public classes that are kept for each private class. If fewer have votes that stand out from the noise,
            the others are arbitrary.
        drawn: number of images drawn evenly from all images of these classes, for further training of the public model and for
            the next warm-up.
        classifier_steps: number of steps of the classifier's training.
    """

    noise_multiplier: float = 5.0
    training: PublicTraining = field(default_factory=lambda: FURTHER)
    votes: int = 5
    kept: int = 5
    drawn: int = 20_000
    classifier_steps: int = 1000

    kind: ClassVar[str] = "queries"
    what: ClassVar[str] = "votes for public classes"
    must_come_first: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if min(self.votes, self.kept, self.drawn, self.classifier_steps) < 1:
            raise UserError(f"queries needs votes, kept, drawn and classifier_steps >= 1; got {self}")

    def pool(self, public: LabelledImages, names: Sequence[str]) -> LabelledImages:
        """Take all public images, whatever the names of their classes."""
        present = len(public.labels.unique())
        if present <= max(self.votes, self.kept):
            raise UserError(
                f"queries need more public classes than the {max(self.votes, self.kept)} of queries.votes and queries.kept; the "
                f"public images have {present}"
            )
        return public

    def sums(
        self, private: LabelledImages, pool: LabelledImages, records: int, seed: int, noise: NoiseSource
    ) -> ClassSums:
        """Release the noisy votes of each class, [private classes, public classes].

        Each vote of an image is 1 / sqrt(votes), so that all of them together have norm 1, and goes to the histogram of its own
        class: the sensitivity is 1.
        """
        train = {"steps": self.classifier_steps, "augment": "none", "seed": seed, "progress": False}
        classifier = train_classifier(pool, **train)
        logits = alone(classifier, private.images)
        votes = torch.zeros_like(logits).scatter_(1, logits.topk(self.votes).indices, 1 / math.sqrt(self.votes))
        votes[~logits.isfinite().all(1)] = 0.0  # an image with numbers that are not finite has no votes
        what = (self.what, votes, private.labels, private.num_classes)
        released, _ = release_class_sums(*what, self.noise_multiplier, noise)
        return ClassSums(released, self.noise_multiplier, records)

    def training_images(
        self, pool: LabelledImages, released: ClassSums, seed: int, progress: bool = True
    ) -> LabelledImages:
        """Draw `drawn` images with replacement, equally many for each private class, evenly from all images that it keeps."""
        generator, classes = torch.Generator().manual_seed(seed), len(released.sums)
        present = pool.labels.bincount(minlength=pool.num_classes) > 0
        kept = released.sums.where(present, -math.inf).topk(self.kept).indices
        members = [torch.isin(pool.labels, own).nonzero()[:, 0] for own in kept]
        count = -(-self.drawn // classes)
        rows = torch.cat([own[torch.randint(len(own), (count,), generator=generator)] for own in members])
        return LabelledImages(pool[rows].images, torch.arange(classes).repeat_interleave(count), classes)

    def next_pool(self, pool: LabelledImages, images: LabelledImages) -> LabelledImages:
        """Let the next warm-up start from the images drawn, which have the private classes."""
        return images
