"""Public schedules of the noise and of the clipping bound, with the names and meaning of `opacus.schedulers`.

>>> noise_scheduler = ExponentialNoise(optimizer, gamma=0.99)
>>> for x, y in loader:
...     ...
...     optimizer.step()
...     noise_scheduler.step()

Each step is accounted for with its own noise. After a part of a batch (BatchMemoryManager) a schedule does not advance.
"""

import warnings
from collections.abc import Callable

from fastloda.engine.optimizer import PrivateOptimizer


class _Scheduler:
    """A schedule of one attribute of a private optimizer, applied when it is made and at each `step()`."""

    attribute: str

    def __init__(self, optimizer: PrivateOptimizer, *, last_epoch: int = -1):
        if not isinstance(optimizer, PrivateOptimizer):
            raise TypeError(f"optimizer must be the one that make_private returned, got {type(optimizer).__name__}")
        self.optimizer, self.last_epoch = optimizer, last_epoch
        self._advance()

    def step(self) -> None:
        if not self.optimizer.accumulating:
            self._advance()

    def _advance(self) -> None:
        self.last_epoch += 1
        setattr(self.optimizer, self.attribute, self.value())

    @property
    def now(self) -> float:
        return getattr(self.optimizer, self.attribute)

    def value(self) -> float:
        """Compute the attribute's value at step `last_epoch`."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Return plain values: all but the optimizer and functions, and the attribute's present value as "now"."""
        held = {name: held for name, held in vars(self).items() if name != "optimizer" and not callable(held)}
        return held | {"now": self.now}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a state. Opacus's states don't hold the attribute's value, which then stays as it is, with a warning."""
        state = dict(state_dict)
        now = state.pop("now", None)
        if now is None:
            warnings.warn(
                f"this state does not say what {self.attribute} was: set optimizer.{self.attribute} to it", stacklevel=2
            )
        else:
            setattr(self.optimizer, self.attribute, now)
        vars(self).update(state)


class _Noise(_Scheduler):
    attribute = "noise_multiplier"


class _GradClip(_Scheduler):
    attribute = "max_grad_norm"


class _Exponential(_Scheduler):
    def __init__(self, optimizer: PrivateOptimizer, *, gamma: float, last_epoch: int = -1):
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def value(self) -> float:
        return self.now * self.gamma if self.last_epoch else self.now


class _Step(_Scheduler):
    def __init__(self, optimizer: PrivateOptimizer, *, step_size: int, gamma: float, last_epoch: int = -1):
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def value(self) -> float:
        return self.now * self.gamma if self.last_epoch and self.last_epoch % self.step_size == 0 else self.now


class _Lambda(_Scheduler):
    def __init__(self, optimizer: PrivateOptimizer, function: Callable[[int], float], last_epoch: int):
        self.function, self.base = function, getattr(optimizer, self.attribute)
        super().__init__(optimizer, last_epoch=last_epoch)

    def value(self) -> float:
        return self.base * self.function(self.last_epoch)


class ExponentialNoise(_Exponential, _Noise):
    """A schedule that multiplies the noise multiplier by gamma at each step."""


class StepNoise(_Step, _Noise):
    """A schedule that multiplies the noise multiplier by gamma at every step_size-th step."""


class LambdaNoise(_Lambda, _Noise):
    """A schedule that sets the noise multiplier to noise_lambda(number of steps) times its first value."""

    def __init__(self, optimizer: PrivateOptimizer, *, noise_lambda: Callable[[int], float], last_epoch: int = -1):
        super().__init__(optimizer, noise_lambda, last_epoch)


class ExponentialGradClip(_Exponential, _GradClip):
    """A schedule that multiplies the clipping bound by gamma at each step."""


class StepGradClip(_Step, _GradClip):
    """A schedule that multiplies the clipping bound by gamma at every step_size-th step."""


class LambdaGradClip(_Lambda, _GradClip):
    """A schedule that sets the clipping bound to scheduler_function(number of steps) times its first value."""

    def __init__(
        self, optimizer: PrivateOptimizer, *, scheduler_function: Callable[[int], float], last_epoch: int = -1
    ):
        super().__init__(optimizer, scheduler_function, last_epoch)
