"""Poisson sampling: each record, or each owner, enters each step independently with probability sample_rate.

The accountant's privacy amplification holds for this sampler and for no other; shuffled batches are not private to the same
epsilon (Chua et al. 2024, Lebeda et al. 2024).
"""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from fastloda.errors import UserError


def poisson_sample(records: int, sample_rate: float, generator: Generator) -> Tensor:
    """Draw the indices of one step's records, ascending, possibly none; in float64, for float32 would inflate small rates."""
    return (torch.rand(records, dtype=torch.float64, generator=generator) < sample_rate).nonzero().flatten()


def cyclic_rate(sample_rate: float, bands: int) -> float:
    """Compute the probability with which a record enters those steps that it may enter, of which there is one in `bands`.

    Raises:
        UserError: it would be more than 1.
    """
    if bands > 1 and not sample_rate * bands <= 1:
        raise UserError(
            f"with bands={bands} a record enters a step with {bands} x sample_rate, which may be at most 1: got "
            f"sample_rate={sample_rate!r}"
        )
    return sample_rate * bands


def cyclic_sample(records: int, sample_rate: float, step: int, bands: int, generator: Generator) -> Tensor:
    """Draw a Poisson sample of those records that may enter this step: record i enters steps i mod bands only.

    `sample_rate` is the mean over all steps; those that may enter do so with the `cyclic_rate` (Choquette-Choo et al. 2023,
    b-min-sep sampling by b-cyclic Poisson batches).
    """
    may_enter = torch.arange(step % bands, records, bands)
    return may_enter[poisson_sample(len(may_enter), cyclic_rate(sample_rate, bands), generator)]


def share(indices: Tensor, rank: int, ranks: int, bands: int = 1) -> Tensor:
    """Select the indices of one rank's records, or owners, so that none is ever on two ranks.

    Those that may enter a step, of which there is one in `bands`, are dealt to the ranks in turn.
    """
    return indices[indices // bands % ranks == rank]


def largest_share(indices: Tensor, ranks: int, bands: int = 1) -> int:
    """Count the records of the rank that has most of them."""
    return int(torch.bincount(indices // bands % ranks, minlength=ranks).max())


def micro_batches(
    indices: Tensor, size: int, fixed_shape: bool = True, at_least: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a logical batch into (indices, mask) of `size`, each record once; the last is padded with masked records.

    fixed_shape=False leaves the last one short instead, which saves its padding's work where shapes may vary.
    `at_least` is the least number of micro-batches, none of them empty; those without records hold masked ones only.
    """
    parts = indices.split(size)
    for chosen in (*parts, *[indices[:0]] * (at_least - len(parts))):
        width = size if fixed_shape else max(len(chosen), min(at_least, 1))
        if not width:  # nothing was sampled, and nothing need be computed
            continue
        padding = width - len(chosen)
        mask = torch.arange(len(chosen) + padding) < len(chosen)
        yield torch.cat([chosen, chosen.new_zeros(padding)]), mask
