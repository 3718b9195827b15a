"""DP-LoDA: low-dimensional adapters of a public diffusion model, trained privately; the method that this package is for."""

from dataclasses import asdict, dataclass

from fastloda.adapt import attach_loda
from fastloda.data import LabelledImages
from fastloda.randomness import seeded
from fastloda.settings import Adapter

from .base import Budget, ByEpsilon, Sampler, Work
from .diffusion_model import PrivateTuning, PublicModel, tune


@dataclass(frozen=True)
class DPLoDA:
    """Attributes: the public model, the adapters, and the private training of each budget."""

    public: PublicModel
    tunings: ByEpsilon[PrivateTuning]
    adapter: Adapter = Adapter()
    name: str = "DP-LoDA"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        model = self.public.fit(public, work)
        with seeded(work.seed):  # where A starts: public, and independent of the noise
            attach_loda(model, **asdict(self.adapter))
        return tune(model, private, budget, self.tunings.at(budget.epsilon), work)
