"""The check that a run can still learn: its parameters are finite, and so are some gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastloda.privacy.stats import StepStats

WASTED_STEPS, WASTED_SAMPLES = 3, 20  # wasted steps in a row, and samples in all of them, at which a run stops


class Waste:
    """The count of the latest consecutive steps that released noise alone, as nearly no sample had a finite gradient."""

    def __init__(self, device: torch.device):
        self._device = device
        self._forget()

    def _forget(self) -> None:
        self._steps, self._stats = 0, StepStats.none(self._device)

    def add(self, stats: StepStats) -> None:
        """Add a step's counts, summed over all ranks."""
        if stats.wasted:
            self._steps, self._stats = self._steps + 1, self._stats + stats
        elif stats.samples:
            self._forget()

    def check(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Refuse to pay for more steps that gain nothing.

        Raises:
            RuntimeError: a parameter is not finite after the step, or the last steps were wasted.
        """
        norms = torch._foreach_norm([p.detach() for p in parameters.values()])  # one call for all parameters is fast
        if not torch.stack([norm.float() for norm in norms]).isfinite().all():
            for name, p in parameters.items():
                if not p.isfinite().all():
                    raise RuntimeError(
                        f"parameter {name!r} is not finite after step {step}, and no later gradient can be: start anew with "
                        "what trains in float32 or bfloat16, or a lower learning rate (and this run's releases as `earlier`)"
                    )
        if self._steps >= WASTED_STEPS and self._stats.samples >= WASTED_SAMPLES:
            raise RuntimeError(
                f"{self._stats.nonfinite} of {self._stats.samples} samples of the last {self._steps} steps had no finite "
                "gradient: their budget bought noise alone, and no more is spent. Look for an overflow in the model or the "
                "losses (float16?); a new trainer goes on from the checkpoint"
            )
