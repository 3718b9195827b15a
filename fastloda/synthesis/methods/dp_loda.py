"""DP-LoDA: low-dimensional adapters of a public diffusion model, trained privately; the method for which this package is made.

The variants to compare are settings: adapters on all layers; on attention alone, by the adapter's targets; and on chosen layers,
or as many random ones, by `LayerChoice`.
"""

from dataclasses import dataclass

from fastloda.randomness import seeded
from fastloda.synthesis.data import LabelledImages
from fastloda.synthesis.diffusion import UNet
from fastloda.synthesis.settings import Adapter

from .base import Budget, ByEpsilon, Release, Sampler, Work
from .diffusion_model import ALL_LAYERS, PrivateTuning, PublicModel, tune
from .layer_choice import LayerChoice


@dataclass(frozen=True)
class DPLoDA:
    """The method DP-LoDA, with the public model, the adapters, and the settings of private training for each budget.

    `layers` chooses among the layers that `adapter` names; the budget pays for the choice.
    """

    public: PublicModel
    tunings: ByEpsilon[PrivateTuning]
    adapter: Adapter = Adapter()
    layers: ByEpsilon[LayerChoice] = ByEpsilon({1.0: ALL_LAYERS})
    name: str = "DP-LoDA"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        return self.adapt(self.public.fit(public, work), private, budget, work)

    def adapt(
        self, model: UNet, private: LabelledImages, budget: Budget, work: Work, earlier: tuple[Release, ...] = ()
    ) -> Sampler:
        """Attach adapters to a public model and train them; `earlier` are releases that the budget covers too."""
        with seeded(work.seed):  # seeds A's initial values, which are public and independent of the noise
            self.adapter.attach(model)
        options = {"earlier": earlier, "layers": self.layers.at(budget.epsilon)}
        return tune(model, private, budget, self.tunings.at(budget.epsilon), work, **options)
