"""Gaussian noise for privacy: drawn in float64, from a generator that nobody else can foresee.

float32 `torch.randn` ends at 5.77 sigma on a CPU, which alone can cost a delta of 1.6e-4; float64 reaches beyond 8 sigma.
"""

import os

import torch
from torch import Generator, Tensor

from fastloda.randomness import unpredictable_generator

_generators: dict[torch.device, Generator] = {}
# A forked child must not repeat its parent's noise.
os.register_at_fork(after_in_child=_generators.clear)


def noise_generator(device: torch.device | str = "cpu") -> Generator:
    """The process's own generator for a device, unpredictable: `torch.manual_seed` can't set it."""
    device = torch.device(device)
    if device not in _generators:
        _generators[device] = unpredictable_generator(device)
    return _generators[device]


def gaussian(shape: torch.Size, std: float, device: torch.device, generator: Generator | None = None) -> Tensor:
    """N(0, std^2), float64, on `device`; a CPU generator draws on the CPU, so that its stream serves every device."""
    generator = generator or noise_generator(device)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return noise.mul_(std).to(device)
