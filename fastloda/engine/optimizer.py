"""An optimizer whose `step()` is the private step: clip, sum, add noise once, divide, count, and only then update."""

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Generator as Yielding
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fastloda.accounting.compose import compose_epsilon
from fastloda.accounting.history import HistoryAccountant
from fastloda.accounting.mechanism import check_mechanism, check_noise, check_steps
from fastloda.engine.loader import Tally
from fastloda.engine.module import Tape
from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import check_optimizer, trainable_parameters
from fastloda.privacy.adaptive import AdaptiveClipping
from fastloda.privacy.noise import NoiseSource
from fastloda.privacy.ranks import World
from fastloda.privacy.stats import StepStats
from fastloda.privacy.step import GhostClipper
from fastloda.privacy.styles import Flat, check_max_grad_norm
from fastloda.randomness import hold, renew

PRIVACY = "privacy"  # key of the account in the state's first parameter group
NOISE = "noise"  # key of the correlated noise beside the account
OTHER_NOISE = (
    "a run whose noise is correlated goes on with the same bands, records, order of records, batch size and parameters. To begin "
    f"anew, with the account of what was spent, take {NOISE!r} out of the first parameter group's {PRIVACY!r}"
)
PASSING = ("step", "_opt_called", "grad_scale", "found_inf")  # attributes set by schedulers and scalers


