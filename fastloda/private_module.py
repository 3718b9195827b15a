"""A module whose `loss.backward()` ends at its outputs, for the private step to go on from there.

An ordinary training loop reduces the losses to their mean before it calls backward, which leaves no losses of single samples.
But the mean's gradient at the module's outputs has a row for each sample, g_n = (1/N) dl_n/dy_n, and

    l'_n = N <y_n, g_n>,  g_n held fixed

has the gradient of l_n with respect to every parameter. So the outputs are cut off from the graph that made them; backward
leaves g there, on the tape; and the optimizer's step hands the vector l' to `GhostClipper`, whose rules, refusals and single
backward pass then work as for any losses.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from fastloda.batch_second import with_batch_second
from fastloda.errors import PrivacyError
from fastloda.members import Members
from fastloda.nested import map_tensors, tensors_in
from fastloda.ops import accumulable
from fastloda.private_loss import check_arrived, wait_for_backward
from fastloda.watch import Watch

_ANCHOR = torch.empty(0, requires_grad=True)  # what makes the cut-off outputs differentiable


class Tape:
    """The outputs of a private module that the last backward pass has reached, each with its gradient."""

    def __init__(self, loss_reduction: str):
        self.loss_reduction = loss_reduction
        self.grown: dict[tuple, int] = {}  # of earlier losses: see `SampleFlow`
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
                "a second backward pass before optimizer.step(): one record could be in both. Losses of one batch are added up "
                "for one backward. A large batch comes in parts from fastloda.BatchMemoryManager, with a step after each:\n"
                "    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as parts:\n"
                "        for x, y in parts: optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()\n"
                "zero_grad() drops the first pass"
            )
        reached = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
        for output, _ in reached:
            if not output.dim():
                raise PrivacyError(
                    "the model's output is a single number for all samples (a loss?): return one row per sample, and take "
                    "the mean outside. Of a Hugging Face model take the loss of out.logits, with fastloda.CrossEntropyLoss"
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
        ctx.tape, ctx.cut = tape, outputs
        wait_for_backward(ctx)
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        check_arrived(ctx, grads)
        ctx.tape.record(ctx.cut, grads)
        return None, None, None


class PrivateModule(nn.Module):
    """A module that trains privately in an ordinary loop; made by `make_private`, used like the module it wraps.

    Its parameters get no gradient from `loss.backward()`, only from the private optimizer's step. Attributes that are not its
    own are those of the wrapped module, `_module`; a method among them (`encode`) is private as a call of the module is. Its
    submodules and `_module` itself are not: they take part in no private step. Without gradients (`torch.no_grad()`) it is that
    module, and frozen (`requires_grad_(False)`, or within `frozen()`) a fixed function, whose inputs may have gradients.

    The batch comes first in every input and output, or as `with_batch_second` has it. Outputs may be tensors, or tuples, lists,
    dicts and objects with tensors as attributes, and the loss may use several, of one call or of more. For an input with 0 rows,
    the empty Poisson batch, the outputs have 0 rows whether or not the wrapped module can do that.

    Raises:
        PrivacyError: forward wrote to a buffer or a frozen parameter.
        TypeError, ValueError: an output that can't be looked into, or an input that wants a gradient.
    """

    def __init__(self, module: nn.Module, tape: Tape, *, batch_first: bool = True):
        super().__init__()
        self._module = module
        self._tape = tape
        self._batch_second = not batch_first
        self.training = module.training

    def forward(self, *args, **kwargs) -> Any:
        if _wants_gradient(args, kwargs) and self._trains():
            raise ValueError(
                "an input of the private module requires grad, but gradients end at its outputs. Detach the input, or put what "
                "trains before it into the module. For a generator's loss, call its discriminator within `with model.frozen():`"
            )
        return self._run(self._module, args, kwargs)

    def _run(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """What `function`, the wrapped module or a method of it, makes, cut off from its graph."""
        watch = Watch(Members.of(self._module))
        run = functools.partial(with_batch_second, self._made) if self._batch_second else self._made
        made = run(function, args, kwargs)
        if function is self._module or any(map(_is_computed, tensors_in(made))):
            watch.check(Members.of(self._module))  # a method that makes nothing to learn from may write what it likes
        return made

    def _made(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if any(isinstance(t, Tensor) and t.dim() and not len(t) for t in tree_leaves((args, kwargs))):
            outputs = self._without_samples(function, args, kwargs)
        else:
            outputs = function(*args, **kwargs)
        return self._cut(outputs) if torch.is_grad_enabled() and self._trains() else outputs

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self._module.parameters())

    @contextmanager
    def frozen(self) -> Iterator[Self]:
        """Within it the module is a fixed function of its inputs, to which gradients pass; nothing is left for a private step.

        For a generator that learns from a private discriminator: the parameters were released privately, and whatever is computed
        from them is private as well, as long as the inputs were not made of records.
        """
        trained = [p for p in self._module.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield self
        finally:
            for p in trained:
                p.requires_grad_(True)

    def _without_samples(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The outputs for no samples, by way of a made-up one: many a module reshapes in a way that needs a row."""
        blank = lambda t: t.new_zeros(1, *t.shape[1:]) if isinstance(t, Tensor) and t.dim() and not len(t) else t  # noqa: E731
        with torch.no_grad():
            args, kwargs = tree_map(blank, (args, kwargs))
            outputs = function(*args, **kwargs)
        return map_tensors(outputs, lambda y: _no_rows(y) if y.dim() else y)

    def _cut(self, outputs: Any) -> Any:
        wanted = tuple(filter(_is_computed, tensors_in(outputs)))
        if not wanted:
            return outputs
        cut = iter(PrivateOutputs.apply(self._tape, wanted, _ANCHOR))
        return map_tensors(outputs, lambda t: next(cut) if _is_computed(t) else t)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        if not self._tape.empty:
            warnings.warn(
                "parameters() between loss.backward() and optimizer.step(): their private gradients do not exist yet, so that "
                "clip_grad_norm_ clips nothing and returns 0. The step clips each sample's gradient to max_grad_norm by itself; "
                "in place of p.grad_sample, fastloda.per_sample_grads(losses, model) computes single samples' gradients",
                stacklevel=2,
            )
        return super().parameters(recurse)

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
            found = getattr(self._module, name)
            return functools.wraps(found)(functools.partial(self._call, found)) if inspect.ismethod(found) else found

    def _call(self, method: Callable, *args, **kwargs) -> Any:
        """A method of the wrapped module, whose results are cut off if it makes them of records."""
        of_records = any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs)))
        if (
            not torch.is_grad_enabled() or not of_records or _wants_gradient(args, kwargs)
        ):  # the last: e.g. a loss of outputs
            return method(*args, **kwargs)
        return self._run(method, args, kwargs)


def _is_computed(t: Tensor) -> bool:
    """Whether it has a gradient, and is no parameter that was handed out."""
    return t.requires_grad and not isinstance(t, nn.Parameter)


def _wants_gradient(args: tuple, kwargs: dict) -> bool:
    inputs = tree_leaves((args, kwargs))
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _no_rows(output: Tensor) -> Tensor:
    output = output[:0]
    return output.requires_grad_() if output.is_floating_point() and torch.is_grad_enabled() else output
