"""The public names, each imported when it is first used: see `__init__.py`."""

from .accounting.accountant import PrivacyAccountant
from .accounting.calibrate import calibrate_noise
from .accounting.compose import compose_epsilon
from .engine.criterion import CrossEntropyLoss
from .engine.engine import PrivacyEngine, make_private, make_private_with_epsilon
from .engine.loader import BatchMemoryManager
from .engine.validator import ModuleValidator
from .errors import PrivacyError
from .loda.attach import attach_loda, detach_loda, load_loda, loda_parameters, loda_state_dict, merge_loda, save_loda
from .loda.compile import compile
from .loda.layers import LoDAConv2d, LoDALinear
from .per_sample.explain import explain
from .per_sample.fallback.functional import cover
from .per_sample.fallback.register import check_rule, register_rule
from .privacy.adaptive import AdaptiveClipping
from .privacy.captured import CapturedStep
from .privacy.per_sample import per_sample_grad_norms, per_sample_grads
from .privacy.secure_noise import SecureGenerator
from .privacy.stats import StepStats
from .privacy.step import GhostClipper, ghost_dp_step
from .privacy.styles import Automatic, PerLayer
from .training.callbacks import StepReport, evaluate_every
from .training.saliency import Saliency, release_saliency
from .training.settings import PrivateTraining
from .training.trainer import DPTrainer

__version__: str
__all__ = [
    "AdaptiveClipping",
    "Automatic",
    "BatchMemoryManager",
    "CapturedStep",
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
    "Saliency",
    "SecureGenerator",
    "StepReport",
    "StepStats",
    "attach_loda",
    "calibrate_noise",
    "check_rule",
    "compile",
    "compose_epsilon",
    "cover",
    "detach_loda",
    "evaluate_every",
    "explain",
    "ghost_dp_step",
    "load_loda",
    "loda_parameters",
    "loda_state_dict",
    "make_private",
    "make_private_with_epsilon",
    "merge_loda",
    "per_sample_grad_norms",
    "per_sample_grads",
    "register_rule",
    "release_saliency",
    "save_loda",
]
