"""What may stand between a private module's outputs and the loss: a mean, or sum, of each sample's own loss.

The private step sees the loss only as a gradient at the module's outputs. If that gradient of one sample depended on the
others, a record could change more than its own clipped gradient. So no gradient enters the outputs before the loss's graph has
been looked at (`fastloda.separable`). Every backward pass that Python starts goes through PyTorch's engine; `LookingEngine`
takes its place, looks, and opens the outputs for this one pass. Outputs that were not opened refuse their gradient: so a pass
that comes another way (from C++, from TorchScript) ends there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakSet

from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fastloda.averaged import mark_averaged
from fastloda.errors import PrivacyError
from fastloda.graph import nodes_below
from fastloda.layout import Edges
from fastloda.separable import MEAN, SampleFlow
from fastloda.unhooked import Grads, UnhookedPass, check_saved

SUM = 2  # as criterions save their reduction
BOUNDARY = "PrivateOutputsBackward"  # how the autograd graph names a private module's outputs

Edge = tuple[Node, int]  # an operation, and which of its outputs

_waiting: WeakSet[object] = WeakSet()  # outputs that a backward pass may still reach


class LookingEngine(type(Variable._execution_engine)):
    """PyTorch's engine for backward passes, which looks at a private loss before it runs."""

    def run_backward(self, tensors, grad_tensors, keep_graph, create_graph, inputs, *args, **kwargs):
        # with inputs the pass ends above the outputs of a private module, and without any of these there is nothing to look at
        looked_at = zip(tensors, grad_tensors) if _waiting and not inputs else ()
        starts = [
            (_edge(root), grad) for root, grad in looked_at if isinstance(root, GradientEdge) or root.requires_grad
        ]
        with _opened([root for root, _ in starts], [grad for _, grad in starts]):
            grads = super().run_backward(tensors, grad_tensors, keep_graph, create_graph, inputs, *args, **kwargs)
        if create_graph:
            mark_averaged([_edge(root)[0] for root in tensors if _is_root(root)], inputs or (), grads)
        return grads


def look_at_backward() -> None:
    """Let PyTorch's engine for backward passes be one that looks."""
    if not isinstance(Variable._execution_engine, LookingEngine):
        Variable._execution_engine = LookingEngine()


def wait_for_backward(outputs: object) -> None:
    """Let every backward pass that reaches these outputs be looked at; outputs: their node of the graph."""
    look_at_backward()
    outputs.passes = []
    _waiting.add(outputs)


def check_arrived(outputs: object, grads: Grads) -> None:
    """Refuse gradients of outputs whose loss was not looked at, or that a hook has changed.

    Raises:
        PrivacyError: with what to do.
    """
    if not outputs.passes:
        raise PrivacyError(
            "this backward pass could not be looked at before it ran (it was started from C++ or TorchScript, or another library "
            "has replaced PyTorch's engine): call loss.backward() or torch.autograd.backward(loss) from Python"
        )
    outputs.passes[-1].check(outputs, grads)


def _is_root(given: Tensor | GradientEdge) -> bool:
    return isinstance(given, GradientEdge) or given.requires_grad


def _edge(root: Tensor | GradientEdge) -> Edge:
    """What backward starts from: an operation, and which of its outputs."""
    edge = root if isinstance(root, GradientEdge) else get_gradient_edge(root)
    return edge.node, edge.output_nr


@contextmanager
def _opened(roots: Sequence[Edge], grads: Grads) -> Iterator[None]:
    """Let the outputs below take the gradients of one backward pass; roots, grads: what it starts from."""
    below = nodes_below([node for node, _ in roots])
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
            tape.clear()  # of a pass that has not reached all outputs
        raise
    finally:
        for node in reached:
            node.passes.remove(this_pass)
        for handle in handles:
            handle.remove()


def check_loss(roots: Sequence[Edge], below: Mapping[Node, Edges], boundaries: Sequence[Node]) -> None:
    """Refuse a loss that couples samples, trains something outside the private module, or is reduced in another way.

    roots: what backward starts from; below: its graph; boundaries: the outputs of private modules in it.

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
    """The reductions over the batch that PyTorch's own criterions leave in the graph."""
    reductions = [getattr(node, "_saved_reduction", None) for node in nodes]
    kinds = [node.name() for node in nodes]
    averages = [node for node, r in zip(nodes, reductions) if r == MEAN]
    means = len(averages) + kinds.count("MeanBackward0")
    batchwide = means < rows  # as many as there are samples: the user takes them one by one
    if loss_reduction == "sum" and means and batchwide:
        raise PrivacyError("the loss is a mean, but make_private was told loss_reduction='sum'")
    divides = {"MeanBackward0", "MeanBackward1", "DivBackward0", "MulBackward0"}
    sums = SUM in reductions or "SumBackward0" in kinds
    if loss_reduction == "mean" and sums and not averages and divides.isdisjoint(kinds):
        raise PrivacyError(
            "the loss is a sum over the samples, but make_private was told loss_reduction='mean': each gradient would be "
            "scaled by the number of samples before it is clipped. Take the mean, or pass loss_reduction='sum'"
        )
