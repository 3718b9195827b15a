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


def draw_turns(records: int, bands: int, generator: Generator) -> Tensor:
    """Draw each record's turn [records], 0 .. bands - 1: it may enter the steps t with t mod bands = turn only.

    The turns are independent of each other, uniform, and kept for the whole run. So one record more or less does not change in
    which steps the others take part, as it would if turns followed from the records' order.
    """
    if bands == 1:  # nothing is drawn
        return torch.zeros(records, dtype=torch.long)
    return torch.randint(bands, (records,), generator=generator)


def cyclic_sample(turns: Tensor, sample_rate: float, step: int, bands: int, generator: Generator) -> Tensor:
    """Draw a Poisson sample of the records whose turn it is in this step, as ascending indices.

    `sample_rate` is the mean over all steps; those that may enter do so with the `cyclic_rate` (Choquette-Choo et al. 2023,
    b-min-sep sampling by b-cyclic Poisson batches).
    """
    may_enter = (turns == step % bands).nonzero().flatten()
    return may_enter[poisson_sample(len(may_enter), cyclic_rate(sample_rate, bands), generator)]


def share(indices: Tensor, rank: int, ranks: int) -> Tensor:
    """Select the indices of one rank's records, or owners, so that none is ever on two ranks."""
    return indices[indices % ranks == rank]


def largest_share(indices: Tensor, ranks: int) -> int:
    """Count the records of the rank that has most of them."""
    return int(torch.bincount(indices % ranks, minlength=ranks).max())


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
