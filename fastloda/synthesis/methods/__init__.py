"""The methods that the paper compares; each has `fit(private, public, budget, work)`, see `base.py`.

A method of your own becomes a row of a table by `fastloda reproduce digits --methods DP-LoDA,my_module:Prototypes`:

    @dataclass(frozen=True)
    class Prototypes:
        name, trained_on, has_budget = "Prototypes", "its samples", True  # the row, and a column for each epsilon

        def fit(self, private, public, budget, work):
            # releases the noisy sum of each class's images, and draws a class's mean again and again
            noise = calibrate_noise(budget.epsilon, budget.delta, sample_rate=1.0, steps=1)
            sums = torch.zeros(private.num_classes, *private.images.shape[1:]).index_add(0, private.labels, private.images[:])
            bound = sums[0].numel() ** 0.5  # of one image's norm: pixels lie in [-1, 1]
            noisy = sums + noise * bound * torch.randn(sums.shape, generator=torch.Generator().manual_seed(work.seed))
            means = noisy * private.num_classes / budget.records  # the nominal number of records is public, classes' are not
            spent = Spent(budget.delta, (Release("class sums", 1.0, noise, 1),))
            return Sampler(lambda labels, seed: means[labels], private.num_classes, spent)
"""

from .autoencoder import AutoencoderTraining
from .base import Budget, ByEpsilon, Method, PrivateClassifier, Release, Sampler, Spent, Work
from .central_images import CentralImages
from .chosen_loda import ChosenLoDA
from .class_queries import ClassQueries
from .diffusion_model import PrivateTuning, PublicModel
from .dp_diffusion import DPDiffusion
from .dp_ldm import DPLDM
from .dp_loda import DPLoDA
from .dp_mepf import DPMEPF
from .dp_merf import DPMERF
from .dp_sgd import Direct, DirectDPSGD
from .layer_choice import LayerChoice
from .moves import Reach
from .no_dp import NoDP
from .private_evolution import Evolution, PrivateEvolution
from .private_labels import PrivateLabels
from .public_choice import PublicChoice
from .public_only import PublicOnly
from .warm_up import InTurn, WarmUp

__all__ = [
    "AutoencoderTraining",
    "Budget",
    "ByEpsilon",
    "CentralImages",
    "ChosenLoDA",
    "ClassQueries",
    "DPDiffusion",
    "DPLDM",
    "DPLoDA",
    "DPMEPF",
    "DPMERF",
    "Direct",
    "DirectDPSGD",
    "Evolution",
    "InTurn",
    "LayerChoice",
    "Method",
    "NoDP",
    "PrivateClassifier",
    "PrivateEvolution",
    "PrivateLabels",
    "PrivateTuning",
    "PublicChoice",
    "PublicModel",
    "PublicOnly",
    "Reach",
    "Release",
    "Sampler",
    "Spent",
    "WarmUp",
    "Work",
]
