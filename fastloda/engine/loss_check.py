"""Checks of the graph between a private module's outputs and the loss: it must be a mean, or sum, of each sample's own loss.

The private step sees the loss only as a gradient at the module's outputs. If one sample's gradient there depended on the
others, a record could change more than its own clipped gradient. So no gradient enters the outputs before the graph of the loss
has been checked (`per_sample/sample_flow.py`): the check runs when Python starts any backward pass
(`per_sample/looking_engine.py`), and opens the outputs for this one pass. Outputs that were not opened refuse their gradient,
so that a pass that was started otherwise (from C++ or TorchScript) ends there.
"""

from collections.abc import Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastloda.engine.unhooked import Grads, UnhookedPass, check_saved
from fastloda.errors import PrivacyError
from fastloda.per_sample.graph import nodes_below
from fastloda.per_sample.looking_engine import Edge, look_at_backward
from fastloda.per_sample.node import Edges, Node
from fastloda.per_sample.operations import MEAN, SUM
from fastloda.per_sample.sample_flow import SampleFlow

BOUNDARY = "PrivateOutputsBackward"  # how the autograd graph names a private module's outputs
OWN_LOSS = (
    "the private module's output is a single number for all samples, which is not computed of its other outputs alone (a loss?): "
    "return one row per sample, and take the mean outside; or return, beside the loss, the logits of which it is computed"
)

_waiting: WeakSet[object] = WeakSet()  # outputs that a backward pass may still reach


def wait_for_backward(outputs: Node) -> None:
    """Register the outputs, by their node of the graph, so that every backward pass that reaches them is checked."""
    look_at_backward(_opened)
    outputs.passes = []
    _waiting.add(outputs)


def check_arrived(outputs: Node, grads: Grads) -> None:
    """Refuse gradients that arrive at outputs whose loss was not checked, or that a hook has changed.

    Raises:
        PrivacyError: the gradients are refused; the message says what to do.
    """
    if not outputs.passes:
        raise PrivacyError(
            "this backward pass could not be looked at before it ran (it was started from C++ or TorchScript, or another library "
            "has replaced PyTorch's engine): call loss.backward() or torch.autograd.backward(loss) from Python"
        )
    outputs.passes[-1].check(outputs, grads)


@contextmanager
def _opened(roots: Sequence[Edge], grads: Grads) -> Generator[None]:
    """Check the loss of a backward pass from `roots` with `grads`, and let the private outputs below take gradients inside."""
    below = nodes_below([node for node, _ in roots]) if _waiting else {}
    reached = [node for node in below if node.name() == BOUNDARY]
    if not reached:
        yield
        return
    check_loss(roots, grads, below, reached)
    this_pass, fresh = UnhookedPass(roots, grads), [node.tape for node in reached if node.tape.empty]
    taking = set(reached)
    handles = this_pass.watch({node: edges for node, edges in below.items() if edges and node not in taking})
    for node in reached:
        node.passes.append(this_pass)
    try:
        yield
    except BaseException:
        for tape in fresh:
            tape.clear()  # this pass may not have reached all outputs
        raise
    finally:
        for node in reached:
            node.passes.remove(this_pass)
        for handle in handles:
            handle.remove()


def check_loss(roots: Sequence[Edge], grads: Grads, below: Mapping[Node, Edges], boundaries: Sequence[Node]) -> None:
    """Refuse a loss that couples samples, trains something outside the private module, or is reduced in another way.

    Backward starts at `roots` with the gradients `grads`; `below` is the graph from there, and `boundaries` are the outputs of
    private modules in it.

    Raises:
        PrivacyError: the loss is refused; the message says why, and no gradient has been computed.
    """
    nodes = list(below)
    anchors = {edge[0] for node in boundaries for edge in node.next_functions}
    for leaf in nodes:
        if hasattr(leaf, "variable") and leaf not in anchors:
            raise PrivacyError(
                f"a tensor of shape {tuple(leaf.variable.shape)} with requires_grad enters the loss outside the private "
                "module: its gradient would not be private. Penalties belong into the optimizer's weight_decay, and what "
                "trains into the module"
            )
    check_saved(nodes)
    used = {edge for edges in below.values() for edge in edges} | set(roots)
    cut = [output for node in boundaries for number, output in enumerate(node.cut) if (node, number) in used]
    tape = boundaries[0].tape
    rows = {len(output) for output in cut}
    if len(rows) == 1:  # otherwise the tape refuses them
        outputs = {node: len(node.cut) for node in boundaries}
        _check_terms(below, outputs, roots, grads, rows.pop(), tape.loss_reduction, tape.grown)


