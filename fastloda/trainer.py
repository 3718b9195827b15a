"""Private training, top to bottom: Poisson sampling, micro-batches, the private step, EMA, budget, checkpoints."""

import math
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fastloda.accountant import PrivacyAccountant
from fastloda.average import Average, copy_into
from fastloda.batches import Batches, Columns
from fastloda.checkpoint import CheckpointError, fingerprint, load_checkpoint, save_checkpoint
from fastloda.clip import check_max_grad_norm
from fastloda.coverage import check_optimizer
from fastloda.distributed import Group, World, hand_back_shards, replicate
from fastloda.errors import PrivacyError
from fastloda.files import make_place
from fastloda.intent import Releases
from fastloda.interrupts import interrupts_wait
from fastloda.noise import NoiseSource, describe_randomness, draws_alike
from fastloda.randomness import Secret, generator_states, restore_generators, restored
from fastloda.sampling import largest_share, micro_batches, poisson_sample, share
from fastloda.schedules import Schedule, warmup_then
from fastloda.secure import SecureGenerator
from fastloda.step import GhostClipper, StepStats
from fastloda.styles import Clipping, clipping_style
from fastloda.unmixed import Evaluated, Signs, check_steady, evaluated, halves, is_due, is_power_of_two, look, places

# losses(model, batch, generator) -> one number per sample and view, [n * views], sample-major
Losses = Callable[[nn.Module, Any, Generator], Tensor]

