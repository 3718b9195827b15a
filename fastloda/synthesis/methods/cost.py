"""The cost of a private step: time and memory of one micro-batch, measured without a release."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastloda.synthesis.memory import peak_allocation
from fastloda.training.trainer import DPTrainer

REPEATS = 3


class StepCost(NamedTuple):
    """The cost of clipping and summing the gradients of `samples` records: forward, backward, norms, clipped sum."""

    seconds: float
    peak_bytes: int  # peak of the allocation, without model and optimizer
    trained: int  # number of trained parameters
    samples: int


def step_cost(trainer: DPTrainer, records: Sequence[Tensor]) -> StepCost:
    """Measure the cost of a micro-batch of a finished trainer; the sum is dropped, so that nothing is released.

    `records` are tensors with one record per row, of which as many are used as a micro-batch has.
    """
    samples = min(trainer.settings.micro_batch_size, len(records[0]))
    device = next(iter(trainer.parameters.values())).device
    generator = torch.Generator(device).manual_seed(0)
    batch = [t[:samples].to(device) for t in records]

    def accumulate() -> None:
        trainer.clipper.accumulate(trainer.losses(trainer.model, batch, generator))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    trainer.clipper.watch()  # the parameters may hold the average now
    accumulate()
    seconds = statistics.median(_seconds(accumulate) for _ in range(REPEATS))
    peak = peak_allocation(accumulate, device)
    trainer.clipper.reset()
    return StepCost(seconds, peak, sum(p.numel() for p in trainer.parameters.values()), samples)


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
