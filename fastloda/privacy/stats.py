"""The statistics of a private step, for its operator."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

WASTED = 0.95  # a step counts as wasted if more than this share of its samples had no finite gradient


@dataclass(frozen=True, repr=False)
class StepStats:
    """The counts over the samples of a step. They are statistics of private data: for the operator, not for release.

    They stay on the device until they are read, so that a step does not wait for the GPU; `+` adds those of micro-batches.
    """

    totals: Tensor  # float64 [4]: samples, clipped, nonfinite, sum of the finite samples' losses

    @property
    def samples(self) -> int:
        """The number of samples that were not masked."""
        return int(self.totals[0])

    @property
    def clipped(self) -> int:
        """The number of samples whose gradient was longer than its bound; with clipping per layer, in at least one layer."""
        return int(self.totals[1])

    @property
    def nonfinite(self) -> int:
        """The number of samples that contributed zero because their gradient was not finite."""
        return int(self.totals[2])

    @classmethod
    def of(cls, losses: Tensor, norms: Tensor, mask: Tensor, bounds: Tensor) -> "StepStats":
        """Count over a micro-batch: losses [samples * views], norms [groups, samples], mask [samples], bounds [groups, 1]."""
        finite, longer = norms.isfinite().all(0), (norms > bounds).any(0)
        loss = losses.detach().double().view(len(mask), -1).mean(1)
        counts = [mask, mask & finite & longer, mask & ~finite, torch.where(mask & finite, loss, 0.0)]
        return cls(torch.stack([count.sum(dtype=torch.float64) for count in counts]))

    @classmethod
    def none(cls, device: torch.device) -> "StepStats":
        """Make the statistics of no samples."""
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    @property
    def wasted(self) -> bool:
        """Whether so few samples had a finite gradient that the step released little but noise, at the full cost in privacy."""
        return self.nonfinite > WASTED * self.samples

    @property
    def clipped_fraction(self) -> float:
        """The share of samples that were clipped; 0 if there are no samples."""
        return self.clipped / self.samples if self.samples else 0.0

    @property
    def mean_loss(self) -> float:
        """The mean loss over the samples with a finite gradient; NaN if there is none."""
        finite = self.samples - self.nonfinite
        return float(self.totals[3]) / finite if finite else math.nan

    def warn_if_wasted(self, stacklevel: int = 2) -> None:
        """Warn if the step was wasted. This waits for the GPU."""
        if self.wasted:
            warnings.warn(
                f"{self.nonfinite} of {self.samples} samples had a gradient that is not finite and contributed zero: this step "
                "released little but noise, and was paid for. Look for an overflow in the model or the loss (float16?), and for "
                "parameters that are not finite",
                stacklevel=stacklevel + 1,
            )

    def __add__(self, other: "StepStats") -> "StepStats":
        return StepStats(self.totals + other.totals)

    def __repr__(self) -> str:
        counts = f"samples={self.samples}, clipped={self.clipped}, nonfinite={self.nonfinite}"
        return f"StepStats({counts}, mean_loss={self.mean_loss:.6g})"