WASTED_STEPS, WASTED_SAMPLES = 3, 20  # in a row, and in all of them together: then a run stops
FAR = 20  # times sample_rate x records, or less than a 20th of it: then expected_batch_size is a slip
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
        data: tensors or arrays with one record per row (one, a tuple or a dict of them), or a map-style Dataset; the same on
            every rank. Batches have the same structure, or the one that `default_collate` makes of the Dataset's records.
        losses: (model, batch, generator) -> [n * views] losses, each of its own record only. Its randomness must come from
            `generator` or from torch's, numpy's or Python's global one. It is called once when the trainer is made, and looked
            at in its first step, in steps 2, 4, 8, ..., in random ones, and where losses stand out: with other records beside
            it, and all else as it was, a record must have the same loss and gradient, and, where nothing is drawn at random, at
            another place of the batch too (`fastloda.unmixed`). The run's course is the same with it. What `losses` keeps of
            earlier steps' records no look can see: keep nothing.
        settings: see PrivateTraining.
        checkpoint: file to save to and resume from; its folder is made if there is none. None keeps nothing.
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
        data: Columns | Dataset,
        losses: Losses,
        settings: PrivateTraining,
        *,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 50,
        progress: bool = True,
        group: Group = None,
    ):
        self.model, self.losses, self.settings = model, losses, settings
        self._data = Batches(data)
        self.records = self._data.records
        _check_expected(settings, self.records)
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
        self._looks, self._look_due, self._look_closely = 0, True, True
        self._signs = Signs()
        self._moving = False  # between the release of a gradient and the end of the update that it makes
        self._wasted = StepStats.none(self._device)  # of the last steps in a row that were
        self._wasted_steps = 0
        self._try_losses()
        self.clipper.check_model()  # the try may have written to it
        self._agree()
        if self.checkpoint:
            self.world.from_first(lambda: make_place(self.checkpoint))
        resumes = self.checkpoint is not None and self.world.from_first(self.checkpoint.exists)
        if resumes:
            self._resume()
        self._releases = self.world.from_first(lambda: Releases(self.checkpoint))
        self._settle(resumes)
        self.clipper.watch()  # resuming has written to the parameters
        if self.world.size > 1:
            self.last_step  # noqa: B018, computed by rank 0 while all are here

    def _agree(self) -> None:
        """Refuse ranks that would make different runs; let them start from the same parameters."""
        facts = {"records": self.records, "checkpoint_every": self.checkpoint_every, "the model": self._fingerprint}
        self.world.check_same(asdict(self.settings) | facts | {"having a checkpoint": self.checkpoint is not None})
        replicate(self.model, self.clipper.group)
        self.average.load({name: p.detach() for name, p in self.parameters.items()})

    def _try_losses(self) -> None:
        """One batch and its losses, of which nothing is kept: what can't work fails before anything is paid for."""
        chosen, _ = next(
            micro_batches(torch.arange(self.records), self.settings.micro_batch_size, self.settings.fixed_shape)
        )
        try:
            with restored(self._generators):
                read = self._data.read(chosen)
            self._evaluate(read, [])
        except (NameError, AttributeError):
            return  # losses() may name the trainer that is being made; the first step calls it before it pays
        except Exception as error:
            if not hand_back_shards(self.model):
                self.world.tell_failure(error)  # the others wait in _agree
            raise

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
        """Train to the end of the steps or of the budget, whichever comes first.

        Saves before the first step, every `checkpoint_every` steps, and at the end, by whatever it comes: an error, or SIGINT
        (Ctrl-C) or SIGTERM, which take effect after the step that they fall into (a second one at once). On several ranks an
        error on one of them is not followed by a save.
        """
        last = self.last_step
        epsilons = self._epsilon_by_step(last)
        if self.checkpoint and not self.world.from_first(self.checkpoint.exists):
            self.save()
        with (
            interrupts_wait() as received,
            tqdm(total=last, initial=self.step, desc="private", unit="step", disable=not self.progress) as bar,
        ):
            try:
                while self.step < last and not self.world.most(len(received)):
                    try:
                        stats = self.train_step()
                    except PrivacyError:
                        if self.step < last:
                            raise
                        break  # the steps that were left are charged, and not made
                    bar.set_postfix_str(
                        f"loss {stats.mean_loss:.4f}, clipped {stats.clipped_fraction:.0%}, epsilon {epsilons(self.step):.2f}"
                    )
                    bar.update(self.step - bar.n)
                    if self.step % self.checkpoint_every == 0 and self.step < last:
                        self.save()
            except BaseException:
                if self.world.size == 1 and not self._moving:
                    with suppress(PrivacyError):  # then it is another run's
                        self.save()
                raise
            self.save()
        return self

    def train_step(self) -> StepStats:
        """One private step over one Poisson batch, which may be empty: it is noised and counted all the same.

        A step in which nearly no sample has a finite gradient releases noise alone, and is paid for; some in a row are refused
        to go on (`WASTED_STEPS`). That the run stops then is no release: who sees it learns that nearly all samples of each of
        these steps overflowed, which one record decides only where their count is at the limit.

        Raises:
            PrivacyError: the steps, or the budget, are spent; or samples mix (see losses).
            RuntimeError: the last steps were wasted, or the parameters are no longer finite.
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
        self._check_worth_it()
        indices = poisson_sample(self.records, settings.sample_rate, self._secret.generator(f"batch {self.step + 1}"))
        self._look_due |= is_due(self.step + 1, self._secret)
        before, key = generator_states(self._generators), self._secret.key
        try:
            stats = self._accumulate(indices)
            if self._secret.key != key:
                raise PrivacyError(
                    "this process was forked in the middle of a step, whose batch is its parent's: the next step is its own"
                )
            self.clipper.privatize(settings.noise_multiplier, settings.expected_batch_size, self._noise_over)
        except BaseException as error:
            self.clipper.reset()  # a record may not be in the next step's sum as well
            restore_generators(self._generators, before)
            if not isinstance(error, _OtherRelease):
                raise
            self._charge(error.last, "gave other sums when they were taken again")
            self.save()
            return None
        if self._look_closely and self._looks:  # at all that the first step takes
            self._look_due = self._look_closely = False
        self._moving = True
        self.accountant.step()  # before the update: a step that fails from here on has been paid for
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.step)
        self._moving = False
        stats = StepStats(self.world.sum(stats.totals))
        if stats.wasted:
            self._wasted, self._wasted_steps = self._wasted + stats, self._wasted_steps + 1
        elif stats.samples:
            self._wasted, self._wasted_steps = StepStats.none(self._device), 0
        return stats

    def _check_worth_it(self) -> None:
        """Refuse to pay for more steps of nothing."""
        norms = torch._foreach_norm([p.detach() for p in self.parameters.values()])  # quick: one look for all
        if not torch.stack([norm.float() for norm in norms]).isfinite().all():
            for name, p in self.parameters.items():
                if not p.isfinite().all():
                    raise RuntimeError(
                        f"parameter {name!r} is not finite after step {self.step}, and no later gradient can be: start anew with "
                        "what trains in float32 or bfloat16, or a lower learning rate (and this run's releases as `earlier`)"
                    )
        if self._wasted_steps >= WASTED_STEPS and self._wasted.samples >= WASTED_SAMPLES:
            raise RuntimeError(
                f"{self._wasted.nonfinite} of {self._wasted.samples} samples of the last {self._wasted_steps} steps had no "
                "finite gradient: their budget bought noise alone, and no more is spent. Look for an overflow in the model or "
                "the losses (float16?); a new trainer goes on from the checkpoint"
            )

    def _accumulate(self, indices: Tensor) -> StepStats:
        """The clipped sum of this rank's share of the sampled records."""
        settings, world = self.settings, self.world
        sharded = hand_back_shards(self.model)
        together = math.ceil(largest_share(indices, world.size) / settings.micro_batch_size) if sharded else 0
        own = share(indices, world.rank, world.size)
        parts = list(micro_batches(own, settings.micro_batch_size, settings.fixed_shape, at_least=together))
        before = generator_states(self._generators)
        try:
            stats, losses = self._accumulate_parts(parts)
            closely = self._look_closely and self._looks
            if self._signs.read(losses) and not closely and not sharded:
                self.clipper.reset()
                restore_generators(self._generators, before)
                self._look_due = self._look_closely = True
                stats, _ = self._accumulate_parts(parts)
        except Exception as error:
            if not sharded:  # the others wait in privatize; with sharded weights, in the middle of a pass
                world.tell_failure(error)
            raise
        return stats

    def _accumulate_parts(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[StepStats, list[Tensor]]:
        """-> the counts, and the losses of each micro-batch."""
        stats, found = StepStats.none(self._device), []
        for chosen, mask in parts:
            read = self._data.read(chosen)
            seen = self._look(read, chosen) if self._look_due else None
            losses = self._losses_of(read)
            found.append(losses.detach())
            if seen is not None:
                check_steady(seen, found[-1])
            stats += self.clipper.accumulate(losses, mask)
        return stats, found

    def _losses_of(self, read: list) -> Tensor:
        """[n * views], with their graph."""
        try:
            batch = self._data.batch(read, self._device)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"data's records can't be made a batch ({error}): give records of tensors, arrays or numbers of one shape, or "
                "tuples and dicts of them"
            ) from error
        losses, views = self.losses(self.model, batch, self._generators["losses"]), self.settings.views
        if not isinstance(losses, Tensor) or losses.shape != (len(read) * views,) or not losses.is_floating_point():
            got = f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise ValueError(
                f"losses() must give one floating-point number for each sample and view, as reduction='none' does: a tensor of "
                f"shape ({len(read) * views},) for {len(read)} samples x {views} views; got {got}"
            )
        return losses

    def _evaluate(self, read: list, choices: Sequence[Tensor]) -> Evaluated:
        """The losses alone, and the choices' gradients; random states and FSDP2's shards are after as they were before."""
        sharded = hand_back_shards(self.model)
        try:
            # with gradients enabled the same kernels run as in training; FSDP2 would wait for a backward pass
            with restored(self._generators) as drew, torch.set_grad_enabled(not sharded):
                return evaluated(self._losses_of(read), choices, self.parameters.values(), drew)
        finally:
            hand_back_shards(self.model)
            torch.clear_autocast_cache()

    def _look(self, read: list, chosen: Tensor) -> Tensor | None:
        """The losses of what was read, if no record's depend on another's; None if they were read with a partner."""
        self._look_due, self._looks = self._look_closely, self._looks + 1
        name = f"look {self._looks} at step {self.step + 1} on rank {self.world.rank}"
        alone = len(read) == 1 < self.settings.micro_batch_size
        with restored(self._generators):
            if alone:
                chosen = torch.cat([chosen, self._others(chosen, name)])
                read = read + self._data.read(chosen[1:])
            parts = halves(len(read), self._look_closely or is_power_of_two(self.step + 1), self._secret, name)
            replaced = [(part, self._data.read(self._others(chosen[part], name))) for part in parts]
        order = places(len(read), self.settings.fixed_shape, self._secret, name)
        own = look(self._evaluate, read, replaced, order, steady=not hand_back_shards(self.model))
        return None if alone else own

    def _others(self, chosen: Tensor, name: str) -> Tensor:
        """Another record for each, if there are two."""
        stream = self._secret.generator(f"others of {chosen.tolist()}, {name}")
        return (chosen + torch.randint(1, max(2, self.records), chosen.shape, generator=stream)) % self.records

    def save(self) -> None:
        """Write the checkpoint, atomically; by rank 0, and none goes on before it is written.

        Raises:
            PrivacyError: it is another run's by now, which has released something since.
        """
        if self.checkpoint:
            state = self.state_dict()
            self.world.from_first(self._releases.check_alone)
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

        The same secret, number and sums give the same noise, if the bound that scales it is the same, too, and the kind of
        device, for each draws other numbers from a stream. A seeded run's noise does not follow from the sums, which round
        otherwise in other micro-batches: such runs can be compared, and their noise can be foreseen anyway.

        Raises:
            _OtherRelease: a release of that number is on record, over other sums or with noise that can't be repeated.
        """
        settings, number = self.settings, self.step + 1
        scale = f"bound {self.clipper.max_grad_norm} on {draws_alike(self._device)}"
        hashed = self._secret.digest(f"sums {number}, {scale}", sums).hex()
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


def _check_expected(settings: PrivateTraining, records: int) -> None:
    """Fewer than one expected record leave the divisor open."""
    sampled = max(1.0, settings.sample_rate * records)
    if not sampled / FAR <= settings.expected_batch_size <= sampled * FAR:
        raise ValueError(
            f"expected_batch_size must be sample_rate x records, {settings.sample_rate:g} x {records} = "
            f"{settings.sample_rate * records:g}, got {settings.expected_batch_size:g}: it divides the clipped sum"
        )


class _OtherRelease(Exception):
    """The step would not be the release on record under its number, but another one."""

    @property
    def last(self) -> int:
        """The number of the last release on record."""
        return self.args[0]


# May differ on resume: they change neither the mechanism nor the trajectory of what was trained so far.
_FREE_TO_CHANGE = {"target_epsilon", "fixed_shape"}


def _differences(saved: dict, settings: PrivateTraining, records: int) -> str:
    now = asdict(settings) | {"records": records}
    changed = [name for name in now if name not in _FREE_TO_CHANGE and saved.get(name) != now[name]]
    return ", ".join(f"{name} is {saved.get(name)!r} there and {now[name]!r} here" for name in changed)
