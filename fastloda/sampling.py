"""Poisson sampling by record: each step, every record enters independently with probability sample_rate.

The accountant's privacy amplification holds for this sampler and for no other; shuffled batches are not private to the same
epsilon (Chua et al. 2024, Lebeda et al. 2024).
"""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor


def poisson_sample(records: int, sample_rate: float, generator: Generator) -> Tensor:
    """Indices of the records of one step, ascending, possibly none. Drawn in float64: float32 would inflate small rates."""
    return (torch.rand(records, dtype=torch.float64, generator=generator) < sample_rate).nonzero().flatten()


def micro_batches(indices: Tensor, size: int, fixed_shape: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a logical batch into (indices, mask) of `size`, each record once; the last is padded with masked records.

    fixed_shape=False leaves the last one short instead, which saves its padding's work where shapes may vary.
    """
    for chosen in indices.split(size):
        padding = size - len(chosen) if fixed_shape else 0
        mask = torch.arange(len(chosen) + padding) < len(chosen)
        yield torch.cat([chosen, chosen.new_zeros(padding)]), mask
