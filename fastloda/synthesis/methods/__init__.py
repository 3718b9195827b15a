"""The methods that the paper compares, each `fit(private, public, budget, work)`; see `base.py`."""

from .autoencoder import AutoencoderTraining
from .base import Budget, ByEpsilon, Method, PrivateClassifier, Release, Sampler, Spent, Work
from .chosen_loda import ChosenLoDA
from .diffusion_model import PrivateTuning, PublicModel
from .dp_diffusion import DPDiffusion
from .dp_ldm import DPLDM
from .dp_loda import DPLoDA
from .dp_mepf import DPMEPF
from .dp_merf import DPMERF
from .dp_sgd import Direct, DirectDPSGD
from .no_dp import NoDP
from .public_choice import PublicChoice
from .public_only import PublicOnly

__all__ = [
    "AutoencoderTraining",
    "Budget",
    "ByEpsilon",
    "ChosenLoDA",
    "DPDiffusion",
    "DPLDM",
    "DPLoDA",
    "DPMEPF",
    "DPMERF",
    "Direct",
    "DirectDPSGD",
    "Method",
    "NoDP",
    "PrivateClassifier",
    "PrivateTuning",
    "PublicChoice",
    "PublicModel",
    "PublicOnly",
    "Release",
    "Sampler",
    "Spent",
    "Work",
]
