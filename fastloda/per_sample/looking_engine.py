"""The replacement of PyTorch's autograd engine, by which FastLoDA inspects each backward pass that Python starts.

A *look* is a context that the engine enters around a pass. It inspects the pass at its start: later it would be too late to
refuse the pass, or its graph would be gone.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastloda.per_sample.averages import mark_averaged
from fastloda.per_sample.node import Node

Edge = tuple[Node, int]  # an operation, and which of its outputs
Look = Callable[[Sequence[Edge], Sequence[Tensor | None]], AbstractContextManager[None]]

_looks: list[Look] = []


class LookingEngine(type(Variable._execution_engine)):  # ty: ignore[unsupported-base]  # PyTorch's, or its replacement's
    """The engine that enters every look around a backward pass, and marks gradients of means (`averages.py`)."""

    def run_backward(self, tensors, grad_tensors, keep_graph, create_graph, inputs, *args, **kwargs):
        starts = [(_edge(root), grad) for root, grad in zip(tensors, grad_tensors) if _is_root(root)]
        with ExitStack() as looking:
            if not inputs:  # a pass to given inputs stops there, and need not reach the leaves
                for look in _looks:
                    looking.enter_context(look([root for root, _ in starts], [grad for _, grad in starts]))
            grads = super().run_backward(tensors, grad_tensors, keep_graph, create_graph, inputs, *args, **kwargs)
        if create_graph:
            mark_averaged(starts, inputs or (), grads)
        return grads


def look_at_backward(look: Look | None = None) -> None:
    """Replace PyTorch's engine by a `LookingEngine`, once, and add `look` to the looks that it enters.

    look: a function of the edges that a pass starts from, and of the gradient that each starts with, which returns the context
        to enter around the pass. It is called for every pass that goes down to all leaves.
    """
    if look is not None and look not in _looks:
        _looks.append(look)
    if not isinstance(Variable._execution_engine, LookingEngine):
        Variable._execution_engine = LookingEngine()


def _is_root(given: Tensor | GradientEdge) -> bool:
    return isinstance(given, GradientEdge) or given.requires_grad


def _edge(root: Tensor | GradientEdge) -> Edge:
    edge = root if isinstance(root, GradientEdge) else get_gradient_edge(root)
    return edge.node, edge.output_nr
