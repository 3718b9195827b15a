"""Types that all compared methods share: a budget to keep, a place to work in, and a result that states what was spent.

A method has `fit(private, public, budget, work) -> Sampler or PrivateClassifier`. Nothing that a result can do depends on the
private records except through the releases that its `spent` lists.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from fastloda.accounting.compose import compose_epsilon
from fastloda.errors import UserError
from fastloda.synthesis.budget import Privacy, check_delta
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import class_balanced_labels
from fastloda.training.trainer import DPTrainer

from .cost import StepCost

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """A budget of (epsilon, delta)-differential privacy for adding or removing one record; all of it is public.

    Attributes:
        epsilon: upper bound on what a method may spend.
        delta: probability with which the bound may fail; below 1 / records.
        records: the public, nominal number of records, from which sample rates follow.
    """

    epsilon: float
    delta: float
    records: int

    def __post_init__(self):
        if not 0 < self.epsilon < float("inf"):
            raise UserError(f"epsilon must be positive and finite, got {self.epsilon}")
        check_delta("delta", self.delta, self.records)

    def in_steps(self, steps: int, batch_size: int, **promise) -> Privacy:
        """Make the promise of a DP-SGD run that spends all of the budget; `promise` are further fields of `Privacy`."""
        return Privacy.for_steps(
            steps, batch_size, self.records, target_epsilon=self.epsilon, delta=self.delta, **promise
        )


class Release(NamedTuple):
    """A series of `steps` Gaussian releases on Poisson samples; noise_multiplier is standard deviation / sensitivity."""

    what: str
    sample_rate: float
    noise_multiplier: float
    steps: int

    @classmethod
    def of(cls, trainer: DPTrainer) -> Self:
        """Describe what a private run released."""
        return cls("clipped gradients", *trainer.accountant.mechanism(trainer.step))


@dataclass(frozen=True)
class Spent:
    """All releases about the private records. Epsilon is 0 without a release, and infinite with a release without noise."""

    delta: float
    releases: tuple[Release, ...] = ()

    @cached_property
    def epsilon(self) -> float:
        """The upper bound on epsilon of all releases together, composed jointly."""
        return compose_epsilon([release[1:] for release in self.releases], self.delta) if self.releases else 0.0

    def to_dict(self) -> dict:
        """Convert to JSON values; an infinite epsilon becomes null."""
        epsilon = self.epsilon if self.epsilon < float("inf") else None
        return {"epsilon": epsilon, "delta": self.delta, "releases": [release._asdict() for release in self.releases]}


@dataclass(frozen=True)
class Work:
    """Where and how a method works.

    Attributes:
        folder: folder of this method alone, for checkpoints, from which an interrupted fit resumes. It must stay private.
        public_folder: folder for models of public data, which several methods share.
        seed: seed of everything random; since a number can be foreseen, it makes the run an experiment.
        device: device to compute on.
        progress: whether to show progress: bars on a terminal, elsewhere a line now and then.
        public_seed: seed of the models of public data; default: `seed`. If it is given, all seeds share these models.
    """

    folder: Path
    public_folder: Path
    seed: int
    device: torch.device
    progress: bool = True
    public_seed: int | None = None

    def __post_init__(self):
        if self.public_seed is None:
            object.__setattr__(self, "public_seed", self.seed)


@dataclass(frozen=True)
class Sampler:
    """A sampler of synthetic images.

    Attributes:
        draw: function draw(labels, seed) that returns float32 images [n, C, H, W] in [-1, 1] on the CPU.
        num_classes: number of classes, labels 0 .. num_classes - 1.
        spent: what was released about the private records.
        cost: a private step's time and memory, if there were such steps.
        loss: function that returns the mean diffusion loss on images, for a diffusion model of pixels.
        label: function that labels drawn images; None: their labels are those for which they were drawn.
    """

    draw: Callable[[Tensor, int], Tensor]
    num_classes: int
    spent: Spent
    cost: StepCost | None = None
    loss: Callable[[LabelledImages], float] | None = None
    label: Callable[[Tensor], Tensor] | None = None

    def images(self, count: int, seed: int) -> LabelledImages:
        """Draw `count` synthetic images, for equal numbers of each class to within one."""
        labels = class_balanced_labels(count, self.num_classes)
        images = self.draw(labels, seed).clamp(-1, 1)
        return LabelledImages(images, self.label(images) if self.label else labels, self.num_classes)


@dataclass(frozen=True)
class PrivateClassifier:
    """A classifier trained on the private records themselves."""

    network: nn.Module
    spent: Spent
    cost: StepCost | None = None


@dataclass(frozen=True)
class ByEpsilon(Generic[T]):
    """Settings by budget: `at` takes those of the largest known epsilon that is not above the budget's, or else the smallest."""

    settings: Mapping[float, T]

    def at(self, epsilon: float) -> T:
        fitting = [known for known in self.settings if known <= epsilon]
        return self.settings[max(fitting) if fitting else min(self.settings)]


def at_budget(settings: T, epsilon: float) -> T:
    """Keep only the settings of this budget in each `ByEpsilon` that a dataclass, or one nested in it, contains."""
    if isinstance(settings, ByEpsilon):
        return ByEpsilon({epsilon: at_budget(settings.at(epsilon), epsilon)})
    if not is_dataclass(settings) or isinstance(settings, type):
        return settings
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    kept = {name: at_budget(value, epsilon) for name, value in values.items()}
    changed = {name: value for name, value in kept.items() if value is not values[name]}
    return replace(settings, **changed) if changed else settings


class Method(Protocol):
    """A compared method, which is one row of a table."""

    name: str
    trained_on: str  # training data of the classifier that is tested
    has_budget: bool  # whether its result depends on epsilon

    def fit(
        self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work
    ) -> Sampler | PrivateClassifier: ...
