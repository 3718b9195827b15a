"""The normalisation of a classifier: over the batch as usual, or within each sample, as privacy requires."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

from fastloda.errors import UserError

Norm = Literal["group", "batch"]

NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "group": lambda groups, channels: nn.GroupNorm(groups, channels),
    "batch": lambda groups, channels: nn.BatchNorm2d(channels),
}


def norm_layer(norm: Norm, groups: int) -> Callable[[int], nn.Module]:
    """Make a function channels -> layer. "group" treats samples separately; "batch" mixes them, which a private step refuses.

    Raises:
        ValueError: the norm is unknown.
    """
    if norm not in NORMS:
        raise UserError(f"norm must be one of {sorted(NORMS)}, got {norm!r}")
    return partial(NORMS[norm], groups)
