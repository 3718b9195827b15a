"""An optimizer whose `step()` is the private step: clip, sum, noise once, divide, count, and only then move."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastloda.coverage import check_optimizer
from fastloda.distributed import World
from fastloda.errors import PrivacyError
from fastloda.noise import NoiseSource
from fastloda.private_accountant import HistoryAccountant
from fastloda.private_loader import Tally
from fastloda.private_module import Tape
from fastloda.randomness import hold
from fastloda.step import GhostClipper, StepStats
from fastloda.styles import Clipping


class PrivateOptimizer(torch.optim.Optimizer):
    """Wraps a first-order `torch.optim.Optimizer`, for `make_private`; schedulers see the wrapped one's groups and state.

    `step()` takes what `loss.backward()` left at the private module's outputs. After a part of a batch (BatchMemoryManager) it
    only adds up the clipped gradients; the last part brings the noise, the accountant's count and the update. An empty batch is
    noised and counted like any other. `zero_grad()` also drops a backward pass that no step has used.

    Attributes:
        original_optimizer: the wrapped optimizer.
        noise_multiplier, max_grad_norm: may be changed between batches, by a rule that is public; the accountant is told the
            noise of each step. Adaptive clipping moves max_grad_norm by itself.
        expected_batch_size: sample_rate x records: the divisor, unless loss_reduction is "sum".
        last_step: steps that the budget pays for, or None; `step` refuses beyond them.
        stats: counts of the last logical batch (`StepStats`; its mean_loss is NaN, for the losses are not seen here). They are
            private: for the operator.
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
        clipping: Clipping,
        sample_rate: float,
        expected_batch_size: float,
        generator: NoiseSource | None = None,
        last_step: int | None = None,
    ):
        self.original_optimizer, self.tally, self.accountant = optimizer, tally, accountant
        self.noise_multiplier, self.max_grad_norm, self.clipping = noise_multiplier, max_grad_norm, clipping
        self.sample_rate, self.expected_batch_size, self.generator = sample_rate, expected_batch_size, generator
        if isinstance(generator, Generator):
            hold(generator)
        self.last_step = last_step
        self.stats: StepStats | None = None
        self._module, self._tape = module, tape
        self._world = World.of()
        self._batch: int | None = None  # the logical batch that the clipper holds parts of
        self._clipper: GhostClipper | None = None

    @property
    def loss_reduction(self) -> str:
        return self._tape.loss_reduction

    def epsilon(self, delta: float) -> float:
        """What all steps have cost, other optimizers' of the same engine included: an upper bound, add/remove adjacency."""
        return self.accountant.get_epsilon(delta)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One private step, or a part of one. A closure is called once, before it; its loss is returned.

        Raises:
            PrivacyError: no backward pass, no batch, a spent budget, or what GhostClipper and check_optimizer refuse. No
                parameter has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_ready()
        part = self.tally.take(self._tape.rows)
        if part.batch != self._batch:  # also drops the parts of a batch that was left before its end
            self._batch, self._clipper, self.stats = part.batch, self._new_clipper(), None
        check_optimizer(self.original_optimizer, self._clipper.parameters)
        stats = self._clipper.accumulate(self._tape.losses() if part.records else torch.zeros(0))
        stats = StepStats(stats.totals.index_fill(0, torch.tensor([3], device=stats.totals.device), torch.nan))
        self.stats = stats if self.stats is None else self.stats + stats
        self._tape.clear()
        if part.last:
            self._release()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._tape.clear()
        self.original_optimizer.zero_grad(set_to_none)

    def _check_ready(self) -> None:
        if self.__dict__.pop("grad_scale", None) is not None:
            raise PrivacyError(
                "GradScaler scales the loss, and so every gradient before it is clipped: train in bfloat16, which needs no "
                "scaler (GradScaler(enabled=False) leaves the loop as it is)"
            )
        self._world.unchanged()
        if self.last_step is not None and len(self.accountant) >= self.last_step:
            raise PrivacyError(
                f"the {self.last_step} steps that the privacy budget pays for are taken: no step is left"
            )
        drawn = self.tally.drawn
        if self._tape.empty and not (drawn and drawn[-1].records == 0):
            raise PrivacyError(
                "optimizer.step() needs one loss.backward() before it, through the module that make_private returned"
            )

    def _new_clipper(self) -> GhostClipper:
        """Anew for each batch: in between, the module may have moved to another device or have been loaded."""
        clipper = GhostClipper(self._module, self.max_grad_norm, clipping=self.clipping)
        clipper.max_grad_norm = self.max_grad_norm  # where adaptive clipping left it, not where it starts
        return clipper

    def _release(self) -> None:
        clipper = self._clipper
        clipper.privatize(self.noise_multiplier, self.expected_batch_size, self.generator)
        if self.loss_reduction == "sum":
            for parameter in clipper.parameters.values():
                parameter.grad.mul_(self.expected_batch_size)
        self.max_grad_norm = clipper.max_grad_norm
        self._batch = self._clipper = None
        # before the update: a step that fails from here on has been paid for
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        self.original_optimizer.step()

    @property
    def param_groups(self) -> list[dict]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> dict:
        return self.original_optimizer.state

    @state.setter
    def state(self, state: dict) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> dict:
        """The wrapped optimizer's."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict) -> None:
        self.original_optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer":
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.original_optimizer!r})"
