"""The type of an operation in the autograd graph."""

from typing import Any

Node = Any  # torch.autograd.graph.Node, whose attributes depend on the operation, and which no stub knows
