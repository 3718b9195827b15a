"""The operations of the autograd graph, as PyTorch shows them."""

from typing import Any

from torch import Size

Node = Any  # torch.autograd.graph.Node: its attributes depend on the operation, and no type stub knows them
Edges = tuple[tuple[Node | None, int], ...]  # for each input of a node: what made it, and which of its outputs it is


def output_shape(node: Node, number: int = 0) -> Size:
    return Size(node._input_metadata[number].shape)
