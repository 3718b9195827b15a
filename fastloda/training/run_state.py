"""The state from which a private run continues: its account, secret, random streams, optimizer, average and releases.

No two sums are released under one noise, and no release goes uncounted, through crashes, changed code and changed data.
"""

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

from torch import Generator, Tensor

from fastloda.errors import UserError
from fastloda.files import make_place
from fastloda.privacy.noise import NoiseSource, describe_randomness, draws_alike, noise_of
from fastloda.privacy.ranks import World
from fastloda.privacy.secure_noise import SecureGenerator
from fastloda.privacy.step import GhostClipper
from fastloda.randomness import Secret, generator_states, restore_generators
from fastloda.training.average import Average, copy_into
from fastloda.training.batches import Batches
from fastloda.training.checkpoint import CheckpointError, differences, fingerprint, load_checkpoint, save_checkpoint
from fastloda.training.optimizers import (
    OF_SETTINGS,
    OptimizerOrFactory,
    SchedulerOrFactory,
    check_states,
    describe_optimizer,
    describe_scheduler,
    make_optimizer,
    make_scheduler,
)
from fastloda.training.posthoc import Snapshots
from fastloda.training.releases import Releases
from fastloda.training.sampling import cyclic_sample, draw_turns
from fastloda.training.settings import PrivateTraining

CURVE_POINTS = 64  # points of the epsilon curve shown while training; between them the next larger value is shown


class OtherRelease(Exception):
    """An exception for a step that would be another release than the one listed under its number."""

    def __init__(self, last: int):
        super().__init__(last)
        self.last = last  # the number of the last release listed


