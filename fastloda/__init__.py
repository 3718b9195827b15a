"""FastLoDA: differentially private fine-tuning of convolutional models at almost no extra cost."""

from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.calibrate import calibrate_noise
from fastloda.accounting.compose import compose_epsilon
from fastloda.engine.criterion import CrossEntropyLoss
from fastloda.engine.engine import PrivacyEngine, make_private, make_private_with_epsilon
from fastloda.engine.loader import BatchMemoryManager
from fastloda.engine.validator import ModuleValidator
from fastloda.errors import PrivacyError
from fastloda.loda.attach import attach_loda, load_loda, loda_parameters, loda_state_dict, save_loda
from fastloda.loda.compile import compile
from fastloda.loda.layers import LoDAConv2d, LoDALinear
from fastloda.per_sample.explain import explain
from fastloda.per_sample.fallback.functional import cover
from fastloda.per_sample.fallback.register import check_rule, register_rule
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.clip import Automatic, PerLayer
from fastloda.privacy.per_sample import per_sample_grad_norms, per_sample_grads
from fastloda.privacy.secure_noise import SecureGenerator
from fastloda.privacy.step import GhostClipper, StepStats, ghost_dp_step
from fastloda.training.trainer import DPTrainer, PrivateTraining

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
