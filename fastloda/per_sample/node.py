"""The type of an operation in the autograd graph."""

from typing import Any

Node = Any  # torch.autograd.graph.Node: its attributes depend on the operation, and no type stub knows them