class RunState:
    """The state of a private run, in memory and on disk.

    Attributes:
        units: number of units of privacy, of which each step draws some: records, or owners of records.
        optimizer, scheduler, average, snapshots: objects that training changes beside the clipper's parameters.
        accountant: accountant of the steps taken.
        secret: secret from which each step's batch and noise follow; the same on all ranks.
        turns: turns of the units, if noise is correlated over steps (`draw_turns`); a forked child keeps them.
        generators: generators that the losses draw from; each rank has its own.
        checkpoint: file to save to; None saves nothing.
        facts: facts beside the settings that must be the same on all ranks, and when the run resumes.

    Raises:
        UserError, PrivacyError: the optimizer or the scheduler given, of the user's own, can't serve (`optimizers.py`).
    """

    def __init__(
        self,
        settings: PrivateTraining,
        data: Batches,
        clipper: GhostClipper,
        checkpoint: Path | None,
        optimizer: OptimizerOrFactory | None = None,
        scheduler: SchedulerOrFactory | None = None,
        snapshots: int = 0,
    ):
        self.settings, self.units, self.clipper, self.checkpoint = settings, data.units, clipper, checkpoint
        self.facts = data.facts() | {"the optimizer": OF_SETTINGS, "the scheduler": OF_SETTINGS}
        self.parameters = clipper.parameters
        self.optimizer = make_optimizer(settings, self.parameters, optimizer)
        if optimizer is not None:  # described before a scheduler changes its learning rates
            self.facts["the optimizer"] = describe_optimizer(self.optimizer, self.parameters)
        self.scheduler = make_scheduler(settings, self.optimizer, scheduler)
        if scheduler is not None:
            self.facts["the scheduler"] = describe_scheduler(self.scheduler)
        if checkpoint:
            check_states(self.optimizer, self.scheduler)
        self.average = Average(self.parameters, settings.ema_decay)
        self.snapshots = Snapshots(self.parameters, settings.steps, snapshots)
        self.accountant = settings.accountant()
        self.device = next(iter(self.parameters.values())).device
        self.secret = self._new_secret()
        self.turns = draw_turns(self.units, settings.bands, self.secret.generator("turns"))
        self.generators = {"losses": self._losses_stream("")}
        self.fingerprint = fingerprint(clipper.model)

    @property
    def world(self) -> World:
        """The ranks that train together."""
        return self.clipper.world

    @property
    def step(self) -> int:
        """The number of private steps taken."""
        return self.accountant.steps

    def open(self) -> None:
        """Continue from the checkpoint, if there is one, and from the list of releases beside it.

        Raises:
            CheckpointError: one of the files is damaged, or belongs to another model or other settings.
        """
        checkpoint, resumes = self.checkpoint, False
        if checkpoint:
            self.world.from_first(partial(make_place, checkpoint))
            resumes = self.world.from_first(checkpoint.exists)
            if resumes:
                self._load(checkpoint)
        self.releases = self.world.from_first(lambda: Releases(checkpoint))
        self._settle(resumes)
        self.clipper.watch()  # loading has written to the parameters
        if self.world.size > 1:
            self.last_step  # noqa: B018, computed by rank 0 while all ranks take part

    def batch(self) -> Tensor:
        """Draw the indices of the next step's Poisson batch of units, the same on all ranks and at each call."""
        s = self.settings
        return cyclic_sample(self.turns, s.sample_rate, self.step, s.bands, self.stream("batch"))

    def stream(self, name: str) -> Generator:
        """Make the generator of that name for the next step, in the same state at each call and on all ranks."""
        return self.secret.generator(f"{name} {self.step + 1}")

    def noise_over(self, sums: Sequence[Tensor]) -> NoiseSource:
        """Make the noise of the next release, which will hide `sums`, and list the release durably before returning.

        The same secret, number and sums give the same noise if the bound that scales it and the kind of device are the same too
        (each kind draws other numbers from a seed). A seeded run's noise does not depend on the sums, which other micro-batches
        would round otherwise: so such runs can be compared, and their noise can be foreseen anyway.

        Raises:
            OtherRelease: a release of that number is listed, over other sums or with noise that can't be repeated.
        """
        settings, number = self.settings, self.step + 1
        scale = f"bound {self.clipper.max_grad_norm}, drawn on {draws_alike(self.device)}"
        hashed = self.secret.digest(f"sums {number}, {scale}", sums).hex()
        self.world.from_first(lambda: self._put_on_record(number, "" if settings.secure_noise else hashed))
        if settings.secure_noise:
            return SecureGenerator()
        over = hashed if settings.seed is None else ""
        return noise_of(Secret(self.secret.digest(f"noise {number} {over}")), self.device)

    def _put_on_record(self, number: int, hashed: str) -> None:
        if number > self.releases.last:
            self.releases.add(self.accountant.state_dict() | {"steps": number}, hashed)
        elif not hashed or self.releases.sums.get(number) != hashed:
            raise OtherRelease(self.releases.last)

    def update(self) -> None:
        """Make the update by the gradient that has just been released and counted."""
        self.optimizer.step()
        self.scheduler.step()
        self.average.update(self.step)
        self.snapshots.update(self.step)

    def charge(self, last: int, why: str) -> None:
        """Charge the listed releases up to number `last`, which are not repeated, so that the budget holds."""
        self.clipper.noise.forget()  # the noise of the lost steps is not known
        lost = last - self.step
        self.accountant.step(lost)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch expects an optimizer step before each
            for _ in range(lost):
                self.scheduler.step()
        warnings.warn(f"{lost} steps {why}: they are charged, and not made again", stacklevel=4)

    def save(self) -> None:
        """Write the checkpoint atomically by rank 0; no rank continues before it is written.

        Raises:
            PrivacyError: another run has released something with this checkpoint since.
        """
        if self.checkpoint:
            state = self.state_dict()
            self.world.from_first(self.releases.check_alone)
            self.world.from_first(partial(save_checkpoint, self.checkpoint, state, self.fingerprint))

    def state_dict(self) -> dict:
        """Collect everything from which training continues bit for bit, on any rank.

        Raises:
            UserError: the model holds the averaged parameters.
        """
        self.average.check_not_in_place()
        by_rank = self.world.gather(generator_states(self.generators))
        state = {
            "settings": asdict(self.settings),
            "facts": self.facts,
            "randomness": describe_randomness(self.settings.seed, self.settings.secure_noise),
            "accountant": self.accountant.state_dict(),
            "max_grad_norm": self.clipper.max_grad_norm,
            "noise": self.world.from_first(lambda: self.clipper.noise.state(self.parameters)),
            "turns": self.turns if self.settings.bands > 1 else None,
            "parameters": {name: p.detach().clone() for name, p in self.parameters.items()},
            "average": dict(self.average.values),
            "snapshots": self.snapshots.state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": by_rank,
        }
        # With secure noise the batches are not repeated either: the same batch under new noise would be less private than
        # the two steps that are paid for.
        return state if self.settings.secure_noise else state | {"secret": self.secret.key.hex()}

    def _load(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.fingerprint, self.world)
        now = asdict(self.settings) | self.facts
        if different := _differences(state["settings"] | state["facts"], now):
            raise CheckpointError(
                f"{checkpoint} is of a run with other settings: {different}; use them, or another file"
            )
        self.accountant.load_state_dict(state["accountant"])
        self.clipper.max_grad_norm = state["max_grad_norm"]
        self.clipper.noise.load(state["noise"], self.step, self.parameters)
        if state["turns"] is not None:
            self.turns = state["turns"]
        copy_into(self.parameters, state["parameters"])
        self.average.load(state["average"])
        self.snapshots.load(state.get("snapshots", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if "secret" in state:
            self.secret = Secret(bytes.fromhex(state["secret"]))
        by_rank = state["generators"]
        if len(by_rank) == self.world.size:
            restore_generators(self.generators, by_rank[self.world.rank])
        else:
            self.generators["losses"] = self._losses_stream(f" of {self.world.size}, from step {self.step}")

    def _settle(self, resumes: bool) -> None:
        """Compare the listed releases with the checkpoint's count, and charge those after it that can't be repeated."""
        settings, last = self.settings, self.releases.last
        if self.releases.account:
            try:
                settings.accountant().load_state_dict(self.releases.account)
            except UserError as error:
                raise CheckpointError(f"{self.releases.path} is of another run: {error}") from error
        if self.step > last:
            gone = (
                f"{self.releases.path} is gone or older than {self.checkpoint}: steps that were released may be missing"
            )
            if settings.secure_noise:
                raise CheckpointError(gone)
            if settings.seed is None:
                self.secret = self._new_secret()
                self.clipper.noise.forget()
                warnings.warn(f"{gone}; batches and noise start anew", stacklevel=4)
        elif self.step < last and (settings.secure_noise or settings.seed is None and not resumes):
            if not resumes:  # turns are drawn anew, and a record may have another one now: whole rounds are charged
                last = -(-last // settings.bands) * settings.bands
            self.charge(last, "may have been released after the last checkpoint, with noise that can't be repeated")

    def _new_secret(self) -> Secret:
        """Draw the secret on rank 0 and share it with all ranks, which share the batches."""
        return Secret(self.world.from_first(lambda: Secret.of_seed(self.settings.seed).key))

    def _losses_stream(self, which: str) -> Generator:
        """Make this rank's own generator for the losses; `which` extends its name."""
        return self.secret.generator(f"losses of rank {self.world.rank}{which}", self.device)

    @cached_property
    def last_step(self) -> int:
        """The step at which training ends: settings.steps, or fewer if their epsilon would exceed target_epsilon."""
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

    def epsilon_by_step(self, last: int) -> Callable[[int], float]:
        """Bound epsilon at every step up to the last, from a coarse curve that is computed once."""
        spacing = max(1, math.ceil(last / CURVE_POINTS))
        counts = list(range(spacing, last + spacing, spacing))
        curve = self.accountant.epsilon_curve(self.settings.delta, counts)  # coarse: about 2% above the final figure
        final = self.accountant.epsilon(self.settings.delta, last)
        return lambda step: min(final, curve[math.ceil(step / spacing) - 1])


# Settings that may differ on resume: they change neither the mechanism nor the course of what was trained so far.
_FREE_TO_CHANGE = {"target_epsilon", "fixed_shape"}


def _differences(saved: dict, now: dict) -> str:
    bound = [name for name in now if name not in _FREE_TO_CHANGE]
    return differences({name: saved.get(name) for name in bound}, {name: now[name] for name in bound})
