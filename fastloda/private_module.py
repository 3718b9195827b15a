"""A module whose `loss.backward()` ends at its outputs, for the private step to go on from there.

An ordinary training loop reduces the losses to their mean before it calls backward, which leaves no losses of single samples.
But the mean's gradient at the module's outputs has a row for each sample, g_n = (1/N) dl_n/dy_n, and

    l'_n = N <y_n, g_n>,  g_n held fixed

has the gradient of l_n with respect to every parameter. So the outputs are cut off from the graph that made them; backward
leaves g there, on the tape; and the optimizer's step hands the vector l' to `GhostClipper`, whose rules, refusals and single
backward pass then work as for any losses.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastloda.coverage import FrozenWatch
from fastloda.errors import PrivacyError
from fastloda.members import Members
from fastloda.ops import accumulable
from fastloda.private_loss import PrivateOutput

_ANCHOR = torch.empty(0, requires_grad=True)  # what makes the cut-off outputs differentiable


class Tape:
    """The outputs of a private module that the last backward pass has reached, each with its gradient."""

    def __init__(self, loss_reduction: str):
        self.loss_reduction = loss_reduction
        self.probed: dict[int, int] = {}  # kind of loss -> number of samples that were told apart
        self.clear()

    def __reduce__(self):
        """A copy begins empty: what backward left belongs to the original's step."""
        return Tape, (self.loss_reduction,)

    def clear(self) -> None:
        self._backward, self._reached = None, []

    def record(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
        """Take in the outputs of one forward pass. Raises PrivacyError, and changes nothing, for a second backward pass."""
        backward = torch._C._current_graph_task_id()
        if self._reached and backward != self._backward:
            raise PrivacyError(
                "a second backward pass before optimizer.step(): one record could be in both. Add the losses and call backward "
                "once; call zero_grad() to drop the first; use BatchMemoryManager for batches that do not fit into memory"
            )
        reached = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
        for output, _ in reached:
            if not output.dim():
                raise PrivacyError(
                    "the model's output is a single number for all samples (a loss?): return one row per sample, and take "
                    "the mean outside"
                )
        self._backward = backward
        self._reached += reached

    @property
    def rows(self) -> int:
        """Samples that backward has reached. Raises PrivacyError if the outputs do not agree on them."""
        rows = {len(output) for output, _ in self._reached}
        if len(rows) > 1:
            raise PrivacyError(
                f"the loss uses outputs of {sorted(rows)} rows: every output must have one row per sample"
            )
        return rows.pop() if rows else 0

    @property
    def empty(self) -> bool:
        return not self._reached

    def losses(self) -> Tensor:
        """l' [rows], on the module's own graph."""
        with torch.enable_grad():
            terms = [accumulable(y) * accumulable(g) for y, g in self._reached]
            losses = sum(term.reshape(len(term), -1).sum(1) for term in terms)
            return losses * len(losses) if self.loss_reduction == "mean" else losses


class PrivateOutputs(torch.autograd.Function):
    """The outputs, cut off from their graph; what backward brings goes onto the tape."""

    @staticmethod
    def forward(ctx, tape, outputs, anchor):
        ctx.tape, ctx.cut, ctx.outputs = tape, outputs, len(outputs)
        ctx.rows = max(len(output) if output.dim() else 0 for output in outputs)
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.tape.record(ctx.cut, grads)
        return None, None, None


class PrivateModule(nn.Module):
    """A module that trains privately in an ordinary loop; made by `make_private`, used like the module it wraps.

    Its parameters get no gradient from `loss.backward()`, only from the private optimizer's step. Attributes that are not its
    own are those of the wrapped module, `_module`. Without gradients (`torch.no_grad()`) it is that module. The batch comes
    first in every input and output; outputs may be tensors or tuples, lists and dicts of them, and the loss may use several, of
    one call or of more. For an input with 0 rows, the empty Poisson batch, the outputs have 0 rows whether or not the wrapped
    module can do that.

    Raises:
        PrivacyError: forward wrote to a buffer or a frozen parameter.
        TypeError, ValueError: an output that can't be looked into, or an input that wants a gradient.
    """

    def __init__(self, module: nn.Module, tape: Tape):
        super().__init__()
        self._module = module
        self._tape = tape
        self.training = module.training

    def forward(self, *args, **kwargs) -> Any:
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            raise ValueError(
                "an input of the private module requires grad, but gradients end at its outputs: put everything that "
                "trains into the module, or detach the input"
            )
        watch = FrozenWatch(Members.of(self._module))
        if any(t.dim() and not len(t) for t in inputs):
            outputs = self._without_samples(args, kwargs)
        else:
            outputs = self._module(*args, **kwargs)
        watch.check(Members.of(self._module))
        return self._cut(outputs) if torch.is_grad_enabled() else outputs

    def _without_samples(self, args: tuple, kwargs: dict) -> Any:
        """The outputs for no samples, by way of a made-up one: many a module reshapes in a way that needs a row."""
        blank = lambda t: t.new_zeros(1, *t.shape[1:]) if isinstance(t, Tensor) and t.dim() and not len(t) else t  # noqa: E731
        with torch.no_grad():
            args, kwargs = tree_map(blank, (args, kwargs))
            outputs = self._module(*args, **kwargs)
        return tree_map(lambda y: _no_rows(y) if isinstance(y, Tensor) and y.dim() else y, outputs)

    def _cut(self, outputs: Any) -> Any:
        leaves, structure = tree_flatten(outputs)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, str, int, float, type(None))):
                raise TypeError(
                    f"the model returned a {type(leaf).__name__}, which can't be looked into: return tensors, or tuples, "
                    "lists and dicts of them"
                )
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places:
            return outputs
        for i, cut in zip(places, PrivateOutputs.apply(self._tape, tuple(leaves[i] for i in places), _ANCHOR)):
            leaves[i] = cut.as_subclass(PrivateOutput)
        return tree_unflatten(leaves, structure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._tape.clear()
        super().zero_grad(set_to_none)

    def to_standard_module(self) -> nn.Module:
        """The wrapped module."""
        return self._module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_module":
                raise
            return getattr(self._module, name)


def _no_rows(output: Tensor) -> Tensor:
    output = output[:0]
    return output.requires_grad_() if output.is_floating_point() and torch.is_grad_enabled() else output
