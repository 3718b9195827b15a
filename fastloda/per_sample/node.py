"""The nodes and edges of the autograd graph, as PyTorch exposes them."""

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor

Node = Any  # torch.autograd.graph.Node: its attributes depend on the operation, and no type stub knows them
Edges = tuple[tuple[Node | None, int], ...]  # for each input of a node: the node that made it, and which output of that


def parts_of(node: Node, gradient: Tensor) -> Sequence[Tensor]:
    """Split the gradient of a node's output by the node's `widths`, if any: the sizes of the parameters joined in it."""
    widths = getattr(node, "widths", None)
    return gradient.split(widths, -1) if widths else (gradient,)


def output_shape(node: Node, number: int = 0) -> Size:
    return Size(node._input_metadata[number].shape)
