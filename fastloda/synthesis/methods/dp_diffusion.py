"""DP-Diffusion (Ghalebikesabi et al. 2023, https://arxiv.org/abs/2302.13861): all of a public diffusion model, tuned privately.

The gradients of several noise draws per image are averaged before clipping, timesteps come from a mixture that favours the
middle, and the weights averaged over the steps draw the samples. DP-LoDA's savings are measured against this method.
"""

from dataclasses import dataclass

from fastloda.synthesis.data import LabelledImages

from .base import Budget, ByEpsilon, Sampler, Work
from .diffusion_model import PrivateTuning, PublicModel, tune

# The mixture for CIFAR-10 in the paper's appendix: (first, end, share).
TIME_WEIGHTS = ((0, 30, 0.015), (30, 600, 0.785), (600, 1000, 0.2))


@dataclass(frozen=True)
class DPDiffusion:
    """The method DP-Diffusion, with the public model, and the settings of private training for each budget."""

    public: PublicModel
    tunings: ByEpsilon[PrivateTuning]
    name: str = "DP-Diffusion"
    trained_on: str = "its samples"
    has_budget: bool = True

    def fit(self, private: LabelledImages, public: LabelledImages, budget: Budget, work: Work) -> Sampler:
        model = self.public.fit(public, work).requires_grad_(True)
        return tune(model, private, budget, self.tunings.at(budget.epsilon), work)
