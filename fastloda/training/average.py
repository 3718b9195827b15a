"""An exponential moving average of parameters. It is post-processing, without privacy cost."""

import contextlib
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn


class Average:
    """A moving average: average <- d average + (1 - d) parameters, with d = min(decay, (1 + step) / (10 + step)).

    A young average follows the parameters closely; with decay 0 it equals them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """Update the average after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """Put the average into the parameters inside the context, and restore their own values after it."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            copy_into(self.parameters, self.values)
            yield
        finally:
            copy_into(self.parameters, own)

    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])


def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values[name] into parameters[name], for each name."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
