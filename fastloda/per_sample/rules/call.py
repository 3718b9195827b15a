"""The argument of a rule: one call of its operation."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Size, Tensor

from fastloda.per_sample.batch_axis import batch_apart, locate
from fastloda.per_sample.node import Node


class Call(NamedTuple):
    """The call of an operation: its node, the gradient gy of its output, and the place of the batch in gy."""

    node: Node  # with the saved tensors
    gy: Tensor
    samples: int
    outer: int  # blocks before the batch coordinate: see `batch_axis.py`
    shapes: Mapping[int, Size]  # number of an input that is a parameter -> the shape in which it enters

    @property
    def place(self) -> tuple[int, int]:
        """The dimension of gy that holds the batch, and the blocks before it there."""
        return locate(self.gy.shape, self.outer)

    def first(self, t: Tensor) -> Tensor:
        """Bring the batch of t to the front: [rows, ...]; t has the leading dimensions of gy."""
        dim, blocks = self.place
        return t if self.samples == 1 or (dim, blocks) == (0, 1) else batch_apart(t, dim, blocks)

    def apart(self, t: Tensor) -> Tensor:
        """Split off the batch of t, placed as in gy: [rows, *t.shape]; its old dimension keeps the blocks before it, mostly 1.

        A batch of one sample owns all of t, wherever its batch dimension is.
        """
        return t[None] if self.samples == 1 else batch_apart(t, *self.place)
