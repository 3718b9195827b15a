"""DP-LoDA from a public model that was first improved by a release about the private images; see `warm_up`.

Samples can begin at the warm-up's images and not at noise, so that strokes hold. The release of a `PublicChoice` can be used
again: samples are moved until their means agree with it. And another part of the budget can train a classifier that labels them
(`private_labels`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fastloda.errors import UserError
from fastloda.synthesis.classify import predict
from fastloda.synthesis.data import LabelledImages

from .base import Budget, ByEpsilon, Sampler, Work
from .dp_loda import DPLoDA
from .gaussian_release import noise_stream
from .moves import UNMOVED, Reach, moved
from .private_labels import PrivateLabels
from .public_choice import PublicChoice
from .warm_up import WarmUp


@dataclass(frozen=True)
class ChosenLoDA:
    """The method DP-LoDA after a warm-up, for which the budget pays too: a choice of public images, say, or several in turn.

    `pool` returns the public images of the warm-up; None: those that the public model was trained on.
    `strength` is the share of the sampler's steps by which samples are made of the warm-up's images (see `sample`); 1: of noise.
    `samples_reach` says how far the private model's images are moved easily, to agree with the release of a `PublicChoice`.
    `labels` trains a classifier that labels them; None: they keep the labels for which they were drawn.

    Raises:
        UserError: samples are to be moved, and no warm-up releases what they could be moved toward, or strength is not in (0, 1].
    """

    loda: DPLoDA
    choice: ByEpsilon[WarmUp]
    pool: Callable[[], LabelledImages] | None = field(default=None, repr=False)
    strength: float = 1.0
    samples_reach: Reach = UNMOVED
    labels: ByEpsilon[PrivateLabels] | None = None
    name: str = "DP-LoDA on chosen data"
    trained_on: str = "its samples"
    has_budget: bool = True

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise UserError(f"{self.name}: strength must lie in (0, 1], got {self.strength}")
        kinds = [{release.what for release in choice.releases} for choice in self.choice.settings.values()]
        if self.samples_reach and not all(PublicChoice.what in what for what in kinds):
            raise UserError(
                f"{self.name}: samples_reach needs a warm-up by choice, whose release samples are moved toward"
            )

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        choice, labels = self.choice.at(budget.epsilon), self.labels and self.labels.at(budget.epsilon)
        earlier = (*choice.releases, *(labels.releases(budget.records) if labels else ()))
        model = self.loda.public.fit(public, work)
        pool = choice.pool(self.pool() if self.pool else public, private.class_names)
        released = choice.release(private, pool, budget.records, work.seed, noise_stream(work.seed))
        work.folder.mkdir(parents=True, exist_ok=True)
        options = {"checkpoint": work.folder / "further.pt", "progress": work.progress}
        images = choice.train_further(model, pool, released, work.seed, **options)
        label = self._label(labels, private, images, budget, work) if labels else None
        sampler = self.loda.adapt(model, private, budget, work, earlier=earlier)

        def draw(labels: Tensor, seed: int) -> Tensor:
            start = (
                {} if self.strength == 1 else {"varied": of_classes(images, labels, seed), "strength": self.strength}
            )
            drawn = LabelledImages(sampler.draw(labels, seed, **start).clamp(-1, 1), labels, private.num_classes)
            if not self.samples_reach:
                return drawn.images
            return moved(drawn, released[PublicChoice.kind], self.samples_reach, seed, work.progress).images

        return replace(sampler, draw=draw, label=label)

    def _label(
        self,
        labels: PrivateLabels,
        private: LabelledImages,
        images: LabelledImages,
        budget: Budget,
        work: Work,
    ) -> Callable[[Tensor], Tensor]:
        """Train the classifier, and return the function that labels images with it."""
        settings = labels.private_training(budget.records, budget.delta, work.seed, work.device)
        options = {"checkpoint": work.folder / "teacher.pt", "device": work.device, "progress": work.progress}
        return partial(predict, labels.teacher(private, images, settings, seed=work.seed, **options))


def of_classes(images: LabelledImages, labels: Tensor, seed: int) -> Tensor:
    """Take an image of each label's class, [n, C, H, W]: each class's in random order, and again when all of them are taken.

    Raises:
        UserError: there is no image of a class.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    taken = torch.empty_like(labels)
    for label in labels.unique():
        members, places = order[images.labels[order] == label], labels == label
        if not len(members):
            raise UserError(f"the warm-up drew no image of class {int(label)} to begin at: let it draw more")
        taken[places] = members[torch.arange(int(places.sum())) % len(members)]
    return images.images[taken]
