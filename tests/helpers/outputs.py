"""Private modules whose outputs a test chooses, so that it can compute any loss from them."""

import torch
from torch import nn

from fastloda.engine.module import PrivateModule, Tape

N, C, T = 6, 5, 4


Y = torch.tensor([0, 3, 1, 4, 2, 2])


class Leaf(nn.Module):
    """A model that returns its parameter, so that a test chooses the outputs."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x):
        return self.values + 0 * x.sum()


def outputs(*shape, reduction="mean", seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    module = PrivateModule(Leaf(values), Tape(reduction))
    return module(torch.zeros(1)), module._tape


class Several(nn.Module):
    """A model with several outputs."""

    def __init__(self, *shapes):
        super().__init__()
        self.outputs = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x):
        return [values + 0 * x.sum() for values in self.outputs]
