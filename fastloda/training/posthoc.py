"""Averages of the parameters whose length is chosen after training (Karras et al. 2024, "Analyzing and improving the training
dynamics of diffusion models", section 3).

The average of power p after t steps weighs the parameters of step s by (s^p - (s - 1)^p) / t^p. Its length, the standard
deviation of s / t under these weights, is the same for every large t. Two such averages are kept, and copied at some steps; an
average of another length is nearly a linear combination of these copies. This is post-processing, without privacy cost, as long
as the length is not chosen by private records.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastloda.errors import UserError

KEPT = (0.05, 0.1)  # the lengths of the two; 32 copies of each serve for lengths of 0.03 to 0.2
LONGEST = 12**-0.5  # of power 1: all steps alike
MISFIT = 0.05  # the largest error of an average's weights, as a share of their norm


def power(length: float) -> float:
    """Compute the power p whose length, for many steps p^(1/2) / ((p + 1) (p + 2)^(1/2)), is `length`."""
    if not 0 < length <= LONGEST + 1e-9:
        raise UserError(f"the length of an average must be above 0, and at most {LONGEST:.3f}, got {length!r}")
    return float(np.roots([1, 4, 5 - length**-2, 2]).real.max())


def weights(length: float, step: int, steps: int) -> np.ndarray:
    """Compute the weights [steps] of steps 1 to `steps` in the average after `step`; the steps after it have weight 0."""
    return np.diff(np.minimum(np.arange(steps + 1) / step, 1) ** power(length))


class Snapshots:
    """The copies of two averages at `count` moments of a run, from which averages of other lengths are made; 0 keeps none."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], steps: int, count: int):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UserError(f"snapshots must be an integer >= 0, got {count!r}")
        self._parameters, self._steps, self._count = parameters, steps, count
        self._step = 0
        self._averages = [{name: p.detach().clone() for name, p in parameters.items()} for _ in KEPT if count]
        self._taken: list[tuple[int, float, Mapping[str, Tensor]]] = []  # step, length, values

    def update(self, step: int) -> None:
        """Update the averages after optimizer step number `step`, counted from 1; steps may be left out."""
        due = step * self._count // self._steps > self._step * self._count // self._steps
        for length, values in zip(KEPT, self._averages):
            present = [p.detach() for p in self._parameters.values()]
            torch._foreach_lerp_(list(values.values()), present, 1 - (self._step / step) ** power(length))
            if due:
                self._taken.append((step, length, {name: value.to("cpu", copy=True) for name, value in values.items()}))
        self._step = step

    def average(self, length: float) -> dict[str, Tensor]:
        """Make the average of a relative length, as of the step of the last copies.

        Raises:
            UserError: length is out of range, or there are no copies of which such an average could be made.
        """
        power(length)
        if not self._taken:
            raise UserError("there are no snapshots of which an average could be made: train with snapshots=32, say")
        last = self._taken[-1][0]
        basis = np.stack([weights(kept, step, last) for step, kept, _ in self._taken], axis=1)
        wanted = weights(length, last, last)
        shares = np.linalg.lstsq(basis, wanted, rcond=None)[0]
        misfit = float(np.linalg.norm(basis @ shares - wanted) / np.linalg.norm(wanted))
        if misfit > MISFIT:
            raise UserError(
                f"an average of length {length:g} would be off by {misfit:.0%}: {self._count} snapshots are too few for it"
            )
        shares /= shares.sum()
        copies = {name: torch.stack([values[name] for *_, values in self._taken]) for name in self._parameters}
        return {
            name: torch.tensordot(torch.from_numpy(shares).to(each.dtype), each, 1) for name, each in copies.items()
        }

    def state(self) -> dict[str, Any]:
        """Collect everything from which `load` continues; nothing, if no copies are kept."""
        if not self._count:
            return {}
        return {"step": self._step, "count": self._count, "averages": self._averages, "taken": self._taken}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            UserError: it is of another number of snapshots.
        """
        if (count := state.get("count", 0)) != self._count:
            raise UserError(f"the run was begun with snapshots={count}, and not {self._count}")
        if not count:
            return
        self._step, self._taken = state["step"], list(state["taken"])
        for values, saved in zip(self._averages, state["averages"]):
            for name, value in values.items():
                value.copy_(saved[name])
