"""Callbacks: the user's functions that a trainer calls after its steps, to log and to evaluate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastloda.errors import UserError
from fastloda.privacy.stats import StepStats

if TYPE_CHECKING:
    from fastloda.training.trainer import DPTrainer


@dataclass(frozen=True)
class StepReport:
    """The report of a private step.

    Attributes:
        step: number of private steps taken so far. Public, as are steps_left and epsilon.
        steps_left: number of steps until training ends, by the steps or by the budget.
        epsilon: upper bound on epsilon spent so far, at the settings' delta; `DPTrainer.epsilon` is a little tighter.
        private: statistics of the step's samples (mean_loss, clipped_fraction, samples, ...), computed from the private records
            without noise: for the operator's eyes, never to be published. Reading them waits for the GPU.
    """

    step: int
    steps_left: int
    epsilon: float
    private: StepStats


Callback = Callable[["DPTrainer", StepReport], object]


def evaluate_every(steps: int, evaluate: Callable[["DPTrainer"], object]) -> Callback:
    """Make a callback that calls evaluate(trainer) every `steps` steps and after the last one, within `trainer.averaged()`.

    Training goes on, bit for bit, as it would without the callback. What `evaluate` computes of private records is private.

    Raises:
        UserError: steps is no integer >= 1.
    """
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"evaluate_every() needs a number of steps >= 1, got {steps!r}")

    def callback(trainer: "DPTrainer", report: StepReport) -> None:
        if report.step % steps == 0 or not report.steps_left:
            with trainer.averaged():
                evaluate(trainer)

    return callback