class Budget(NamedTuple):
    """A run's privacy budget (epsilon, delta), calibrated for `steps` of one noise multiplier and sample rate.

    Only the first of every `bands` steps, whose noise is correlated, is charged.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    bands: int = 1

    def check(self, spent: list[tuple[float, float, int]]) -> None:
        """Refuse `spent` if it costs more than the budget; steps of more noise or a lower rate cost no more than planned.

        Raises:
            PrivacyError: `spent`, a list of (noise_multiplier, sample_rate, steps), exceeds the budget.
        """
        if all(noise >= self.noise_multiplier and rate <= self.sample_rate for noise, rate, _ in spent):
            if sum(steps for *_, steps in spent) * self.bands > self.steps:
                raise PrivacyError(
                    f"the {self.steps} steps that the privacy budget pays for are taken: no step is left"
                )
        elif compose_epsilon([(rate, noise, steps) for noise, rate, steps in spent], self.delta) > self.epsilon:
            raise PrivacyError(
                f"this step would exceed the privacy budget ({self.epsilon:.6g}, {self.delta:.6g}), planned for noise "
                f"{self.noise_multiplier:.6g} at rate {self.sample_rate:.6g}: some steps had less noise, or a higher rate"
            )


class PrivateOptimizer(torch.optim.Optimizer):
    """The wrapper of a first-order optimizer that `make_private` returns; schedulers see the wrapped one's groups and state.

    `step()` uses the gradients that `loss.backward()` stored at the private module's outputs. After a part of a batch
    (BatchMemoryManager) it only adds up the clipped gradients; after the last part it adds the noise, counts the step and makes
    the update. An empty batch is noised and counted like any other. `zero_grad()` also drops a backward pass that no step has
    used. Schedulers of PyTorch advance with private steps: a `scheduler.step()` after a part of a batch does nothing.

    Where `torch.distributed` is initialised, each rank steps with its own share of the batch, empty or not, and all take the
    same noisy step, which each of them counts.

    `state_dict()` contains the account; `load_state_dict`, or make_private of an optimizer that has loaded it, adds it to what
    was spent. A copy, pickled or not, continues with the same account, and draws its own noise even if a generator was given:
    two runs with the same noise would reveal the difference of their sums.

    With correlated noise `state_dict()` also contains the records' turns and, on rank 0 only, the noise of the last steps, and a
    new optimizer that loads it continues in the middle of the cycle. Keep such a state as secret as the noise, and continue from
    it only once. An optimizer that has taken steps continues with its own noise, whatever it loads; a copy starts without past
    noise.

    Attributes:
        original_optimizer: the wrapped optimizer.
        noise_multiplier, max_grad_norm: numbers that may be changed between batches, by a public rule; each step is accounted
            for with its own noise (with correlated noise: with that of the first of `bands` steps; none of the others may have
            less). Adaptive clipping changes max_grad_norm by itself.
        sample_rate: the probability with which a record enters a step (with correlated noise: a step that it may enter).
        expected_batch_size: the mean number of records of a batch, the divisor of the noisy sum unless loss_reduction is "sum".
        budget: the budget that `step` refuses to exceed, or None.
        stats: counts of the last logical batch on this rank (`StepStats`; mean_loss is NaN, since the losses are not known
            here). They are private, for the operator only.
    """

    _step_supports_amp_scaling = True  # so that GradScaler calls step(), which can refuse it

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: nn.Module,
        tape: Tape,
        tally: Tally,
        accountant: HistoryAccountant,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        clipping: Flat,
        sample_rate: float,
        expected_batch_size: float,
        run: dict[str, object],
        generator: NoiseSource | None = None,
    ):
        self.original_optimizer, self.tally, self.accountant = optimizer, tally, accountant
        self.noise_multiplier, self.max_grad_norm, self.clipping = noise_multiplier, max_grad_norm, clipping
        self.sample_rate, self.expected_batch_size, self.generator = sample_rate, expected_batch_size, generator
        if generator is not None:
            hold(generator)
        self.budget: Budget | None = None
        self.stats: StepStats | None = None
        self._module, self._tape, self._run = module, tape, run
        self._paid = 0.0  # the noise multiplier that the steps of this round may not fall below
        self._world = World.of()
        self._batch: int | None = None  # the logical batch that the clipper holds parts of
        self._clipper: GhostClipper | None = None
        _pass_parts_over()

    @property
    def loss_reduction(self) -> str:
        return self._tape.loss_reduction

    @property
    def last_step(self) -> int | None:
        """The number of steps that the budget pays for, or None."""
        return self.budget and self.budget.steps

    @property
    def accumulating(self) -> bool:
        """Whether the last `step()` was only a part of a batch, whose gradients were added up without noise, count or update."""
        return self._batch is not None

    _is_last_step_skipped = accumulating  # Opacus's name

    def epsilon(self, delta: float) -> float:
        """Compute an upper bound on the epsilon of all steps, also of the engine's other optimizers; add/remove adjacency."""
        return self.accountant.get_epsilon(delta)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one private step, or a part of one. A closure is called once, before the step, and its loss is returned.

        Raises:
            PrivacyError: there was no backward pass or no batch, the budget is spent, or GhostClipper or check_optimizer
                refuse. No parameter has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._world.unchanged()
        try:
            clipper = self._accumulate()
        except Exception as error:
            self._world.tell_failure(error)  # the other ranks wait in privatize
            raise
        if clipper:
            self._release(clipper)
        return loss

    def _accumulate(self) -> GhostClipper | None:
        """Add up the clipped gradients of a part of a batch; return the clipper that has them all after the last part."""
        self._check_ready()
        part = self.tally.take(self._tape.rows, self._tape.sizes)
        if part.batch != self._batch or self._clipper is None:  # also drops the parts of an unfinished batch
            self._batch, self._clipper, self.stats = part.batch, self._new_clipper(), None
        check_optimizer(self.original_optimizer, self._clipper.parameters)
        stats = self._clipper.accumulate(self._tape.losses() if part.records else torch.zeros(0))
        stats = StepStats(stats.totals.index_fill(0, torch.tensor([3], device=stats.totals.device), torch.nan))
        self.stats = stats if self.stats is None else self.stats + stats
        self._tape.clear()
        return self._clipper if part.last else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._tape.clear()
        self.original_optimizer.zero_grad(set_to_none)

    def drop_parts(self) -> None:
        """Drop the parts that no step has used, and the sum of an unfinished batch."""
        self.tally.drawn.clear()
        self._batch = self._clipper = None

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Refuse the call that Opacus's BatchMemoryManager makes before each part of a batch."""
        raise PrivacyError(
            "Opacus's BatchMemoryManager hands out parts of a batch without saying whose records they have: write `from fastloda "
            "import BatchMemoryManager` for its import, and leave the loop as it is"
        )

    def attach_step_hook(self, hook: Callable[["PrivateOptimizer"], None]) -> None:
        """Call `hook(optimizer)` in each private step after its noisy `.grad` is set, before the parameters are updated."""
        self.original_optimizer.register_step_pre_hook(lambda *_: hook(self))

    def _check_ready(self) -> None:
        if self.__dict__.pop("grad_scale", None) is not None:
            raise PrivacyError(
                "GradScaler scales the loss, and so every gradient before it is clipped: train in bfloat16, which needs no "
                "scaler (GradScaler(enabled=False) leaves the loop as it is)"
            )
        check_mechanism(
            self.sample_rate, self.noise_multiplier, 1
        )  # a mechanism that the account refuses must not be released
        self._check_paid()
        if self.budget:
            self.budget.check([*self.accountant.history, *self._costs()])
        drawn = self.tally.drawn
        if self._tape.empty and not (drawn and drawn[-1].records == 0):
            raise PrivacyError(
                "optimizer.step() needs one loss.backward() before it, through the module that make_private returned: a call of "
                "the wrapped module, or of one of its submodules, leaves nothing for a private step"
            )

    def _costs(self) -> list[tuple[float, float, int]]:
        """List what the next step adds to the account: nothing, if an earlier step of its round has paid for it."""
        noise = self.tally.noise
        return [] if noise.steps % noise.bands else [(self.noise_multiplier, self.sample_rate, 1)]

    def _check_paid(self) -> None:
        if not self._costs() and self.noise_multiplier < self._paid:
            noise = self.tally.noise
            raise PrivacyError(
                f"noise_multiplier={self.noise_multiplier:.6g} is less than the {self._paid:.6g} that the first of these "
                f"{noise.bands} steps has paid for; lower it at the first of the next {noise.bands} steps, step "
                f"{noise.steps // noise.bands * noise.bands + noise.bands + 1}"
            )

    def _new_clipper(self) -> GhostClipper:
        """Make a clipper for one batch only: before the next one the module may be moved to another device or loaded."""
        clipper = GhostClipper(self._module, self.max_grad_norm, clipping=self.clipping)
        clipper.max_grad_norm = self.max_grad_norm  # adaptive clipping's present bound, not its first
        clipper.noise = self.tally.noise
        return clipper

    def _release(self, clipper: GhostClipper) -> None:
        self._batch, self._clipper, costs = None, None, self._costs()
        with self._charged(costs):
            clipper.privatize(self.noise_multiplier, self.expected_batch_size, self.generator)
        if self.loss_reduction == "sum":
            for parameter in clipper.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.expected_batch_size)
        if isinstance(self.clipping, AdaptiveClipping):  # otherwise the caller may have changed it by now
            self.max_grad_norm = clipper.max_grad_norm
        self.original_optimizer.step()

    @contextmanager
    def _charged(self, costs: list[tuple[float, float, int]]) -> Yielding[None]:
        """Charge a step that is released in the context, even if an error or an interrupt comes right after."""
        released = self.tally.noise.steps
        try:
            yield
        finally:
            if self.tally.noise.steps > released:
                for noise, rate, _ in costs:
                    self.accountant.step(noise_multiplier=noise, sample_rate=rate)
                    self._paid = noise

    @property
    def param_groups(self) -> list[dict]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.original_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> dict:
        """Return the wrapped optimizer's state, with the account and the clipping bound in its first group, under "privacy".

        They stay there when an ordinary optimizer loads and saves the state, until `make_private` or `load_state_dict` reads
        it.
        """
        state = self.original_optimizer.state_dict()
        first, *others = state["param_groups"]
        return state | {"param_groups": [first | {PRIVACY: self.spent() | self._noise_state()}, *others]}

    def spent(self) -> dict[str, Any]:
        """Return the part of the state that another optimizer of the same records must take over."""
        return {"accountant": self.accountant.state_dict(), "max_grad_norm": self.max_grad_norm}

    def _noise_state(self) -> dict[str, Any]:
        noise = self.tally.noise
        if noise.bands == 1 or not noise.steps:
            return {}
        parameters = trainable_parameters(Members.of(self._module))
        place = {"run": self._run, "paid": self._paid, "steps": noise.steps, "turns": self.tally.turns}
        return {NOISE: place | {"past": noise.state(parameters)}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the wrapped optimizer's state, add its account to this one's, and continue from its adaptive clipping bound.

        Raises:
            ValueError: the state belongs to another optimizer, or is malformed, or its noise is another run's or is missing;
                nothing has changed then.
        """
        groups = state_dict["param_groups"]
        self._checked(groups)
        self.original_optimizer.load_state_dict(state_dict)
        if not any(PRIVACY in group for group in groups):
            warnings.warn(
                "this optimizer's state has no privacy account: the private steps that led to it, if any, are not counted in "
                "epsilon. engine.accountant.load_state_dict adds their account, if it was saved elsewhere",
                stacklevel=2,
            )
        self.take_in(groups)

    def take_in(self, groups: list[dict]) -> None:
        """Add the accounts in parameter groups to this one's, and continue from their adaptive clipping bound and their noise."""
        for privacy in self._checked(groups):
            self.accountant.load_state_dict(privacy["accountant"])
            if (saved := privacy.get(NOISE)) and not self.tally.noise.steps:
                self.tally.noise.load(saved["past"], saved["steps"], trainable_parameters(Members.of(self._module)))
                self._paid, self.tally.turns = saved["paid"], saved["turns"]
            if isinstance(self.clipping, AdaptiveClipping):
                self.max_grad_norm = privacy["max_grad_norm"]
        for group in self.param_groups:
            group.get(PRIVACY, {}).pop(NOISE, None)  # no other optimizer may continue from it

    def _checked(self, groups: list[dict]) -> list[dict]:
        """Check and list what parameter groups hold under "privacy".

        Raises:
            ValueError: it is malformed, or has noise that this optimizer would continue from, but can't.
        """
        found = [group[PRIVACY] for group in groups if PRIVACY in group]
        for privacy in found:
            try:
                HistoryAccountant().load_state_dict(privacy["accountant"])
                check_max_grad_norm(privacy["max_grad_norm"])
                if NOISE in privacy and not self.tally.noise.steps:
                    self._check_noise(**privacy[NOISE])
            except (TypeError, LookupError, AttributeError) as error:
                raise UserError(f"malformed privacy record in the optimizer's state: {error!r}") from error
        return found

    def _check_noise(self, run: dict, paid: float, steps: int, turns: Tensor, past: list[dict[str, Tensor]]) -> None:
        """Refuse to continue from the noise of another run, or from noise that lacks steps which the next one needs."""
        check_noise(paid)
        last = min(check_steps(steps, least=1), self.tally.noise.bands - 1)
        here = {name: p.shape for name, p in trainable_parameters(Members.of(self._module)).items()}
        alike = all({name: noise.shape for name, noise in each.items()} == here for each in past)
        different = [name for name, fact in self._run.items() if run[name] != fact] + ["the parameters"] * (not alike)
        different += ["the records' turns"] * (turns.shape != self.tally.turns.shape)
        if different:
            raise UserError(f"the state's noise is of a run that differs in {', '.join(different)}: {OTHER_NOISE}")
        if self._world.first and paid and len(past) != last:
            raise UserError(f"the state lacks the noise of the last steps, which rank 0 alone saves: {OTHER_NOISE}")

    def add_param_group(self, param_group: dict) -> None:
        self.original_optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict:
        """Leave out what a copy must not have: parts of a batch, and attributes that schedulers and scalers set."""
        state = {name: value for name, value in self.__dict__.items() if name not in PASSING}
        return state | {"_batch": None, "_clipper": None, "_world": None}

    def __setstate__(self, state: dict) -> None:
        """Restore a copy, and reseed its generators so that they draw other noise."""
        self.__dict__.update(state, _world=World.of())
        if self.generator is not None:
            renew(hold(self.generator))

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer":
            raise AttributeError(name)
        if name == "grad_samples":
            raise AttributeError(
                "per-sample gradients are not kept: fastloda.per_sample_grads(losses, model) computes them"
            )
        return getattr(self.original_optimizer, name)

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.original_optimizer!r})"


@functools.cache
def _pass_parts_over() -> None:
    """Patch PyTorch's schedulers, once in a process, to do nothing after a part of a batch: they would count it as a step.

    The loop that calls them may be another library's (Trainer, accelerate), which does not know of parts.
    """

    def by_step(step: Callable) -> Callable:
        @functools.wraps(step)
        def unless_accumulating(scheduler: Any, *args, **kwargs) -> Any:
            optimizer = getattr(scheduler, "optimizer", None)
            begun = hasattr(scheduler, "_last_lr")  # a new scheduler takes its first step by itself
            if begun and isinstance(optimizer, PrivateOptimizer) and optimizer.accumulating:
                return None
            return step(scheduler, *args, **kwargs)

        return unless_accumulating

    for kind in vars(lr_scheduler).values():
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and "step" in vars(kind):
            kind.step = by_step(kind.step)
