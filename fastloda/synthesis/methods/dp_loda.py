"""DP-LoDA: low-dimensional adapters of a public diffusion model, trained privately; the method that this package is for."""

from dataclasses import dataclass

from fastloda.randomness import seeded
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNet
from fastloda.synthesis.settings import Adapter

from .base import Budget, ByEpsilon, Release, Sampler, Work
from .diffusion_model import PrivateTuning, PublicModel, tune


@dataclass(frozen=True)
class DPLoDA:
    """The method DP-LoDA, with the public model, the adapters, and the settings of private training for each budget."""

    public: PublicModel
    tunings: ByEpsilon[PrivateTuning]
    adapter: Adapter = Adapter()
    name: str = "DP-LoDA"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        return self.adapt(self.public.fit(public, work), private, budget, work)

    def adapt(
        self, model: UNet, private: LabelledImages, budget: Budget, work: Work, earlier: tuple[Release, ...] = ()
    ) -> Sampler:
        """Attach adapters to a public model and train them; `earlier` are releases that the budget covers too."""
        with seeded(work.seed):  # the seed of A's initial values, which is public and independent of the noise
            self.adapter.attach(model)
        return tune(model, private, budget, self.tunings.at(budget.epsilon), work, earlier=earlier)
