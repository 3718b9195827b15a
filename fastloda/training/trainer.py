"""The private trainer: a Poisson batch, its micro-batches, the private step, the update, the checkpoint."""

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from collections.abc import Generator as Yielding
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset

from fastloda.errors import PrivacyError, UserError
from fastloda.interrupts import interrupts_wait
from fastloda.per_sample.refusals import check_optimizer
from fastloda.privacy.captured import CapturedStep, CaptureError, can_capture
from fastloda.privacy.ranks import Group, hand_back_shards, replicate
from fastloda.privacy.stats import StepStats
from fastloda.privacy.step import GhostClipper
from fastloda.progress import Progress
from fastloda.randomness import generator_states, restore_generators, restored
from fastloda.training.average import in_eval_mode
from fastloda.training.batches import Batches, Columns
from fastloda.training.callbacks import Callback, StepReport
from fastloda.training.looks import Looks
from fastloda.training.mixing import Divisors, Evaluated, check_steady, evaluated
from fastloda.training.optimizers import OptimizerOrFactory, SchedulerOrFactory
from fastloda.training.owners import OwnerBatches, OwnerIds
from fastloda.training.run_state import OtherRelease, RunState
from fastloda.training.sampling import largest_share, micro_batches, share
from fastloda.training.settings import PrivateTraining
from fastloda.training.waste import Waste

SAVE_SECONDS = 300.0  # between saves of long steps

# A function losses(model, batch, generator) -> one number per sample and view, [n * views], sample-major.
Losses = Callable[[nn.Module, Any, Generator], Tensor]


