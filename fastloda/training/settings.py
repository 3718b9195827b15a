"""The settings of a private run."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch

from fastloda.accounting.accountant import PrivacyAccountant
from fastloda.accounting.calibrate import calibrate_noise
from fastloda.errors import UserError
from fastloda.privacy.clip import Clipping, clipping_style
from fastloda.privacy.styles import check_max_grad_norm
from fastloda.training.sampling import cyclic_rate
from fastloda.training.schedules import Schedule

FAR = 20  # factor from sample_rate x samples, either way, beyond which expected_batch_size is taken for a mistake


@dataclass(frozen=True)
class PrivateTraining:
    """The settings of a private run. All are public: none may be computed from the private records.

    A sample is a record; or, where `DPTrainer` is given owners, an owner with at most `per_owner` records.

    Attributes:
        sample_rate: probability that a sample enters a step's batch.
        expected_batch_size: sample_rate x the public number of samples, over all ranks; the divisor of the clipped sum.
        steps: number of noisy optimizer steps, empty batches included.
        delta: the delta for which epsilon is reported.
        noise_multiplier: standard deviation of the noise divided by max_grad_norm; 0 trains without privacy. With adaptive
            clipping, the noise multiplier that both releases of a step together cost (`fastloda.privacy.adaptive`). None, with
            a target_epsilon, becomes the least with which all steps keep it (`calibrate_noise`; 1 to 20 s, less if asked before).
        target_epsilon: bound on epsilon before which training stops; None trains for `steps`.
        max_grad_norm: L2 bound on a sample's contribution; with adaptive clipping, its first value.
        clipping: style of clipping: "flat", "automatic", "per_layer", "adaptive", or a style object, as in `GhostClipper`.
        bands: number of consecutive steps over which the noise is correlated, so that much of it cancels
            (`privacy/correlated.py`); each record may then enter one of them only, `bands` times as likely. 1: independent noise.
            More than 1 can pay if there are many steps at a small sample rate. Raise Adam's learning rate then, for it divides by
            the noise of one step, which is larger: on the digits of `fastloda reproduce`, twofold for 4 bands.
        views: number of noise levels or augmentations per record, averaged before clipping.
        per_owner: number of rows of an owner in a step, averaged before clipping: different records, if the owner has that many.
        micro_batch_size: number of samples in a rank's memory at a time; the logical batch does not depend on it.
        fixed_shape: whether to pad the last micro-batch with masked samples, so that shapes never vary; then a
            step on a CUDA GPU is one graph (`CapturedStep`), unless losses() allows none.
        optimizer, learning_rate, weight_decay, momentum, betas: arguments as in torch.optim (momentum of SGD, betas of Adam).
        warmup: number of steps of linear warm-up.
        schedule: learning rate after the warm-up: "constant", or "cosine", which ends at zero.
        ema_decay: decay of the moving average of the parameters; 0 averages nothing.
        seed: seed of sampling and noise. None, the default, takes both from the operating system; a number makes a run that
            can be repeated, and whose noise can be foreseen: for experiments only.
        secure_noise: whether noise comes from a cryptographically secure generator (`SecureGenerator`, which states its
            cost). It can't be repeated, so seed must be None, and steps that a crash took after the last checkpoint are
            charged and lost.
        earlier: releases about the same records (or owners, counted as owners) before this run, as `compose_epsilon` takes
            them; epsilon and target_epsilon cover them too.
    """

    sample_rate: float
    expected_batch_size: float
    steps: int
    delta: float
    noise_multiplier: float = cast(float, None)  # until __post_init__ has computed it
    target_epsilon: float | None = None
    max_grad_norm: float = 1.0
    views: int = 1
    per_owner: int = 1
    micro_batch_size: int = 256
    fixed_shape: bool = True
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    schedule: Schedule = "constant"
    ema_decay: float = 0.0
    seed: int | None = None
    clipping: Clipping = "flat"
    bands: int = 1
    secure_noise: bool = False
    earlier: tuple[tuple[float, float, int], ...] = ()

    def __post_init__(self):
        check_max_grad_norm(self.max_grad_norm)
        for name in ("steps", "views", "per_owner", "micro_batch_size", "bands"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be an integer >= 1, got {value!r}")
        cyclic_rate(self.sample_rate, self.bands)
        for name in ("expected_batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), got {self.ema_decay!r}")
        if not 0 <= self.warmup <= self.steps:
            raise UserError(f"warmup must be between 0 and steps={self.steps}, got {self.warmup!r}")
        if self.optimizer not in OPTIMIZERS or self.schedule not in ("constant", "cosine"):
            raise UserError(f"unknown optimizer {self.optimizer!r} or schedule {self.schedule!r}")
        if self.target_epsilon is not None and not self.target_epsilon > 0:
            raise UserError(f"target_epsilon must be positive, got {self.target_epsilon!r}")
        if self.secure_noise and self.seed is not None:
            raise UserError(f"secure_noise can't be seeded: seed must be None, got {self.seed!r}")
        if self.noise_multiplier is None:
            object.__setattr__(self, "noise_multiplier", self._calibrated())
        self.accountant().epsilon_rdp(self.delta, 1)  # checks all that it takes
        clipping_style(self.clipping).gradient_noise(self.noise_multiplier, self.expected_batch_size)

    def _calibrated(self) -> float:
        """Compute the least noise with which all steps, and what was released earlier, stay within target_epsilon."""
        if self.target_epsilon is None:
            raise UserError("give noise_multiplier, or the target_epsilon from which it is computed")
        rounds = -(-self.steps // self.bands)
        rate = cyclic_rate(self.sample_rate, self.bands)
        return calibrate_noise(self.target_epsilon, self.delta, rate, rounds, self.earlier)

    def check_units(self, units: int, unit: str) -> None:
        """Refuse an expected_batch_size far from sample_rate x units; below one expected unit, far from 1."""
        sampled = max(1.0, self.sample_rate * units)
        if not sampled / FAR <= self.expected_batch_size <= sampled * FAR:
            raise UserError(
                f"expected_batch_size must be sample_rate x {unit}s, {self.sample_rate:g} x {units} = "
                f"{self.sample_rate * units:g}, got {self.expected_batch_size:g}: it divides the clipped sum"
            )

    def accountant(self) -> PrivacyAccountant:
        """Make the accountant of a run with these settings, at its start."""
        rate = cyclic_rate(self.sample_rate, self.bands)
        return PrivacyAccountant(rate, self.noise_multiplier, earlier=self.earlier, bands=self.bands)


OPTIMIZERS = {
    "sgd": lambda params, c: torch.optim.SGD(params, c.learning_rate, momentum=c.momentum, weight_decay=c.weight_decay),
    "adam": lambda params, c: torch.optim.Adam(params, c.learning_rate, c.betas, weight_decay=c.weight_decay),
    "adamw": lambda params, c: torch.optim.AdamW(params, c.learning_rate, c.betas, weight_decay=c.weight_decay),
}
