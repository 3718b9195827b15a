"""Fewer images, with the classes in the same proportion."""

import torch
from torch import Generator, Tensor

from fastloda.errors import UserError

from .images import LabelledImages


def stratified_subset(
    data: LabelledImages, *, count: int | None = None, fraction: float | None = None, seed: int = 0
) -> LabelledImages:
    """Draw a random part of the images, in their order, with each class's share of them to within one image.

    1% of CIFAR-10 is 500 images, 50 of each class. A model trained privately on the subset promises privacy to its records.

    Args:
        data: images to draw from, at least one.
        count: number of images, unless `fraction` is given.
        fraction: share of the images, rounded to a whole number of them.
        seed: seed of the choice.

    Raises:
        ValueError: not exactly one of count and fraction is given, or they do not choose at least one image and at most all.
    """
    if (count is None) == (fraction is None):
        raise UserError(f"give count or fraction, not {count=} and {fraction=}")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"fraction must lie in (0, 1], not {fraction}")
    chosen = count if fraction is None else round(fraction * len(data))
    if not 1 <= chosen <= len(data):
        raise UserError(f"{chosen} of {len(data)} images are no subset")
    generator = Generator().manual_seed(seed)
    shares = _shares(data.labels.bincount(minlength=data.num_classes), chosen)
    return data[torch.cat([_draw(data.labels == y, share, generator) for y, share in enumerate(shares)]).sort().values]


def _shares(sizes: Tensor, chosen: int) -> list[int]:
    """Divide `chosen` in proportion to sizes; the rest from rounding goes to the largest remainders, the first of equal ones."""
    total = int(sizes.sum())
    whole, left = sizes * chosen // total, sizes * chosen % total
    most = left.argsort(descending=True, stable=True)[: chosen - int(whole.sum())]
    whole[most] += 1
    return whole.tolist()


def _draw(mask: Tensor, share: int, generator: Generator) -> Tensor:
    """Draw the positions of `share` images from those that the mask selects."""
    positions = mask.nonzero()[:, 0]
    return positions[torch.randperm(len(positions), generator=generator)[:share]]