class DPTrainer:
    """A trainer of a model's trainable parameters on private records under (epsilon, delta)-DP, add/remove adjacency.

    >>> settings = PrivateTraining(sample_rate=0.1, expected_batch_size=100, steps=50, noise_multiplier=2.0, delta=1e-5)
    >>> trainer = DPTrainer(model, (images, labels), losses, settings, checkpoint="run/private.pt")
    >>> trainer.fit()                  # continues from the checkpoint if there is one
    >>> trainer.epsilon()              # what was spent

    A run stops before `target_epsilon` is exceeded. Its checkpoint holds the parameters, optimizer, average, random states,
    the accountant's state, and a secret from which each step's batch and noise follow. A killed run resumes bit for bit: a
    repeated step is the same release, neither lost nor paid twice. A file beside the checkpoint lists each release before it
    is made, with a keyed hash of its sum (`releases.py`; the two files belong together). A repeated step whose sum differs
    (other losses, data or shapes) is not released: it and the lost steps after it stay charged and are not repeated, and
    training continues with new batches and new noise. Whether that happened may depend on a single record, if that alone was
    changed in between. With `secure_noise` no release can be repeated: those after the last checkpoint are charged and lost.
    No two sums ever have the same noise, not even in a forked child: unless `seed` is given, the noise depends on the sum too.
    Keep the checkpoint private: it holds the secret. What the progress bar shows (loss, clipped fraction) depends on private
    data without noise: it is for the operator's eyes and is written nowhere.

    Where `torch.distributed` is initialised, all ranks train one model (`fastloda.privacy.ranks`): construct it, and call `fit`,
    `train_step`, `save` and `state_dict`, on all of them. Each step's batch is one Poisson sample of all records (or owners), the
    same on any number of ranks; the i-th is trained on by rank i mod their number, with random losses of its own.
    Rank 0's trainable parameters are copied to the others at the start; rank 0 adds the noise, shows the bar, and reads and
    writes the checkpoint. With as many ranks as wrote it, a run resumes bit for bit; with another number the losses are drawn
    anew.

    Args:
        model: a model with some trainable parameters, each covered by a rule.
        data: tensors or arrays with one record per row (one, a tuple or a dict of them), or a map-style Dataset; the same on
            every rank. Batches have the same structure, or the one that `default_collate` makes of the Dataset's records.
        losses: function (model, batch, generator) -> [n * views] losses, each of its own record only (or of its owner's). Its
            randomness comes from `generator` or from torch's, numpy's or Python's global one. It is called once when the trainer
            is made. It is checked in the first step, in steps 4, 16, 64, ..., in random ones, and when losses stand out: with
            other records beside it, and all else as it was, a record must have the same loss; in steps 1, 16, 256, ... also the
            same gradient, and, if nothing is drawn at random, the same loss at another place of the batch (`mixing.py`). The
            checks do not change the course of the run. No check can see what `losses` keeps of earlier steps' records: keep
            nothing. On a CUDA GPU, if shapes are fixed (`settings.fixed_shape`), the step becomes one graph (`CapturedStep`) if
            it can: losses() is then called in some steps only, and what it does beside computing losses of its inputs happens in
            these alone.
        settings: the settings of the run.
        owners: the owner of each record, integers or strings, where the unit of privacy is an owner (a patient, a user) of
            several: a sequence, array or tensor. Each step then draws owners with `sample_rate`, takes `per_owner` rows of each
            (`owners.py`), and clips the mean over them; a batch holds per_owner x owners records, losses() is called as ever,
            and epsilon is for adding or removing an owner with all records. Default: every record has an owner of its own.
        optimizer: an optimizer of your own in place of the settings' one: any with torch.optim's interface over exactly the
            model's trainable parameters, or a function from their list to it (`torch.optim.NAdam`, or a partial of it). It may
            not need a closure. The settings' optimizer, learning_rate, weight_decay, momentum and betas must then be left out.
        scheduler: a learning-rate scheduler of your own for that optimizer, or a function from the optimizer to it; it is
            stepped once in each step. The settings' warmup and schedule must then be left out; without one they apply to any
            optimizer. Class and settings of both are public, and must be the same when a run resumes (what a LambdaLR's
            function computes is not compared).
        checkpoint: file to save to and resume from; its folder is made if there is none. None saves nothing.
        checkpoint_every: number of steps between saves, if they take less than five minutes.
        callbacks: functions (trainer, report) that `fit` calls after each step, on every rank (`trainer.world.first` tells
            rank 0), with a `StepReport`; `fastloda.evaluate_every` makes one that evaluates the averaged parameters. The run's
            random states are put back after each call. If one raises, the step is done, saved and not taken again.
        progress: whether to show progress: a bar on a terminal, elsewhere a line now and then.
        group: the ranks that train together. None takes all, if a process group is initialised; "alone" this process only.
        snapshots: number of moments at which two averages of the parameters are copied, so that `averaged` can make one of any
            length after training; 32 serve well, and make the checkpoint 64 times the parameters larger.

    Raises:
        ValueError, PrivacyError: the arguments are refused, with the reason, before anything is changed.
        CheckpointError: the checkpoint is damaged, or belongs to another model or other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Columns | Dataset,
        losses: Losses,
        settings: PrivateTraining,
        *,
        owners: OwnerIds | None = None,
        optimizer: OptimizerOrFactory | None = None,
        scheduler: SchedulerOrFactory | None = None,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 50,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        group: Group = None,
        snapshots: int = 0,
    ):
        self.model, self.losses, self.settings, self.checkpoint_every = model, losses, settings, checkpoint_every
        _check_devices(model)
        self._data = Batches(data) if owners is None else OwnerBatches(data, owners, settings.per_owner)
        if self._data.rows != settings.per_owner:
            raise UserError(
                f"per_owner={settings.per_owner} needs the owners of the records: give DPTrainer(owners=...)"
            )
        settings.check_units(self._data.units, self._data.unit)
        rows = self._data.rows * settings.views
        self.clipper = GhostClipper(
            model, settings.max_grad_norm, rows, clipping=settings.clipping, bands=settings.bands, group=group
        )
        self.parameters = self.clipper.parameters
        place = None if checkpoint is None else Path(checkpoint)
        self.run = RunState(settings, self._data, self.clipper, place, optimizer, scheduler, snapshots)
        self.callbacks, self.progress = tuple(callbacks), progress and self.world.first
        self._looks = Looks(self.run, self._data, self._evaluate)
        self._waste, self._divisors = Waste(self.run.device), Divisors()
        self._moving = False  # True from a gradient's release to the end of its update
        self._captured: CapturedStep | None = None
        self._step_was_read = False
        self._try_losses()
        self.clipper.check_model()  # losses() may have written to the model
        self._agree()
        self.run.open()
        if settings.fixed_shape and can_capture(self.run.device) and not hand_back_shards(model):
            self._captured = CapturedStep(self.clipper, self._capturable_losses, list(self.run.generators.values()))

    def _try_losses(self) -> None:
        """Compute the losses of one batch and drop them, so that what can't work fails before anything is paid for."""
        settings = self.settings
        chosen, _ = next(micro_batches(torch.arange(self.run.units), settings.micro_batch_size, settings.fixed_shape))
        try:
            with restored(self.run.generators):
                read = self._data.read(chosen, self.run.stream)
            self._evaluate(read, [])
        except (NameError, AttributeError):
            return  # losses() may refer to the trainer that is being made; the first step calls it before it pays
        except Exception as error:
            if not hand_back_shards(self.model):
                self.world.tell_failure(error)  # the others wait in _agree
            raise

    def _agree(self) -> None:
        """Refuse ranks whose runs would differ, and start all ranks from the same parameters."""
        facts = self.run.facts | {"checkpoint_every": self.checkpoint_every, "the model": self.run.fingerprint}
        self.world.check_same(asdict(self.settings) | facts | {"having a checkpoint": self.checkpoint is not None})
        replicate(self.model, self.clipper.group)
        self.average.load({name: p.detach() for name, p in self.parameters.items()})

    world = property(lambda self: self.run.world, doc="The ranks that train together.")
    last_step = property(
        lambda self: self.run.last_step, doc="The step at which training ends, by the steps or by the budget."
    )
    records = property(lambda self: self._data.records, doc="The number of records, whoever owns them.")
    unit = property(lambda self: self._data.unit, doc='The unit of privacy: "record", or "owner" if owners were given.')
    units = property(
        lambda self: self.run.units,
        doc="The number of units of privacy: of owners, if they were given, or else of records.",
    )
    checkpoint = property(lambda self: self.run.checkpoint, doc="The file to save to, if any.")
    optimizer = property(lambda self: self.run.optimizer, doc="The optimizer, the settings' or the given one.")
    scheduler = property(lambda self: self.run.scheduler, doc="The scheduler of the learning rate.")
    average = property(lambda self: self.run.average, doc="The moving average of the parameters.")
    accountant = property(lambda self: self.run.accountant, doc="The accountant of what was spent so far.")

    @property
    def step(self) -> int:
        """The number of private steps taken."""
        self._step_was_read = True
        return self.run.step

    def epsilon(self) -> float:
        """Compute an upper bound on epsilon spent so far, at the settings' delta."""
        return self.accountant.epsilon(self.settings.delta)

    def save(self) -> None:
        """Write the checkpoint; see `RunState.save`."""
        self.run.save()

    def state_dict(self) -> dict:
        """Collect everything from which training continues bit for bit, on any rank."""
        return self.run.state_dict()

    def fit(self) -> "DPTrainer":
        """Train until the steps or the budget end, whichever comes first.

        It saves before the first step, every `checkpoint_every` steps, after a step that ends five minutes or more after the last
        save, and at the end, even if the end is an error, or SIGINT (Ctrl-C) or SIGTERM, which take effect after the current step
        (a second signal at once). With several ranks nothing is saved after an error on one of them, unless it is a callback's.
        """
        last = self.last_step
        told = self.progress or self.callbacks
        epsilons = self.run.epsilon_by_step(last) if told else lambda step: math.nan
        if self.checkpoint and not self.world.from_first(self.checkpoint.exists):
            self.save()
        saved = time.monotonic()
        with (
            interrupts_wait() as received,
            Progress("private", last, done=self.step, shown=self.progress) as bar,
        ):
            try:
                while self.step < last and not self.world.most(len(received)):
                    try:
                        stats = self.train_step()
                    except PrivacyError:
                        if self.step < last:
                            raise
                        break  # the remaining steps are charged, and not made
                    report = StepReport(self.step, last - self.step, epsilons(self.step), stats)
                    if self.progress:
                        bar.update(report.step - bar.done, _told(report))
                    if self.step < last and self._is_save_due(saved):
                        self.save()
                        saved = time.monotonic()
                    self._call_back(report)
            except BaseException:
                if self.world.size == 1 and not self._moving:
                    with suppress(PrivacyError):  # raised if another run has written to the checkpoint
                        self.save()
                raise
            self.save()
        return self

    def _call_back(self, report: StepReport) -> None:
        """Call the callbacks on all ranks, which wait for each other; if one raises, all of them save and raise."""
        for callback in self.callbacks:
            try:
                self._call(callback, report)
                self.world.check_same({"step": report.step})
            except Exception:
                if self.world.size > 1:  # a single process is saved by fit
                    self.save()
                raise

    def _call(self, callback: Callback, report: StepReport) -> None:
        """Call a callback, put the random states back, and let the other ranks know if it raises."""
        with restored(self.run.generators):
            try:
                callback(self, report)
            except Exception as error:
                self.world.tell_failure(error)
                raise

    @contextmanager
    def averaged(self, length: float | None = None) -> Yielding[None]:
        """Put the averaged parameters into the model, in eval mode, inside the context, to evaluate them or to save them.

        length: the relative length of an average that is made from the snapshots (`posthoc.py`), about the share of the steps
            that it reaches back; None: the average of the settings' ema_decay. Choose it on public data, or the choice is a
            release.

        After it the model has its own parameters and modes again, and random generators their states, so that training goes
        on as if it had not been interrupted. With sharded weights all ranks must do the same inside.

        Raises:
            UserError: training, saving the checkpoint or entering `averaged` again is tried inside the context; or there is no
                average of that length.
        """
        self._release()
        values = None if length is None else self.run.snapshots.average(length)
        with restored(self.run.generators), in_eval_mode(self.model), self.average.in_place(values):
            torch.clear_autocast_cache()  # it may hold casts of the other parameters
            try:
                yield
            finally:
                torch.clear_autocast_cache()

    def _is_save_due(self, saved: float) -> bool:
        """Tell whether steps or time call for a save, on all ranks alike; saved: the time of the last one."""
        late = time.monotonic() - saved >= SAVE_SECONDS
        return self.step % self.checkpoint_every == 0 or bool(self.world.most(int(late)))

    def train_step(self) -> StepStats:
        """Take one private step over one Poisson batch, which may be empty: it is noised and counted all the same.

        A step in which nearly no sample has a finite gradient releases noise alone, and is paid for; after several such steps
        in a row no more are taken (`WASTED_STEPS`). That stop is no release: who sees it learns that nearly all samples of
        each of these steps overflowed, which one record decides only where their count is at the limit.

        Raises:
            PrivacyError: the steps or the budget are spent, or samples mix (see losses).
            RuntimeError: the last steps were wasted, or the parameters are no longer finite.
        """
        stats = None
        while stats is None:
            stats = self._take_step()
        return stats

    def _take_step(self) -> StepStats | None:
        """Take a step; return None if it would be another release than the one listed: that is charged, and none is made."""
        if self.step >= self.last_step:
            raise PrivacyError(f"all {self.last_step} private steps are taken, or the budget is spent: no step is left")
        self.average.check_not_in_place()
        self._waste.check(self.parameters, self.step)
        check_optimizer(self.optimizer, self.parameters)  # the user may have added parameters to it
        self._looks.schedule()
        settings = self.settings
        before, key = generator_states(self.run.generators), self.run.secret.key
        released, counted = self.clipper.noise.steps, self.step
        try:
            stats = self._accumulate(self.run.batch())
            if self.run.secret.key != key:
                raise PrivacyError(
                    "this process was forked in the middle of a step, whose batch is its parent's: the next step is its own"
                )
            self.clipper.privatize(settings.noise_multiplier, settings.expected_batch_size, self.run.noise_over)
            self.run.accountant.step()  # before the update: a step that fails from here on has been paid for
        except BaseException as error:
            self.clipper.reset()  # a record may not be in the next step's sum as well
            restore_generators(self.run.generators, before)
            if not isinstance(error, OtherRelease):
                if settings.bands > 1 and self.clipper.noise.steps - released > self.step - counted:
                    # Taken again, it would be solved against its own noise, and have half of what is accounted for.
                    self.run.charge(counted + 1, "were released, and interrupted")
                raise
            self.run.charge(error.last, "gave other sums when they were taken again")
            self.save()
            return None
        self._looks.step_taken()
        self._moving = True
        self.run.update()
        self._moving = False
        stats = StepStats(self.world.sum(stats.totals))
        self._waste.add(stats)
        return stats

    def _accumulate(self, indices: Tensor) -> StepStats:
        """Accumulate the clipped sum of this rank's share of the sampled records."""
        settings, world = self.settings, self.world
        sharded = hand_back_shards(self.model)
        largest = largest_share(indices, world.size)
        together = math.ceil(largest / settings.micro_batch_size) if sharded else 0
        own = share(indices, world.rank, world.size)
        parts = list(micro_batches(own, settings.micro_batch_size, settings.fixed_shape, at_least=together))
        before = generator_states(self.run.generators)
        try:
            stats, losses = self._accumulate_parts(parts)
            if not sharded and self._looks.are_surprised_by(losses):
                self.clipper.reset()
                restore_generators(self.run.generators, before)
                stats, _ = self._accumulate_parts(parts)
        except Exception as error:
            if not sharded:  # the others wait in privatize; with sharded weights, in the middle of a pass
                world.tell_failure(error)
            raise
        return stats

    def _accumulate_parts(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[StepStats, list[Tensor]]:
        """Accumulate the clipped sum of micro-batches (indices, mask); return the counts, and the losses of each micro-batch."""
        stats, found = StepStats.none(self.run.device), []
        for chosen, mask in parts:
            read = self._data.read(chosen, self.run.stream)
            seen = None
            if self._looks.due:
                self._release(read)
                seen = self._looks.look(read, chosen)
            counts, losses = self._accumulate_one(read, mask)
            if seen is not None:
                check_steady(seen, losses)
            stats += counts
            found.append(losses)
        return stats, found

    def _accumulate_one(self, read: list, mask: Tensor) -> tuple[StepStats, Tensor]:
        """Accumulate the clipped sum of a micro-batch, by a CUDA graph if possible; return the counts and the losses."""
        batch, weights = self._batch_of(read), self._data.weights(read)
        if weights is not None:
            weights = weights.repeat_interleave(self.settings.views)
        if self._captured is not None:
            try:
                return self._captured.accumulate(batch, mask=mask, weights=weights)
            except CaptureError as error:
                warnings.warn(f"steps are made without a CUDA graph, which would be faster: {error}", stacklevel=2)
                self._captured = None
        losses = self._losses(batch, len(read))
        self._divisors.check(losses)
        weighed = losses if weights is None else losses * weights.to(losses)
        return self.clipper.accumulate(weighed, mask), losses.detach()

    def _release(self, read: list | None = None) -> None:
        """Free the memory of the step's CUDA graph for other computations; read: the next units, if they will be looked at."""
        if self._captured is not None:
            self._captured.release(*([] if read is None else [self._batch_of(read)]))

    def _capturable_losses(self, batch: Any) -> Tensor:
        """Compute the losses of a full micro-batch; raise CaptureError if losses() reads the step, which a graph would freeze."""
        self._step_was_read = False
        losses = self._losses(batch, self.settings.micro_batch_size)
        if self._step_was_read:
            raise CaptureError("losses() reads trainer.step")
        self._divisors.check(losses)
        return losses

    def _batch_of(self, read: list) -> Any:
        """Make the batch of the units read."""
        try:
            return self._data.batch(read, self.run.device)
        except (TypeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"data's records can't be made a batch ({error}): give records of tensors, arrays or numbers of one shape, or "
                "tuples and dicts of them"
            ) from error

    def _losses(self, batch: Any, units: int) -> Tensor:
        """Compute the losses [units * rows * views] of a batch, with their graph."""
        losses, views = self.losses(self.model, batch, self.run.generators["losses"]), self.settings.views
        rows = units * self._data.rows
        if not isinstance(losses, Tensor) or losses.shape != (rows * views,) or not losses.is_floating_point():
            got = f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise UserError(
                f"losses() must give one floating-point number for each sample and view, as reduction='none' does: a tensor of "
                f"shape ({rows * views},) for {rows} samples x {views} views; got {got}"
            )
        return losses

    def _evaluate(self, read: list, choices: Sequence[Tensor]) -> Evaluated:
        """Compute the losses and the choices' gradients, and restore the random states and FSDP2's shards."""
        sharded = hand_back_shards(self.model)
        try:
            # with gradients enabled the same kernels run as in training; FSDP2 would wait for a backward pass
            with restored(self.run.generators) as drew, torch.set_grad_enabled(not sharded):
                return evaluated(self._losses(self._batch_of(read), len(read)), choices, self.parameters.values(), drew)
        finally:
            hand_back_shards(self.model)
            torch.clear_autocast_cache()


def _told(report: StepReport) -> str:
    seen = report.private
    return f"loss {seen.mean_loss:.4f}, clipped {seen.clipped_fraction:.0%}, epsilon {report.epsilon:.2f}"


def _check_devices(model: nn.Module) -> None:
    if any(p.device.type == "mps" for p in model.parameters()):
        raise UserError("clipped sums are in float64, which Apple's GPUs (mps) lack: train on the CPU or on a CUDA GPU")
