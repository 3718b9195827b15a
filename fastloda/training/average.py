"""Exponential moving average of parameters. Post-processing: free of privacy cost."""

import contextlib
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn


class Average:
    """average <- d average + (1 - d) parameters, with d = min(decay, (1 + step) / (10 + step)): a young average follows closely.

    decay 0 is the parameters themselves.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """Call after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """The average stands in the parameters inside, the parameters' own values after."""
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
    """parameters[name] <- values[name]"""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
