"""FastLoDA: differentially private fine-tuning of convolutional models at almost no extra cost."""

from fastloda.accountant import PrivacyAccountant, calibrate_noise, compose_epsilon
from fastloda.adapt import attach_loda, load_loda, loda_parameters, loda_state_dict, save_loda
from fastloda.errors import PrivacyError
from fastloda.layers import LoDAConv2d, LoDALinear
from fastloda.step import GhostClipper, StepStats, ghost_dp_step, per_sample_grad_norms
from fastloda.trainer import DPTrainer, PrivateTraining

__version__ = "0.1.0"
__all__ = [
    "DPTrainer",
    "GhostClipper",
    "LoDAConv2d",
    "LoDALinear",
    "PrivacyAccountant",
    "PrivacyError",
    "PrivateTraining",
    "StepStats",
    "attach_loda",
    "calibrate_noise",
    "compose_epsilon",
    "ghost_dp_step",
    "load_loda",
    "loda_parameters",
    "loda_state_dict",
    "per_sample_grad_norms",
    "save_loda",
]
