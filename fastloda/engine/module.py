"""A module whose `loss.backward()` ends at its outputs, where the private step takes over.

An ordinary training loop reduces the losses to their mean before it calls backward, and no losses of single samples remain.
But the mean's gradient at the module's outputs has a row for each sample, g_n = (1/N) dl_n/dy_n, and

    l'_n = N <y_n, g_n>,  g_n held fixed

has the gradient of l_n with respect to every parameter. So the outputs are cut off from the graph that made them; backward
stores g there, on the tape (`Tape`); and the optimizer's step passes the vector l' to `GhostClipper`, whose rules, refusals and
backward pass then work as for any losses.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from fastloda.engine.batch_second import batch_dims, from_front, swapped, to_front, with_batch_second
from fastloda.engine.loss_check import check_arrived, gradients_of_own_loss, wait_for_backward
from fastloda.engine.nested import map_tensors, tensors_in
from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.members import Members
from fastloda.per_sample.tensors import accumulable
from fastloda.privacy.watch import Watch

_ANCHOR = torch.empty(0, requires_grad=True)  # an input by which outputs require grad though they are cut off


class Tape:
    """The store of a private module's outputs that the last backward pass has reached, each with its gradient."""

    def __init__(self, loss_reduction: str):
        self.loss_reduction = loss_reduction
        # what `SampleFlow` learned from earlier losses, outside of the module and inside
        self.grown: dict[tuple, Any] = {}
        self.grown_inside: dict[tuple, Any] = {}
        self.clear()

    def __reduce__(self):
        """Make copies empty, since what backward stored belongs to the original's step."""
        return Tape, (self.loss_reduction,)

    def clear(self) -> None:
        self._backward, self._reached = None, []
        self.sizes: set[int] = set()  # the batch sizes with which the module was called

    def record(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
        """Store the outputs of one forward pass, with their gradients. Raises PrivacyError for a second backward pass."""
        backward = torch._C._current_graph_task_id()
        if self._reached and backward != self._backward:
            raise PrivacyError(
                "a second backward pass before optimizer.step(): one record could be in both. Losses of one batch are added up "
                "for one backward. A large batch comes in parts from fastloda.BatchMemoryManager, with a step after each:\n"
                "    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as parts:\n"
                "        for x, y in parts: optimizer.zero_grad(); criterion(model(x), y).backward(); optimizer.step()\n"
                "zero_grad() drops the first pass"
            )
        self._backward = backward
        self._reached += [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]

    @property
    def rows(self) -> int:
        """The number of samples that backward has reached. Raises PrivacyError if the outputs do not agree on it."""
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
        """Compute the losses l' [rows], on the module's own graph."""
        with torch.enable_grad():
            terms = [accumulable(y) * accumulable(g) for y, g in self._reached]
            losses = functools.reduce(torch.add, (term.reshape(len(term), -1).sum(1) for term in terms))
            return losses * len(losses) if self.loss_reduction == "mean" else losses


class PrivateOutputs(torch.autograd.Function):
    """The autograd function that cuts the outputs off from their graph; its backward stores the gradients on the tape."""

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


class RefusedOutput(torch.autograd.Function):
    """The autograd function that cuts a refused output off from its graph; its backward raises the error that says why."""

    @staticmethod
    def forward(ctx, error, outputs, anchor):
        ctx.error = error
        return outputs[0].detach()

    @staticmethod
    def backward(ctx, *grads):
        raise ctx.error


class PrivateModule(nn.Module):
    """The module that trains privately in an ordinary loop, made by `make_private` and used like the module it wraps.

    Its parameters get no gradient from `loss.backward()`, only from the private optimizer's step. Other attributes are those of
    the wrapped module, `_module`; a call of one of its methods (`encode`) is private like a call of the module itself. Calls of
    its submodules, or of `_module` itself, are not: they take no part in a private step. Without gradients (`torch.no_grad()`)
    it computes what `_module` does. While frozen (`requires_grad_(False)`, or within `frozen()`) it is a fixed function, whose
    inputs may have gradients.

    The batch comes first in every input and output, or second (`with_batch_second`). Outputs may be tensors, or tuples, lists,
    dicts and objects with tensors as attributes, and the loss may use several, of one call or of more. The module may compute
    the loss itself (`out.loss`), if it also returns the outputs from which it does (`out.logits`); that loss is checked like
    any other. For an input with 0 rows, the empty Poisson batch, the outputs have 0 rows, and such a loss is 0, whether or not
    the wrapped module can handle it.

    Raises:
        PrivacyError: forward wrote to a parameter or buffer.
        TypeError, ValueError: an output can't be searched for tensors, or an input requires grad.
    """

    def __init__(self, module: nn.Module, tape: Tape, *, batch_first: bool = True):
        super().__init__()
        for hook in list(module._forward_hooks.values()):
            if isinstance(earlier := getattr(hook, "__self__", None), PrivateHooks):
                earlier.cleanup()
        self._module = module
        self._tape = tape
        self._batch_second = not batch_first
        self.training = module.training

    def forward(self, *args, **kwargs) -> Any:
        self._check_inputs(args, kwargs)
        return self._run(self._module, args, kwargs)

    def _check_inputs(self, args: tuple, kwargs: dict) -> None:
        """Refuse inputs with gradients, note the batch sizes, and remove transformers' num_items_in_batch.

        transformers divides the loss by that number, which depends on all records.
        """
        kwargs.pop("num_items_in_batch", None)
        if torch.is_grad_enabled():
            along = 1 if self._batch_second else 0
            tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            self._tape.sizes |= {t.shape[along] for t in tensors if t.dim() > along}
        if _wants_gradient(args, kwargs) and self._trains():
            raise UserError(
                "an input of the private module requires grad, but gradients end at its outputs. Detach the input, or put what "
                "trains before it into the module. For a generator's loss, call its discriminator within `with model.frozen():`"
            )

    def _run(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Call `function`, the wrapped module or a method of it, and cut its outputs off from their graph."""
        watch = Watch(Members.of(self._module))
        run = functools.partial(with_batch_second, self._made) if self._batch_second else self._made
        made = run(function, args, kwargs)
        if function is self._module or any(map(_is_computed, tensors_in(made))):
            watch.check(Members.of(self._module))  # a method whose results have no gradient may write to the module
        return made

    def _made(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if not _have_no_rows(args, kwargs):
            return self._cut(function(*args, **kwargs))
        with torch.no_grad():
            args, kwargs = _made_up(args, kwargs)
            outputs = function(*args, **kwargs)
        return self._cut(map_tensors(outputs, _no_rows))

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self._module.parameters())

    @contextmanager
    def frozen(self) -> Generator[Self]:
        """Freeze the module in the context: gradients flow through it to its inputs, and no private step uses them.

        It is for a generator that learns from a private discriminator: the parameters were released privately, and whatever
        is computed from them is private as well, as long as the inputs were not made from records.
        """
        trained = [p for p in self._module.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield self
        finally:
            for p in trained:
                p.requires_grad_(True)

    def _cut(self, outputs: Any) -> Any:
        """Cut outputs off from their graph, if anything trains, so that backward stores their gradients on the tape."""
        computed = list(filter(_is_computed, tensors_in(outputs)))
        if not computed or not torch.is_grad_enabled() or not self._trains():
            return outputs
        rows = tuple(t for t in computed if t.dim())
        cut = PrivateOutputs.apply(self._tape, rows, _ANCHOR) if rows else ()
        losses = iter([self._own_loss(t, rows, cut) for t in computed if not t.dim()])
        cut = iter(cut)
        return map_tensors(outputs, lambda t: t if not _is_computed(t) else next(cut if t.dim() else losses))

    def _own_loss(self, total: Tensor, rows: Sequence[Tensor], cut: Sequence[Tensor]) -> Tensor:
        """Make the module's own loss again from the cut-off outputs: it has the same value, and the same gradients at these."""
        if cut and not len(cut[0]):  # the loss of an empty batch depends on no parameter
            return functools.reduce(torch.add, [t.sum() for t in cut]).to(total.dtype)
        mean = self._tape.loss_reduction == "mean"
        try:
            grads = gradients_of_own_loss(total, rows, self._tape.loss_reduction, self._tape.grown_inside)
        except PrivacyError as error:
            return RefusedOutput.apply(error, (total,), _ANCHOR)
        terms = []
        for place, grad in grads.items():
            moved = accumulable(cut[place]) - accumulable(rows[place].detach())  # all 0, used for their gradient only
            slope = accumulable(grad) * (len(grad) if mean else 1)
            terms.append((moved.nan_to_num(0, 0, 0) * slope).reshape(len(grad), -1).sum(1))
        of_sample = functools.reduce(torch.add, terms)
        return total.detach() + (of_sample.mean() if mean else of_sample.sum()).to(total.dtype)

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
        """Return the wrapped module."""
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
        """Call a method of the wrapped module; its results are cut off from their graph if its arguments have tensors."""
        of_records = any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs)))
        if (
            not torch.is_grad_enabled() or not of_records or _wants_gradient(args, kwargs)
        ):  # the last condition: a method may compute a loss from outputs
            return method(*args, **kwargs)
        return self._run(method, args, kwargs)


