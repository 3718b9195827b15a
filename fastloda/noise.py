"""Gaussian noise for privacy: drawn in float64, from a generator that nobody else can foresee.

float32 `torch.randn` ends at 5.77 sigma on a CPU, which alone can cost a delta of 1.6e-4; float64 reaches beyond 8 sigma.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from fastloda.randomness import hold, unpredictable_generator
from fastloda.secure import SecureGenerator

NoiseSource = Generator | SecureGenerator
# From the sums that are about to be released to the source of their noise.
NoiseOver = Callable[[Sequence[Tensor]], NoiseSource]

FORESEEABLE = "fixed seed: an experiment; whoever knows the seed can foresee the noise, so it is no private release"
UNFORESEEABLE = "seeded by the operating system"
SECURE = "noise from the operating system's cryptographically secure generator; sampling seeded by the operating system"

_generators: dict[torch.device, Generator] = {}
# A forked child must not repeat its parent's noise.
os.register_at_fork(after_in_child=_generators.clear)


def describe_randomness(seed: int | None, secure: bool) -> str:
    """What a run's checkpoint and its privacy statement say of where the noise came from."""
    if seed is not None:
        return FORESEEABLE
    return SECURE if secure else UNFORESEEABLE


def noise_generator(device: torch.device | str = "cpu") -> Generator:
    """The process's own generator for a device, unpredictable: `torch.manual_seed` can't set it."""
    device = torch.device(device)
    if device not in _generators:
        _generators[device] = unpredictable_generator(device)
    return _generators[device]


def gaussian(shape: torch.Size, std: float, device: torch.device, generator: NoiseSource | None = None) -> Tensor:
    """N(0, std^2), float64, on `device`; a CPU generator draws on the CPU, so that its stream serves every device."""
    generator = generator or noise_generator(device)
    if isinstance(generator, SecureGenerator):
        noise = generator.normal(shape)
    else:
        noise = torch.randn(shape, generator=hold(generator), dtype=torch.float64, device=generator.device)
    return noise.mul_(std).to(device)
