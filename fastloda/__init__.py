"""FastLoDA: differentially private fine-tuning of convolutional models at almost no extra cost."""

from fastloda.accountant import PrivacyAccountant, calibrate_noise, compose_epsilon
from fastloda.adapt import attach_loda, load_loda, loda_parameters, loda_state_dict, save_loda
from fastloda.adaptive import AdaptiveClipping
from fastloda.clip import Automatic, PerLayer
from fastloda.compiled import compile
from fastloda.criterion import CrossEntropyLoss
from fastloda.errors import PrivacyError
from fastloda.explain import explain
from fastloda.functional import cover
from fastloda.layers import LoDAConv2d, LoDALinear
from fastloda.make_private import PrivacyEngine, make_private, make_private_with_epsilon
from fastloda.module_validator import ModuleValidator
from fastloda.per_sample import per_sample_grads
from fastloda.private_loader import BatchMemoryManager
from fastloda.register import check_rule, register_rule
from fastloda.secure import SecureGenerator
from fastloda.step import GhostClipper, StepStats, ghost_dp_step, per_sample_grad_norms
from fastloda.trainer import DPTrainer, PrivateTraining

__version__ = "0.1.0"
__all__ = [
    "AdaptiveClipping",
    "Automatic",
    "BatchMemoryManager",
    "CrossEntropyLoss",
    "DPTrainer",
    "GhostClipper",
    "LoDAConv2d",
    "LoDALinear",
    "ModuleValidator",
    "PerLayer",
    "PrivacyAccountant",
    "PrivacyEngine",
    "PrivacyError",
    "PrivateTraining",
    "SecureGenerator",
    "StepStats",
    "attach_loda",
    "calibrate_noise",
    "check_rule",
    "compile",
    "compose_epsilon",
    "cover",
    "explain",
    "ghost_dp_step",
    "load_loda",
    "loda_parameters",
    "loda_state_dict",
    "make_private",
    "make_private_with_epsilon",
    "per_sample_grad_norms",
    "per_sample_grads",
    "register_rule",
    "save_loda",
]
