"""DP-SGD: the classifier itself trained privately on the private images, without public data (De et al. 2022)."""

from dataclasses import dataclass, replace

from fastloda.synthesis.baselines.dpsgd import DPSGD, train_dpsgd
from fastloda.synthesis.budget import CHECKPOINT, Privacy, private_training
from fastloda.synthesis.data import LabelledImages

from .base import Budget, ByEpsilon, PrivateClassifier, Release, Spent, Work
from .cost import step_cost


@dataclass(frozen=True)
class Direct:
    """One private run of a classifier.

    Attributes:
        training: network, augmentation and optimization.
        steps, batch_size: of DP training.
        views: augmented copies a record and step, whose gradients are averaged before clipping.
        max_grad_norm: the clipping bound.
    """

    training: DPSGD
    steps: int = 250
    batch_size: int = 256
    views: int = 4
    max_grad_norm: float = 1.0

    def privacy(self, budget: Budget) -> Privacy:
        return budget.in_steps(self.steps, self.batch_size, max_grad_norm=self.max_grad_norm, views=self.views)


@dataclass(frozen=True)
class DirectDPSGD:
    """Attributes: the private run of each budget."""

    runs: ByEpsilon[Direct]
    name: str = "DP-SGD"
    trained_on: str = "the private images, by DP-SGD"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> PrivateClassifier:
        direct = self.runs.at(budget.epsilon)
        training = replace(direct.training, seed=work.seed)
        fixed_shape = work.device.type != "cpu"
        settings = private_training(direct.privacy(budget), fixed_shape=fixed_shape, **training.optimization())
        work.folder.mkdir(parents=True, exist_ok=True)
        options = {"device": work.device, "checkpoint": work.folder / CHECKPOINT, "progress": work.progress}
        network, trainer = train_dpsgd(private, settings, training, **options)
        release = Release("clipped gradients", settings.sample_rate, settings.noise_multiplier, trainer.step)
        cost = step_cost(trainer, (private.images[:], private.labels))
        return PrivateClassifier(network, Spent(budget.delta, (release,)), cost)
