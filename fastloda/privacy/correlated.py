"""Noise that is correlated between steps, so that much of it cancels when an optimizer adds up the steps' gradients.

Banded matrix factorisation (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization"): step t's noise y_t solves
C y = z for independent noise z, where C [steps, steps] is lower triangular with `bands` diagonals. The release is then
C^-1 (C G + z) for the clipped sums G. If a record enters at most one of any `bands` consecutive steps, the sets of rows of C G
that it changes in different steps do not overlap, and each step changes them by its clipped gradient times a column of C, whose
norm is at most 1. So the privacy is that of ceil(steps / bands) sums with independent noise. `training/sampling.py` draws such
batches: each record has a turn of its own, drawn at random, so that one record more or less changes no other record's steps.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastloda.errors import PrivacyError, UserError
from fastloda.privacy.noise import NoiseSource, add_noise
from fastloda.privacy.sums import Alike, FlatSums


def square_root(bands: int) -> list[float]:
    """Compute the values of C's diagonals: those of the square root of the matrix of prefix sums, cut and scaled to norm 1.

    Before scaling, the k-th value is the k-th coefficient of (1 - x)^(-1/2) (Kalinin and Lampert 2024, "Banded square root
    matrix factorization").
    """
    diagonals = list(accumulate(range(1, bands), lambda before, k: before * (2 * k - 1) / (2 * k), initial=1.0))
    norm = math.hypot(*diagonals)
    return [diagonal / norm for diagonal in diagonals]


class CorrelatedNoise:
    """The source of correlated noise for a run's steps in order; with one band the noise is independent.

    It holds bands - 1 vectors of the size of the sums, in float64. A copy and a forked child start again without past noise:
    if two runs continued from the same noise, a record's column of C would have rows in both, and a norm above 1.

    Attributes:
        bands: the number of diagonals of C.
        steps: the number of steps released since the noise began.

    Raises:
        UserError: bands is no integer >= 1.
    """

    def __init__(self, bands: int):
        if not isinstance(bands, int) or isinstance(bands, bool) or bands < 1:
            raise UserError(f"bands must be an integer >= 1, got {bands!r}")
        self.bands = bands
        self._first, *self._others = square_root(bands)
        self.forget()
        _all.add(self)

    def __reduce__(self):
        return CorrelatedNoise, (self.bands,)

    def forget(self) -> None:
        """Start again, as if no step had been made: C then has two blocks, whose columns have no larger norms than before."""
        self.steps = 0
        self._past: list[Mapping[Alike, Tensor]] = []  # the noise of the last steps, in units of std; the latest first
        self._now: Mapping[Alike, Tensor] | None = None

    def add(self, sums: Mapping[Alike, Tensor], std: float, source: NoiseSource | None) -> dict[Alike, Tensor]:
        """Return the float64 sums plus the next step's noise of standard deviation `std`; call `released` once it is used.

        Raises:
            PrivacyError: the parameters were moved or cast since the last step, or others train.
        """
        self._now = None  # an earlier call may have drawn noise that was not released
        if self.bands == 1 or not std:
            return {alike: add_noise(total, std, source) for alike, total in sums.items()}
        self._check_alike(sums)
        self._now = {
            alike: self._solved(alike, add_noise(torch.zeros_like(total), 1.0, source)) for alike, total in sums.items()
        }
        return {alike: total + std * self._now[alike] for alike, total in sums.items()}

    def _check_alike(self, sums: Mapping[Alike, Tensor]) -> None:
        sizes = _sizes(sums)
        if any(_sizes(past) != sizes for past in self._past):
            raise PrivacyError(
                "the model was moved or cast since the last step, or other parameters train, but the noise of this run is "
                "correlated over its steps: do that before the first one, or load the noise's state on the new device"
            )

    def _solved(self, alike: Alike, fresh: Tensor) -> Tensor:
        """Solve the next row of C y = z for y, given z = fresh."""
        for diagonal, past in zip(self._others, self._past):
            fresh.sub_(past[alike], alpha=diagonal)
        return fresh / self._first

    def released(self) -> None:
        """Count a step with the noise of the last `add`; if that was none (as on ranks other than 0), drop the past noise."""
        self.steps += 1
        self._past = [] if self._now is None else [self._now, *self._past][: self.bands - 1]
        self._now = None

    def state(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Tensor]]:
        """Collect the noise of the last bands - 1 steps by parameter; this state must stay secret."""
        sums = FlatSums(parameters)
        self._check_alike(sums.buffers)
        return [sums.parted(past) for past in self._past]

    def load(self, state: Sequence[Mapping[str, Tensor]], steps: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Continue from a `state` that was saved after `steps` steps, on the devices where the parameters are now."""
        self.forget()
        self.steps = steps
        for saved in state:
            sums = FlatSums(parameters)
            sums.add_({name: noise.to(parameters[name].device) for name, noise in saved.items()})
            self._past.append(sums.buffers)


def _sizes(buffers: Mapping[Alike, Tensor]) -> dict[Alike, int]:
    return {alike: len(buffer) for alike, buffer in buffers.items()}


_all: WeakSet[CorrelatedNoise] = WeakSet()


def _part_from_parent() -> None:
    for noise in _all:
        noise.forget()


os.register_at_fork(after_in_child=_part_from_parent)