class PrivateHooks:
    """The hooks that make a module private in place; `make_private(wrap_model=False)` returns them instead of a new module.

    The module keeps its class, for code that checks it (transformers' Trainer, diffusers' pipelines). Until `cleanup()` a call
    of it is private, like a call of a `PrivateModule`. Its other methods that take records are not, and take no part in a
    private step.

    Attributes:
        module: the module that was made private.
        private: the `PrivateModule` around it, for `frozen()`.
    """

    def __init__(self, private: PrivateModule):
        self.module, self.private = private.to_standard_module(), private
        self._calls: list[tuple[Watch, bool, list | None]] = []  # calls that have begun: see `_begin`
        self._handles = [
            self.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.module.register_forward_hook(self._end),
        ]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note whether the batch is empty, and which dimension the batch is in each output if inputs have it second.

        The inputs of an empty batch are replaced by those of one made-up sample.
        """
        self.private._check_inputs(args, kwargs)
        watch, turn = Watch(Members.of(module)), swapped if self.private._batch_second else lambda *given: given
        if empty := _have_no_rows(*turn(args, kwargs)):
            args, kwargs = turn(*_made_up(*turn(args, kwargs)))
        dims = batch_dims(module.forward, args, kwargs) if self.private._batch_second else None
        self._calls.append((watch, empty, dims))
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        watch, empty, dims = self._calls.pop()
        outputs = outputs if dims is None else to_front(outputs, dims)
        made = self.private._cut(map_tensors(outputs, _no_rows) if empty else outputs)
        watch.check(Members.of(module))
        return made if dims is None else from_front(made, dims)

    def cleanup(self) -> None:
        """Remove the hooks, so that calls of the module are ordinary ones again."""
        for handle in self._handles:
            handle.remove()


def bare_module(module: nn.Module) -> nn.Module:
    """Return the module that is wrapped in a `PrivateModule`, `DistributedDataParallel` or both.

    DistributedDataParallel averages gradients when backward adds them to `.grad`, which no private step does.
    """
    while isinstance(module, (PrivateModule, nn.parallel.DistributedDataParallel)):
        module = module.to_standard_module() if isinstance(module, PrivateModule) else module.module
    return module


def _is_computed(t: Tensor) -> bool:
    """Tell whether tensor `t` has a gradient and is no parameter that the module handed out."""
    return t.requires_grad and not isinstance(t, nn.Parameter)


def _wants_gradient(args: tuple, kwargs: dict) -> bool:
    inputs = tree_leaves((args, kwargs))
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def _have_no_rows(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(t, Tensor) and t.dim() and not len(t) for t in tree_leaves((args, kwargs)))


def _made_up(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Make inputs of one made-up sample from an empty batch's, since many modules reshape in a way that needs a row."""
    blank = lambda t: t.new_zeros(1, *t.shape[1:]) if isinstance(t, Tensor) and t.dim() and not len(t) else t  # noqa: E731
    return tree_map(blank, (args, kwargs))


def _no_rows(output: Tensor) -> Tensor:
    """Make an empty batch's output from that of a made-up sample: an output of 0 rows, or 0 for a loss."""
    output = output.detach()[:0] if output.dim() else torch.zeros_like(output)
    return output.requires_grad_() if output.is_floating_point() and torch.is_grad_enabled() else output
