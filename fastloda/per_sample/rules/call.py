"""One call of an operation, as its rule sees it."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Size, Tensor

from fastloda.per_sample.batch_axis import batch_apart, locate
from fastloda.per_sample.node import Node


class Call(NamedTuple):
    """The operation's node (its saved tensors), the gradient of its output, and where the batch lies in that."""

    node: Node
    gy: Tensor
    samples: int
    outer: int  # blocks before the batch coordinate: see `batch_axis.py`
    shapes: Mapping[int, Size]  # input -> the shape in which a parameter enters there

    @property
    def place(self) -> tuple[int, int]:
        """The dimension of gy that holds the batch, and the blocks before it there."""
        return locate(self.gy.shape, self.outer)

    def first(self, t: Tensor) -> Tensor:
        """t, which has the leading dimensions of gy, with the batch first: [rows, ...]."""
        dim, blocks = self.place
        return t if self.samples == 1 or (dim, blocks) == (0, 1) else batch_apart(t, dim, blocks)

    def apart(self, t: Tensor) -> Tensor:
        """[rows, *t.shape], where the dimension that holds the batch keeps only the blocks before it, mostly 1.

        A lone sample owns all of t, wherever its batch dimension is.
        """
        return t[None] if self.samples == 1 else batch_apart(t, *self.place)
