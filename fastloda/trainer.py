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
from fastloda.distributed import Group, World, hand_back_shards, replicate
from fastloda.errors import PrivacyError
from fastloda.intent import Releases
from fastloda.noise import NoiseSource, describe_randomness
from fastloda.randomness import Secret, generator_states, restore_generators
from fastloda.sampling import largest_share, micro_batches, poisson_sample, share
from fastloda.schedules import Schedule, warmup_then
from fastloda.secure import SecureGenerator
from fastloda.step import GhostClipper, StepStats
from fastloda.styles import Clipping, clipping_style

# losses(model, batch, generator) -> one number per sample and view, [n * views], sample-major
Losses = Callable[[nn.Module, Sequence[Tensor], Generator], Tensor]

CURVE_POINTS = 64  # of the epsilon shown while training; between them the next larger one is shown


@dataclass(frozen=True)
class PrivateTraining:
    """Settings of a private run. All are public: none may be computed from the private records.

    Attributes:
        sample_rate: probability that a record enters a step's batch.
        expected_batch_size: sample_rate x the public count of records; the divisor of the clipped sum. On several ranks, of
            all of them together.
        steps: optimizer steps, noisy ones, empty batches included.
        noise_multiplier: standard deviation of the noise over max_grad_norm; 0 trains without privacy. With adaptive clipping
            the number that both releases of a step together cost (`fastloda.adaptive`).
        delta: at which epsilon is reported.
        target_epsilon: training stops before epsilon would exceed it; None: after `steps`.
        max_grad_norm: L2 bound on a sample's contribution; where it starts, with adaptive clipping.
        clipping: "flat", "automatic", "per_layer", "adaptive", or one of them with its settings, as in `GhostClipper`.
        views: noise levels / augmentations per sample, averaged before clipping.
        micro_batch_size: samples in a rank's memory at a time; the logical batch does not depend on it.
        fixed_shape: pad the last micro-batch with masked records, so that shapes never vary.
        optimizer, learning_rate, weight_decay, momentum (SGD), betas (Adam): as in torch.optim.
        warmup: steps of linear warm-up; schedule: what follows, down to zero for "cosine".
        ema_decay: of the average of the parameters, by step; 0 averages nothing.
        seed: of sampling and noise. None, the default, takes both from the operating system; a number makes a run that can be
            repeated, and whose noise can be foreseen: for experiments only.
        secure_noise: noise from a cryptographically secure generator (`SecureGenerator`, which also says what it costs). It can't
            be repeated, so seed must be None, and steps that a crash took after the last checkpoint are charged and lost.
        earlier: releases about the same records before this run, as `compose_epsilon` takes them; epsilon and target_epsilon
            cover them too.
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
    clipping: Clipping = "flat"
    secure_noise: bool = False
    earlier: tuple[tuple[float, float, int], ...] = ()

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
        if self.secure_noise and self.seed is not None:
            raise ValueError(f"secure_noise can't be seeded: seed must be None, got {self.seed!r}")
        self.accountant().epsilon_rdp(self.delta, 1)  # checks all that it takes
        clipping_style(self.clipping).gradient_noise(self.noise_multiplier, self.expected_batch_size)

    def accountant(self) -> PrivacyAccountant:
        """Of a run with these settings, at its start."""
        return PrivacyAccountant(self.sample_rate, self.noise_multiplier, earlier=self.earlier)


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

    A run stops before `target_epsilon` is exceeded. Its checkpoint holds the parameters, optimizer, average, random states, the
    accountant's record, and a secret from which each step's batch and noise follow; a killed run resumes bit for bit, so that a
    step taken again is the very same release, neither lost nor paid twice. A file beside the checkpoint lists the releases
    beforehand, with a keyed hash of each sum (`fastloda.intent`; the two files belong together). A step taken again whose sum is
    another (other losses, data or shapes) is not released: it and the lost ones after it stay charged and are not made again,
    and training goes on with new batches and new noise. Whether that happened may depend on a single record, if that alone was
    changed in between. With `secure_noise` no release can be repeated: those after the last checkpoint are charged and lost.
    No two sums ever have the same noise, in a forked child neither: unless `seed` is given, it follows from the sum as well.
    Keep the checkpoint private: it holds the secret. What the progress bar shows (loss, clipped fraction) depends on private
    data without noise: it is for the operator's eyes and is written nowhere.

    Where `torch.distributed` is initialised, all ranks train one model (`fastloda.distributed`): construct it, and call `fit`,
    `train_step`, `save` and `state_dict`, on all of them. Each step's batch is one Poisson sample of all records, the same on any
    number of ranks; record i is trained on by rank i mod their number, with random losses of that rank's own. Rank 0's
    trainable parameters are copied to the others at the start; rank 0 adds the noise, shows the bar, and reads and writes the
    checkpoint. With as many ranks as wrote it, a run resumes bit for bit; with another number the losses are drawn anew.

    Args:
        model: with some trainable parameters, each covered by a rule.
        data: tensors with one record per row, or a map-style Dataset; the same on every rank.
        losses: (model, batch, generator) -> [n * views] losses. Its randomness must come from `generator` or torch's global one.
        settings: see PrivateTraining.
        checkpoint: file to save to and resume from; None keeps nothing.
        checkpoint_every: steps between saves.
        progress: show the bar.
        group: the ranks that train together. None: all, if a process group is initialised; "alone": this process only.

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
        group: Group = None,
    ):
        self.model, self.losses, self.settings = model, losses, settings
        self.records, self._fetch = _open_data(data)
        self.clipper = GhostClipper(
            model, settings.max_grad_norm, settings.views, clipping=settings.clipping, group=group
        )
        self.progress = progress and self.world.first
        self.parameters = self.clipper.parameters
        self.optimizer = OPTIMIZERS[settings.optimizer](list(self.parameters.values()), settings)
        check_optimizer(self.optimizer, self.parameters)
        self.schedule = warmup_then(self.optimizer, settings.schedule, settings.steps, settings.warmup)
        self.average = Average(self.parameters, settings.ema_decay)
        self.accountant = settings.accountant()
        self._device = next(iter(self.parameters.values())).device
        self._secret = self._new_secret()
        self._generators = {"losses": self._losses_stream("")}
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self._fingerprint = fingerprint(model)
        self._agree()
        resumes = self.checkpoint is not None and self.world.from_first(self.checkpoint.exists)
        if resumes:
            self._resume()
        self._releases = self.world.from_first(lambda: Releases(self.checkpoint))
        self._settle(resumes)
        if self.world.size > 1:
            self.last_step  # noqa: B018, computed by rank 0 while all are here

    def _agree(self) -> None:
        """Refuse ranks that would make different runs; let them start from the same parameters."""
        facts = {"records": self.records, "checkpoint_every": self.checkpoint_every, "the model": self._fingerprint}
        self.world.check_same(asdict(self.settings) | facts | {"having a checkpoint": self.checkpoint is not None})
        replicate(self.model, self.clipper.group)
        self.average.load({name: p.detach() for name, p in self.parameters.items()})

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self.clipper.world

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
                stats = self._take_step()
                if stats is None:
                    continue
                spent = epsilons(self.step)
                bar.set_postfix_str(
                    f"loss {stats.mean_loss:.4f}, clipped {stats.clipped_fraction:.0%}, epsilon {spent:.2f}"
                )
                bar.update(self.step - bar.n)
                if self.step % self.checkpoint_every == 0 or self.step == last:
                    self.save()
        return self

    def train_step(self) -> StepStats:
        """One private step over one Poisson batch, which may be empty: it is noised and counted all the same.

        Raises:
            PrivacyError: the steps, or the budget, are spent.
        """
        stats = None
        while stats is None:
            stats = self._take_step()
        return stats

    def _take_step(self) -> StepStats | None:
        """None: it would have been another release than the one on record, which is charged; nothing was released."""
        settings = self.settings
        if self.step >= self.last_step:
            raise PrivacyError(f"all {self.last_step} private steps are taken, or the budget is spent: no step is left")
        indices = poisson_sample(self.records, settings.sample_rate, self._secret.generator(f"batch {self.step + 1}"))
        before = generator_states(self._generators)
        try:
            stats = self._accumulate(indices)
            self.clipper.privatize(settings.noise_multiplier, settings.expected_batch_size, self._noise_over)
        except BaseException as error:
            self.clipper.reset()  # a record may not be in the next step's sum as well
            restore_generators(self._generators, before)
            if not isinstance(error, _OtherRelease):
                raise
            self._charge(error.last, "gave other sums when they were taken again")
            self.save()
            return None
        self.accountant.step()  # before the update: a step that fails from here on has been paid for
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.step)
        return StepStats(self.world.sum(stats.totals))

    def _accumulate(self, indices: Tensor) -> StepStats:
        """The clipped sum of this rank's share of the sampled records."""
        settings, world = self.settings, self.world
        sharded = hand_back_shards(self.model)
        together = math.ceil(largest_share(indices, world.size) / settings.micro_batch_size) if sharded else 0
        parts = micro_batches(
            share(indices, world.rank, world.size), settings.micro_batch_size, settings.fixed_shape, at_least=together
        )
        stats = StepStats(torch.zeros(4, dtype=torch.float64, device=self._device))
        try:
            for chosen, mask in parts:
                batch = [t.to(self._device) for t in self._fetch(chosen)]
                losses = self.losses(self.model, batch, self._generators["losses"])
                if len(losses) != len(chosen) * settings.views:
                    raise ValueError(
                        f"losses() gave {len(losses)} numbers for {len(chosen)} samples x {settings.views} views"
                    )
                stats += self.clipper.accumulate(losses, mask)
        except Exception as error:
            if not sharded:  # the others wait in privatize; with sharded weights, in the middle of a pass
                world.tell_failure(error)
            raise
        return stats

    def save(self) -> None:
        """Write the checkpoint, atomically; by rank 0, and none goes on before it is written."""
        if self.checkpoint:
            state = self.state_dict()
            self.world.from_first(lambda: save_checkpoint(self.checkpoint, state, self._fingerprint))

    def state_dict(self) -> dict:
        """Everything from which training continues bit for bit, on any rank."""
        by_rank = self.world.gather(generator_states(self._generators))
        state = {
            "settings": asdict(self.settings),
            "records": self.records,
            "randomness": describe_randomness(self.settings.seed, self.settings.secure_noise),
            "accountant": self.accountant.state_dict(),
            "max_grad_norm": self.clipper.max_grad_norm,
            "parameters": {name: p.detach().clone() for name, p in self.parameters.items()},
            "average": dict(self.average.values),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "generators": by_rank,
        }
        # With secure noise the batches are not repeated either: the same batch under new noise would be less private than
        # the two steps that are paid for.
        return state if self.settings.secure_noise else state | {"secret": self._secret.key.hex()}

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self._fingerprint, self.world)
        if different := _differences(state["settings"] | {"records": state["records"]}, self.settings, self.records):
            raise CheckpointError(
                f"{self.checkpoint} is of a run with other settings: {different}; use them, or another file"
            )
        self.accountant.load_state_dict(state["accountant"])
        self.clipper.max_grad_norm = check_max_grad_norm(state["max_grad_norm"])
        copy_into(self.parameters, state["parameters"])
        self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        if "secret" in state:
            self._secret = Secret(bytes.fromhex(state["secret"]))
        by_rank = state["generators"]
        if len(by_rank) == self.world.size:
            restore_generators(self._generators, by_rank[self.world.rank])
        else:
            self._generators["losses"] = self._losses_stream(f" of {self.world.size}, from step {self.step}")

    # ---- no two sums under one noise, and no release that is not counted

    def _new_secret(self) -> Secret:
        """Rank 0's, on all ranks: they share the batches."""
        return Secret(self.world.from_first(lambda: Secret.of_seed(self.settings.seed).key))

    def _losses_stream(self, which: str) -> Generator:
        """Each rank has one of its own."""
        return self._secret.generator(f"losses of rank {self.world.rank}{which}", self._device)

    def _noise_over(self, sums: Sequence[Tensor]) -> NoiseSource:
        """The noise of the next release, which is on record when this returns; sums: what it will hide.

        The same secret, number and sums give the same noise. A seeded run's does not follow from the sums, which round
        otherwise in other micro-batches: such runs can be compared, and their noise can be foreseen anyway.

        Raises:
            _OtherRelease: a release of that number is on record, over other sums or with noise that can't be repeated.
        """
        settings, number = self.settings, self.step + 1
        hashed = self._secret.digest(f"sums {number}", sums).hex()
        self.world.from_first(lambda: self._put_on_record(number, "" if settings.secure_noise else hashed))
        if settings.secure_noise:
            return SecureGenerator()
        over = hashed if settings.seed is None else ""
        return self._secret.generator(f"noise {number} {over}", self._device)

    def _put_on_record(self, number: int, hashed: str) -> None:
        if number > self._releases.last:
            self._releases.add(self.accountant.state_dict() | {"steps": number}, hashed)
        elif not hashed or self._releases.sums.get(number) != hashed:
            raise _OtherRelease(self._releases.last)

    def _settle(self, resumes: bool) -> None:
        """Compare the releases on record with the checkpoint's count. Those after it may be taken again, if they can be."""
        settings, last = self.settings, self._releases.last
        if self._releases.account:
            try:
                settings.accountant().load_state_dict(self._releases.account)
            except ValueError as error:
                raise CheckpointError(f"{self._releases.path} is of another run: {error}") from error
        if self.step > last:
            gone = f"{self._releases.path} is gone or older than {self.checkpoint}: steps that were released may be missing"
            if settings.secure_noise:
                raise CheckpointError(gone)
            if settings.seed is None:
                self._secret = self._new_secret()
                warnings.warn(f"{gone}; batches and noise start anew", stacklevel=3)
        elif self.step < last and (settings.secure_noise or settings.seed is None and not resumes):
            self._charge(last, "may have been released after the last checkpoint, with noise that can't be repeated")

    def _charge(self, last: int, why: str) -> None:
        """Count the releases on record up to the last, which are not made again, so that the budget holds."""
        lost = last - self.step
        self.accountant.step(lost)
        self.schedule.last_epoch += lost
        warnings.warn(f"{lost} steps {why}: they are charged, and not made again", stacklevel=4)

    @cached_property
    def last_step(self) -> int:
        """Where training ends: settings.steps, or fewer if their epsilon would exceed target_epsilon."""
        return self.world.from_first(self._last_step)

    def _last_step(self) -> int:
        s = self.settings
        if s.target_epsilon is None or self.accountant.epsilon(s.delta, s.steps) <= s.target_epsilon:
            return s.steps
        affordable = bisect_right(
            range(1, s.steps), s.target_epsilon, key=lambda t: self.accountant.epsilon(s.delta, t)
        )
        warnings.warn(
            f"{s.steps} steps would exceed epsilon {s.target_epsilon}: training stops after {affordable}; calibrate_noise "
            "gives the noise for all of them",
            stacklevel=5,
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


class _OtherRelease(Exception):
    """The step would not be the release on record under its number, but another one."""

    @property
    def last(self) -> int:
        """The number of the last release on record."""
        return self.args[0]


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
