"""What may stand between a private module's outputs and `loss.backward()`: a mean, or sum, of each sample's own loss.

The private step sees the loss only as a gradient at the module's outputs. If that gradient of one sample depended on the
others, a record could change more than its own clipped gradient. So `backward` looks at the loss's graph first. What it can't
see is samples that meet through values without gradient, such as a division by a sum over the targets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fastloda.errors import PrivacyError
from fastloda.layout import signed

BOUNDARY = "PrivateOutputsBackward"  # how the autograd graph names a private module's outputs
MEAN, SUM = 1, 2  # as criterions save their reduction
REMEDY = "take the criterion with reduction='none', which gives one loss per sample, and then its .mean()"


class PrivateOutput(Tensor):
    """An ordinary tensor, computed from a private module's outputs, whose `backward` checks the loss before it runs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.backward:
            check_loss(args[0])
        result = super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            detached = isinstance(result, PrivateOutput) and not result.requires_grad
            return result.as_subclass(Tensor) if detached else result


def check_loss(loss: Tensor) -> None:
    """Refuse a loss that couples samples, trains something outside the private module, or is reduced in another way.

    Raises:
        PrivacyError: with the reason; no gradient has been computed then.
    """
    nodes = _nodes(loss)
    boundaries = [node for node in nodes if node.name() == BOUNDARY]
    anchors = {edge[0] for node in boundaries for edge in node.next_functions}
    for leaf in nodes:
        if hasattr(leaf, "variable") and leaf not in anchors:
            raise PrivacyError(
                f"a tensor of shape {tuple(leaf.variable.shape)} with requires_grad enters the loss outside the private "
                "module: its gradient would not be private. Penalties belong into the optimizer's weight_decay, and what "
                "trains into the module"
            )
    rows = max((node.rows for node in boundaries), default=0)
    if rows < 2:
        return
    _check_reduction(nodes, rows, boundaries[0].tape.loss_reduction)
    _check_separable(loss, nodes, boundaries, rows)


def _check_reduction(nodes: Sequence[Node], rows: int, loss_reduction: str) -> None:
    """The reductions over the batch that PyTorch's own criterions leave in the graph."""
    reductions = [getattr(node, "_saved_reduction", None) for node in nodes]
    kinds = [node.name() for node in nodes]
    averages = [node for node, r in zip(nodes, reductions) if r == MEAN]
    means = len(averages) + kinds.count("MeanBackward0")
    batchwide = means < rows  # as many as there are samples: the user takes them one by one
    if batchwide and any(_normalised_by_targets(node) for node in averages):
        raise PrivacyError(
            "the loss is divided by the class weights of the batch, or by the number of its targets that are not ignored: "
            f"each sample's share depends on the other samples. Instead, {REMEDY}"
        )
    if loss_reduction == "sum" and means and batchwide:
        raise PrivacyError("the loss is a mean, but make_private was told loss_reduction='sum'")
    divides = {"MeanBackward0", "MeanBackward1", "DivBackward0", "MulBackward0"}
    sums = SUM in reductions or "SumBackward0" in kinds
    if loss_reduction == "mean" and sums and not averages and divides.isdisjoint(kinds):
        raise PrivacyError(
            "the loss is a sum over the samples, but make_private was told loss_reduction='mean': each gradient would be "
            "scaled by the number of samples before it is clipped. Take the mean, or pass loss_reduction='sum'"
        )


def _normalised_by_targets(node: Node) -> bool:
    """Whether a mean divides by something else than the number of targets: nll_loss, below cross_entropy, may."""
    weight = getattr(node, "_saved_weight", None) if hasattr(node, "_saved_total_weight") else None
    if weight is not None and (weight != weight[0]).any():
        return True
    ignored = getattr(node, "_saved_ignore_index", None)
    return ignored is not None and bool((node._saved_target == signed(ignored)).any())


def _check_separable(loss: Tensor, nodes: Sequence[Node], boundaries: Sequence[Node], rows: int) -> None:
    """Differentiated twice, the loss must show no sample's gradient to depend on the outputs of another.

    Once for each kind of loss, and again for a batch of more than twice the samples; it costs log2(rows) small backward passes.
    A loss that can't be differentiated twice is not looked into.
    """
    probed, kind = boundaries[0].tape.probed, hash(tuple(node.name() for node in nodes))
    if rows <= 2 * probed.get(kind, 0):
        return
    outputs = [GradientEdge(node, i) for node in boundaries for i in range(node.outputs)]
    with torch.enable_grad():
        grads = torch.autograd.grad(loss, outputs, torch.ones_like(loss), create_graph=True, allow_unused=True)
        curved = [grad for grad in grads if grad is not None and grad.requires_grad and len(grad) == rows]
        for bit in range((rows - 1).bit_length() if curved else 0):
            chosen = (torch.arange(rows, device=loss.device) >> bit) % 2 == 1
            probe = sum((grad[chosen] * torch.rand_like(grad[chosen])).sum() for grad in curved)
            try:
                reached = torch.autograd.grad(probe, outputs, retain_graph=True, allow_unused=True)
            except RuntimeError:
                break
            for change in reached:
                if change is not None and len(change) == rows:
                    others = change[~chosen]
                    if ((others != 0) & ~others.isnan()).any():
                        raise PrivacyError(
                            "samples mix in the loss: the gradient of some depends on the outputs of others. The loss must be "
                            "the mean, or sum, of one loss per sample"
                        )
    probed[kind] = rows


def _nodes(loss: Tensor) -> list[Node]:
    """All nodes below the loss."""
    found, stack = {}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack.extend(child for child, _ in node.next_functions)
    return list(found)
