"""An exponential moving average of parameters. It is post-processing, without privacy cost."""

import contextlib
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn

from fastloda.errors import UserError


class Average:
    """A moving average: average <- d average + (1 - d) parameters, with d = min(decay, (1 + step) / (10 + step)).

    A young average follows the parameters closely; with decay 0 it equals them.

    Attributes:
        is_in_place: whether the model holds the average now, instead of the parameters that are trained.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay, self.is_in_place = parameters, decay, False
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, step: int) -> None:
        """Update the average after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self, values: Mapping[str, Tensor] | None = None) -> Generator[None]:
        """Put the average, or `values`, into the parameters inside the context, and restore their own values after it.

        Raises:
            UserError: the average is in place already.
        """
        self.check_not_in_place()
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.is_in_place = True
        try:
            copy_into(self.parameters, self.values if values is None else values)
            yield
        finally:
            copy_into(self.parameters, own)
            self.is_in_place = False

    def check_not_in_place(self) -> None:
        """Refuse to train or to save while the model holds the average."""
        if self.is_in_place:
            raise UserError("the model holds the averaged parameters: leave `averaged()` before you train or save")

    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Generator[None]:
    """Put a model into eval mode inside the context, and each of its modules back into its own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values[name] into parameters[name], for each name."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
