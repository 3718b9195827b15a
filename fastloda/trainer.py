"""Private training, top to bottom: Poisson sampling, micro-batches, the private step, EMA, budget, checkpoints."""

import math
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from fastloda.accountant import PrivacyAccountant
from fastloda.average import Average, copy_into
from fastloda.checkpoint import CheckpointError, fingerprint, load_checkpoint, save_checkpoint
from fastloda.clip import check_max_grad_norm
from fastloda.coverage import check_optimizer
from fastloda.errors import PrivacyError
from fastloda.randomness import generator_states, make_generators, restore_generators
from fastloda.sampling import micro_batches, poisson_sample
from fastloda.schedules import Schedule, warmup_then
from fastloda.step import GhostClipper, StepStats

# losses(model, batch, generator) -> one number per sample and view, [n * views], sample-major
Losses = Callable[[nn.Module, Sequence[Tensor], Generator], Tensor]

CURVE_POINTS = 64  # of the epsilon shown while training; between them the next larger one is shown


@dataclass(frozen=True)
class PrivateTraining:
    """Settings of a private run. All are public: none may be computed from the private records.

    Attributes:
        sample_rate: probability that a record enters a step's batch.
        expected_batch_size: sample_rate x the public count of records; the divisor of the clipped sum.
        steps: optimizer steps, noisy ones, empty batches included.
        noise_multiplier: standard deviation of the noise over max_grad_norm; 0 trains without privacy.
        delta: at which epsilon is reported.
        target_epsilon: training stops before epsilon would exceed it; None: after `steps`.
        max_grad_norm: L2 bound on a sample's contribution.
        views: noise levels / augmentations per sample, averaged before clipping.
        micro_batch_size: samples in memory at a time; the logical batch does not depend on it.
        fixed_shape: pad the last micro-batch with masked records, so that shapes never vary.
        optimizer, learning_rate, weight_decay, momentum (SGD), betas (Adam): as in torch.optim.
        warmup: steps of linear warm-up; schedule: what follows, down to zero for "cosine".
        ema_decay: of the average of the parameters, by step; 0 averages nothing.
        seed: of sampling and noise. None, the default, takes both from the operating system; a number makes a run that can be
            repeated, and whose noise can be foreseen: for experiments only.
    """

    sample_rate: float
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    delta: float
    target_epsilon: float | None = None
    max_grad_norm: float = 1.0
    views: int = 1
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

    def __post_init__(self):
        check_max_grad_norm(self.max_grad_norm)
        for name in ("steps", "views", "micro_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name in ("expected_batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay!r}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be between 0 and steps={self.steps}, got {self.warmup!r}")
        if self.optimizer not in OPTIMIZERS or self.schedule not in ("constant", "cosine"):
            raise ValueError(f"unknown optimizer {self.optimizer!r} or schedule {self.schedule!r}")
        if self.target_epsilon is not None and not self.target_epsilon > 0:
            raise ValueError(f"target_epsilon must be positive, got {self.target_epsilon!r}")
        PrivacyAccountant(self.sample_rate, self.noise_multiplier).epsilon_rdp(self.delta, 1)  # checks all three


OPTIMIZERS = {
    "sgd": lambda params, c: torch.optim.SGD(params, c.learning_rate, momentum=c.momentum, weight_decay=c.weight_decay),
    "adam": lambda params, c: torch.optim.Adam(params, c.learning_rate, c.betas, weight_decay=c.weight_decay),
    "adamw": lambda params, c: torch.optim.AdamW(params, c.learning_rate, c.betas, weight_decay=c.weight_decay),
}


