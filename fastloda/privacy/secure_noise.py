"""Noise from the operating system's cryptographically secure generator.

The generators of `NoiseStream` and of PyTorch on a GPU were made for speed; the system's is a cipher made to withstand attacks
(ChaCha20 on Linux, reseeded by the kernel). It can't be seeded, and this process has no state of it. So neither a forked
process nor a resumed run can repeat its noise; steps that a resumed run makes again are charged again (`training/releases.py`).
"""

import math
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastloda.errors import UserError

CHUNK = 1 << 18  # numbers at a time: the temporaries of one chunk stay in the cache
BITS = 63


@dataclass(frozen=True)
class SecureGenerator:
    """The secure source of noise, to be passed in place of a `torch.Generator` wherever FastLoDA draws noise.

    It draws on the CPU, and the noise then moves to the model's device. Cost: a number takes about 12 times as long as one of a
    `NoiseStream`, about 3 times with averaged=1 (measured once on a million numbers, on one thread of a CPU). It grows with the
    trainable parameters, not with the batch.

    Attributes:
        averaged: how many Gaussian numbers are added, and the sum divided by the root of their count, to make each Gaussian
            number. The gaps between the floating-point values of a single number let an attacker rule out candidates for the
            value under the noise (Mironov 2012); with four the attacker would have to try 2^159 (Holohan & Braghin 2021,
            https://arxiv.org/abs/2107.10138, section 5.1). 1 is faster.
    """

    averaged: int = 4
    device: ClassVar[torch.device] = torch.device("cpu")

    def __post_init__(self):
        if not isinstance(self.averaged, int) or isinstance(self.averaged, bool) or self.averaged < 1:
            raise UserError(f"averaged must be an integer >= 1, got {self.averaged!r}")

    def normal(self, shape: torch.Size) -> Tensor:
        """Draw independent N(0, 1) numbers of this shape, float64, on the CPU."""
        noise = torch.zeros(shape, dtype=torch.float64)
        for part in noise.view(-1).split(CHUNK):
            for _ in range(self.averaged):
                part += box_muller(uniform(len(part) + len(part) % 2))[: len(part)]
        return noise.div_(math.sqrt(self.averaged))


def uniform(count: int) -> Tensor:
    """Draw `count` uniform numbers (k + 1/2) / 2^63, k of 63 random bits, rounded to float64: in (0, 1], down to 2^-64."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) if count else torch.zeros(0).long()
    return bits.bitwise_and_(2**BITS - 1).double().add_(0.5).mul_(2.0**-BITS)


def box_muller(uniforms: Tensor) -> Tensor:
    """Compute as many independent normal numbers as there are `uniforms`, an even number (Box & Muller 1958).

    sqrt(-2 log u) cos(2 pi v) and ... sin(2 pi v): exact up to rounding. The smallest u, 2^-64, gives at most 9.4 sigma.
    """
    u, v = uniforms.view(2, -1)
    radius, angle = u.log().mul_(-2).sqrt_(), v * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])
