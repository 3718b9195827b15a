"""Checks of the graph between a private module's outputs and the loss: it must be a mean, or sum, of each sample's own loss.

The private step sees the loss only as a gradient at the module's outputs. If that gradient of one sample depended on the
others, a record could change more than its own clipped gradient. So no gradient enters the outputs before the loss's graph has
been looked at (`per_sample/sample_flow.py`): whichever backward pass Python starts (`per_sample/looking_engine.py`), a look opens
the outputs for this one pass. Outputs that were not opened refuse their gradient: so a pass that comes another way (from C++,
from TorchScript) ends there.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakSet

from fastloda.engine.unhooked import Grads, UnhookedPass, check_saved
from fastloda.errors import PrivacyError
from fastloda.per_sample.graph import nodes_below
from fastloda.per_sample.looking_engine import Edge, look_at_backward
from fastloda.per_sample.node import Edges, Node
from fastloda.per_sample.operations import MEAN, SUM
from fastloda.per_sample.sample_flow import SampleFlow

BOUNDARY = "PrivateOutputsBackward"  # how the autograd graph names a private module's outputs

_waiting: WeakSet[object] = WeakSet()  # outputs that a backward pass may still reach


def wait_for_backward(outputs: Node) -> None:
    """Register the outputs, by their node of the graph, so that every backward pass that reaches them is checked."""
    look_at_backward(_opened)
    outputs.passes = []
    _waiting.add(outputs)


def check_arrived(outputs: Node, grads: Grads) -> None:
    """Refuse gradients of outputs whose loss was not checked, or gradients that a hook has changed.

    Raises:
        PrivacyError: with what to do.
    """
    if not outputs.passes:
        raise PrivacyError(
            "this backward pass could not be looked at before it ran (it was started from C++ or TorchScript, or another library "
            "has replaced PyTorch's engine): call loss.backward() or torch.autograd.backward(loss) from Python"
        )
    outputs.passes[-1].check(outputs, grads)


@contextmanager
def _opened(roots: Sequence[Edge], grads: Grads) -> Generator[None]:
    """Let private outputs below `roots`, where a backward pass starts with the gradients `grads`, take gradients in this pass."""
    below = nodes_below([node for node, _ in roots]) if _waiting else {}
    reached = [node for node in below if node.name() == BOUNDARY]
    if not reached:
        yield
        return
    check_loss(roots, below, reached)
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


def check_loss(roots: Sequence[Edge], below: Mapping[Node, Edges], boundaries: Sequence[Node]) -> None:
    """Refuse a loss that couples samples, trains something outside the private module, or is reduced in another way.

    `roots` are where backward starts, `below` is its graph, and `boundaries` are the outputs of private modules in it.

    Raises:
        PrivacyError: with the reason; no gradient has been computed then.
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
    rows = {len(output) if output.dim() else 0 for output in cut}
    if len(rows) > 1 or 0 in rows or rows == {1}:
        return  # a number for all samples, or rows that do not agree, are for the tape to refuse; one sample meets no other
    tape = boundaries[0].tape
    _check_reduction(nodes, samples := rows.pop(), tape.loss_reduction)
    flow = SampleFlow(samples, tape.grown)
    flow.check(below, {node: len(node.cut) for node in boundaries}, roots)
    factor = flow.odd_factor(roots)
    if factor is not None and tape.loss_reduction == "mean":
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