def gradients_of_own_loss(
    total: Tensor, outputs: Sequence[Tensor], loss_reduction: str, grown: MutableMapping[tuple, Any]
) -> dict[int, Tensor]:
    """Check a loss that the private module has computed from its own outputs, and compute its gradients at these.

    Args:
        total: the loss, a number for all samples.
        outputs: the module's other outputs, with one row per sample.
        loss_reduction, grown: the tape's `loss_reduction` and `grown_inside`.

    Returns:
        The gradient at each output that the loss was computed from, by the output's place in `outputs`.

    Raises:
        PrivacyError: the loss couples samples, is reduced in another way, or was computed from more than these outputs.
    """
    root, places = _edge(total), {_edge(output): place for place, output in enumerate(outputs)}
    ends = {node: len(node._input_metadata) for node, _ in places}
    below = nodes_below([root[0]], ends)
    reached = list(dict.fromkeys(edge for edges in (*below.values(), [root]) for edge in edges if edge[0] in ends))
    used = [outputs[places[edge]] for edge in reached if edge in places]
    deeper = nodes_below([node for node, _ in reached if node is not None]) if len(used) > 1 else {}
    if (
        not used
        or len(used) < len(reached)
        or any(hasattr(node, "variable") for node in below.keys() - ends.keys())
        or any(child in ends and child in below for edges in deeper.values() for child, _ in edges)
    ):
        raise PrivacyError(OWN_LOSS)
    if len(rows := {len(output) for output in used}) > 1:
        raise PrivacyError(f"the loss inside the private module uses outputs of {sorted(rows)} rows: one per sample")
    check_saved(below.keys() - ends.keys())
    _check_terms(below, ends, [root], [None], rows.pop(), loss_reduction, grown)
    start = torch.ones_like(total)
    this_pass = UnhookedPass([root], [start])
    handles = this_pass.watch({node: edges for node, edges in below.items() if edges})
    try:
        grads = torch.autograd.grad(total, used, start, retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    arrived = dict(zip(reached, grads))
    for node, count in ends.items():
        this_pass.check(node, [arrived.get((node, number)) for number in range(count)])
    return {places[edge]: grad for edge, grad in arrived.items()}


def _edge(t: Tensor) -> Edge:
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _check_terms(
    below: Mapping[Node, Edges],
    outputs: Mapping[Node, int],
    roots: Sequence[Edge],
    grads: Grads,
    samples: int,
    loss_reduction: str,
    grown: MutableMapping[tuple, Any],
) -> None:
    """Refuse the graph `below` of a loss unless it is the mean, or sum, of one term for each row of the module's outputs.

    Raises:
        PrivacyError: the loss is refused; the message says why.
    """
    if samples < 2:
        return  # a single sample can't mix with others
    _check_reduction([node for node in below if node not in outputs], samples, loss_reduction)
    flow = SampleFlow(samples, grown, mean=loss_reduction == "mean")
    flow.check(below, outputs, roots)
    factor = flow.odd_factor(roots, grads)
    if factor is not None and loss_reduction == "mean":
        raise PrivacyError(
            f"the loss is a sum over the samples times {factor:.6g}, which is no mean of these {samples}: with each record more, "
            "all gradients would grow before they are clipped. Take the mean, or pass loss_reduction='sum'"
        )


def _check_reduction(nodes: Sequence[Node], rows: int, loss_reduction: str) -> None:
    """Refuse reductions over the batch, as PyTorch's criterions leave them in the graph, that differ from loss_reduction."""
    reductions = [getattr(node, "_saved_reduction", None) for node in nodes]
    kinds = [node.name() for node in nodes]
    averages = [node for node, r in zip(nodes, reductions) if r == MEAN]
    means = len(averages) + kinds.count("MeanBackward0")
    batchwide = means < rows  # as many means as samples: the user takes the losses one by one
    if loss_reduction == "sum" and means and batchwide:
        raise PrivacyError("the loss is a mean, but make_private was told loss_reduction='sum'")
    divides = {"MeanBackward0", "MeanBackward1", "DivBackward0", "MulBackward0"}
    sums = SUM in reductions or "SumBackward0" in kinds
    if loss_reduction == "mean" and sums and not averages and divides.isdisjoint(kinds):
        raise PrivacyError(
            "the loss is a sum over the samples, but make_private was told loss_reduction='mean': each gradient would be "
            "scaled by the number of samples before it is clipped. Take the mean, or pass loss_reduction='sum'"
        )
