"""Correlated noise as matrices: the strategy matrix C, and a noise source whose numbers show which noise a step was given."""

import torch

from fastloda.privacy.correlated import square_root


def strategy(bands: int, steps: int) -> torch.Tensor:
    """Make C [steps, steps], whose columns have norm at most 1."""
    c = torch.zeros(steps, steps, dtype=torch.float64)
    for k, value in enumerate(square_root(bands)[:steps]):
        c += value * torch.diag(torch.ones(steps - k, dtype=torch.float64), -k)
    return c


class Given:
    """A noise source that returns the given rows one after the other; its copies share the sequence."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __deepcopy__(self, _memo):
        return self

    def normal(self, shape):
        return next(self.rows).clone().view(shape)