class DPTrainer:
    """Trains a model's trainable parameters on private records under (epsilon, delta)-DP, add/remove adjacency.

    >>> settings = PrivateTraining(sample_rate=0.1, expected_batch_size=100, steps=50, noise_multiplier=2.0, delta=1e-5)
    >>> trainer = DPTrainer(model, (images, labels), losses, settings, checkpoint="run/private.pt")
    >>> trainer.fit()                  # continues from the checkpoint if there is one
    >>> trainer.epsilon()              # what was spent

    A run stops before `target_epsilon` is exceeded. Its checkpoint holds the parameters, optimizer, average, every random
    generator and the accountant's record; a killed run resumes bit for bit, so that a step taken again is the very same
    release, neither lost nor paid twice. Keep the checkpoint private: it holds the noise generator's state. What the
    progress bar shows (loss, clipped fraction) depends on private data without noise: it is for the operator's eyes and
    is written nowhere.

    Args:
        model: with some trainable parameters, each covered by a rule.
        data: tensors with one record per row, or a map-style Dataset.
        losses: (model, batch, generator) -> [n * views] losses. Its randomness must come from `generator` or torch's global one.
        settings: see PrivateTraining.
        checkpoint: file to save to and resume from; None keeps nothing.
        checkpoint_every: steps between saves.
        progress: show the bar.

    Raises:
        ValueError, PrivacyError: before anything is changed, with the reason.
        CheckpointError: the checkpoint is damaged, or of another model or other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Tensor] | Dataset,
        losses: Losses,
        settings: PrivateTraining,
        *,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 50,
        progress: bool = True,
    ):
        self.model, self.losses, self.settings, self.progress = model, losses, settings, progress
        self.records, self._fetch = _open_data(data)
        self.clipper = GhostClipper(model, settings.max_grad_norm, settings.views)
        self.parameters = self.clipper.parameters
        self.optimizer = OPTIMIZERS[settings.optimizer](list(self.parameters.values()), settings)
        check_optimizer(self.optimizer, self.parameters)
        self.schedule = warmup_then(self.optimizer, settings.schedule, settings.steps, settings.warmup)
        self.average = Average(self.parameters, settings.ema_decay)
        self.accountant = PrivacyAccountant(settings.sample_rate, settings.noise_multiplier)
        self._device = next(iter(self.parameters.values())).device
        streams = {"sampling": "cpu", "losses": self._device, "noise": self._device}
        self._generators = make_generators(streams, settings.seed)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self._fingerprint = fingerprint(model)
        if self.checkpoint and self.checkpoint.exists():
            self._resume()

    @property
    def step(self) -> int:
        """Private steps taken."""
        return self.accountant.steps

    def epsilon(self) -> float:
        """What has been spent, at the settings' delta: an upper bound."""
        return self.accountant.epsilon(self.settings.delta)

    def fit(self) -> "DPTrainer":
        """Train to the end of the steps or of the budget, whichever comes first."""
        last = self.last_step
        epsilons = self._epsilon_by_step(last)
        with tqdm(total=last, initial=self.step, desc="private", unit="step", disable=not self.progress) as bar:
            while self.step < last:
                stats = self.train_step()
                spent = epsilons(self.step)
                bar.set_postfix_str(
                    f"loss {stats.mean_loss:.4f}, clipped {stats.clipped_fraction:.0%}, epsilon {spent:.2f}"
                )
                bar.update()
                if self.step % self.checkpoint_every == 0 or self.step == last:
                    self.save()
        return self

    def train_step(self) -> StepStats:
        """One private step over one Poisson batch, which may be empty: it is noised and counted all the same.

        Raises:
            PrivacyError: the steps, or the budget, are spent.
        """
        settings = self.settings
        if self.step >= self.last_step:
            raise PrivacyError(f"all {self.last_step} private steps are taken, or the budget is spent: no step is left")
        indices = poisson_sample(self.records, settings.sample_rate, self._generators["sampling"])
        stats = StepStats(torch.zeros(4, dtype=torch.float64))
        for chosen, mask in micro_batches(indices, settings.micro_batch_size, settings.fixed_shape):
            batch = [t.to(self._device) for t in self._fetch(chosen)]
            losses = self.losses(self.model, batch, self._generators["losses"])
            if len(losses) != len(chosen) * settings.views:
                raise ValueError(
                    f"losses() gave {len(losses)} numbers for {len(chosen)} samples x {settings.views} views"
                )
            stats += self.clipper.accumulate(losses, mask)
        self.clipper.privatize(settings.noise_multiplier, settings.expected_batch_size, self._generators["noise"])
        self.accountant.step()  # before the update: a step that fails from here on has been paid for
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.step)
        return stats

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        if self.checkpoint:
            save_checkpoint(self.checkpoint, self.state_dict(), self._fingerprint)

    def state_dict(self) -> dict:
        """Everything from which training continues bit for bit."""
        return {
            "settings": asdict(self.settings),
            "records": self.records,
            "accountant": self.accountant.state_dict(),
            "parameters": {name: p.detach().clone() for name, p in self.parameters.items()},
            "average": dict(self.average.values),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "generators": generator_states(self._generators),
        }

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self._fingerprint)
        if different := _differences(state["settings"] | {"records": state["records"]}, self.settings, self.records):
            raise CheckpointError(
                f"{self.checkpoint} is of a run with other settings: {different}; use them, or another file"
            )
        self.accountant.load_state_dict(state["accountant"])
        copy_into(self.parameters, state["parameters"])
        self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        restore_generators(self._generators, state["generators"])

    @cached_property
    def last_step(self) -> int:
        """Where training ends: settings.steps, or fewer if their epsilon would exceed target_epsilon."""
        s = self.settings
        if s.target_epsilon is None or self.accountant.epsilon(s.delta, s.steps) <= s.target_epsilon:
            return s.steps
        affordable = bisect_right(
            range(1, s.steps), s.target_epsilon, key=lambda t: self.accountant.epsilon(s.delta, t)
        )
        warnings.warn(
            f"{s.steps} steps would exceed epsilon {s.target_epsilon}: training stops after {affordable}; calibrate_noise "
            "gives the noise for all of them",
            stacklevel=3,
        )
        return max(affordable, self.step)

    def _epsilon_by_step(self, last: int) -> Callable[[int], float]:
        spacing = max(1, math.ceil(last / CURVE_POINTS))
        counts = list(range(spacing, last + spacing, spacing))
        if not self.progress:
            return lambda step: math.nan
        curve = self.accountant.epsilon_curve(self.settings.delta, counts)  # coarse: about 2% above the final figure
        final = self.accountant.epsilon(self.settings.delta, last)
        return lambda step: min(final, curve[math.ceil(step / spacing) - 1])


def _open_data(data: Sequence[Tensor] | Dataset) -> tuple[int, Callable[[Tensor], Sequence[Tensor]]]:
    """-> number of records, and indices -> batch."""
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        lengths = {len(t) for t in data}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"data's tensors must have one record per row, the same number >= 1 each; got {sorted(lengths)}"
            )
        return lengths.pop(), lambda indices: [t[indices.to(t.device)] for t in data]
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data):
        return len(data), lambda indices: default_collate([data[i] for i in indices.tolist()])
    raise ValueError(f"data must be a tuple of tensors or a map-style Dataset with records, got {type(data).__name__}")


# May differ on resume: they change neither the mechanism nor the trajectory of what was trained so far.
_FREE_TO_CHANGE = {"target_epsilon", "fixed_shape"}


def _differences(saved: dict, settings: PrivateTraining, records: int) -> str:
    now = asdict(settings) | {"records": records}
    changed = [name for name in now if name not in _FREE_TO_CHANGE and saved.get(name) != now[name]]
    return ", ".join(f"{name} is {saved.get(name)!r} there and {now[name]!r} here" for name in changed)
