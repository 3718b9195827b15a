"""Learning-rate schedules: linear warm-up, then constant or cosine to zero."""

import math
from functools import partial
from typing import Literal

import torch

Schedule = Literal["constant", "cosine"]


def warmup_then(
    optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Scale the optimizer's learning rate over `steps`; call `.step()` after each optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, schedule, steps, warmup))


def _factor(schedule: Schedule, steps: int, warmup: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
