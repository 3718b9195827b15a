"""The operations of the autograd graph, as PyTorch shows them."""

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor

Node = Any  # torch.autograd.graph.Node: its attributes depend on the operation, and no type stub knows them
Edges = tuple[tuple[Node | None, int], ...]  # for each input of a node: what made it, and which of its outputs it is


def parts_of(node: Node, gradient: Tensor) -> Sequence[Tensor]:
    """Split the gradient of a node's output into those of the parameters that lie in it side by side, if it has `widths`."""
    widths = getattr(node, "widths", None)
    return gradient.split(widths, -1) if widths else (gradient,)


def output_shape(node: Node, number: int = 0) -> Size:
    return Size(node._input_metadata[number].shape)
