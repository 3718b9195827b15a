"""Public only: samples of the public model, which show what private data add."""

from dataclasses import dataclass

from fastloda.synthesis.data import LabelledImages

from .base import Budget, Sampler, Spent, Work
from .diffusion_model import PrivateTuning, PublicModel, sampler


@dataclass(frozen=True)
class PublicOnly:
    """The method that samples the public model, with its settings."""

    public: PublicModel
    sampling: PrivateTuning = PrivateTuning()
    name: str = "Public only"
    trained_on: str = "samples of the public model"
    has_budget: bool = False

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        model = self.public.fit(public, work)
        return sampler(model, self.sampling, public.num_classes, Spent(budget.delta), work)
