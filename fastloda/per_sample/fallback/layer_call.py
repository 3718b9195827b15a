"""A layer call as one operation of the graph, which gives a private step the per-sample gradients of the layer's parameters.

While the layer runs, detached tensors take the place of its own parameters. So no operation inside uses the parameters, and the
graph from the layer's inputs to its outputs is PyTorch's own. `LayerCallFunction` then takes the outputs and the parameters,
and a rule makes the gradients:

    rule.row_grads(call, gradients of the outputs) -> {name: per-row gradients [rows, *parameter.shape]}

Without a private step the layer trains as usual: its parameters' gradients come from one more forward and backward pass of it.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastloda.errors import PrivacyError
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules import FUNCTION_RULES, Rule
from fastloda.per_sample.tensors import accumulable


class RowRule(Protocol):
    """The protocol of a rule that makes the per-sample gradients of a layer's parameters."""

    def row_grads(self, call: "LayerCall", gys: list[Tensor]) -> Mapping[str, Tensor]:
        """Make {name: [rows, *parameter.shape]} for call.names, from the gradients gys of call.outputs."""

    def batch_dims(self, call: "LayerCall") -> Sequence[int]:
        """Tell which dimension of each of call.outputs is the batch."""


@dataclass(frozen=True)
class LayerCall:
    """The call of a layer: what its rule needs, and what its ordinary gradient needs."""

    layer: nn.Module
    forward: Callable  # (layer, *args, **kwargs)
    rule: RowRule
    names: tuple[str, ...]  # the layer's names of the parameters that train through the call
    args: tuple
    kwargs: dict
    outputs: tuple[Tensor, ...]  # the differentiable ones
    autocast: tuple[str, torch.dtype | None]  # the device, and autocast's dtype there; None if it was off

    @property
    def label(self) -> str:
        return f"layer {type(self.layer).__name__}"

    def recipes(self, gys: list[Tensor]) -> dict[int, Recipe]:
        """Make each parameter's recipe, by its number among LayerCallFunction's inputs, from the outputs' gradients gys."""
        grads = self.rule.row_grads(self, gys)
        return {len(self.outputs) + i: of_rows(grads[name]) for i, name in enumerate(self.names)}

    def batch_first(self, gys: list[Tensor]) -> Tensor:
        """Join the gradients of all outputs to [rows, numbers of a row], the form that the probe of `refusals.py` compares."""
        rows = [gy.movedim(dim, 0) for gy, dim in zip(gys, self.rule.batch_dims(self))]
        return torch.cat([gy.reshape(len(gy), -1) for gy in rows], 1)

    def outer_blocks(self) -> list[int]:
        """Count the blocks before the batch dimension of each output, its `outer`: see `batch_axis.py`."""
        return [prod(y.shape[:dim]) for y, dim in zip(self.outputs, self.rule.batch_dims(self))]

    def run(self, own: Mapping[str, Tensor], args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """Call the layer on args and kwargs with `own` in place of its parameters, and return its differentiable outputs."""
        device, dtype = self.autocast
        with torch.autocast(device, dtype, enabled=dtype is not None), _stood_in_for(self.layer, own):
            leaves = tensors(self.forward(self.layer, *args, **kwargs))
        return tuple(leaf for leaf in leaves if differentiable(leaf))

    def tolerance(self, dtype: torch.dtype) -> float:
        """Compute the relative difference between outputs that another order of the same operations may cause."""
        kinds = (dtype, self.autocast[1] or dtype, torch.float32)  # a layer of a float64 model may cast to float32
        coarsest = max(torch.finfo(t).eps for t in kinds)
        return min(0.1, 256 * coarsest)

    def check_same(self, outputs: tuple[Tensor, ...], how: str) -> None:
        """Refuse a layer whose outputs, computed again in the way that `how` says, differ from the first ones.

        Raises:
            PrivacyError: names the layer.
        """
        for found, was in zip(outputs, self.outputs, strict=True):
            allowed = self.tolerance(was.dtype)
            if found.shape != was.shape or not torch.allclose(
                found, was, rtol=allowed, atol=allowed * _size(was), equal_nan=True
            ):
                raise PrivacyError(
                    f"{self.label} computes something else {how}: it mixes samples, draws random numbers (dropout), keeps a "
                    "state, or does not take the batch first, so that its gradients have no exact per-sample rule"
                )


class LayerCallFunction(torch.autograd.Function):
    """The identity on a call's outputs. In backward a `receiver` gets their gradients and a function that makes the recipes."""

    keeps_rows = True

    @staticmethod
    def forward(ctx, call: LayerCall, *outputs_and_parameters: Tensor):
        ctx.call, ctx.receiver = call, None
        count = len(call.outputs)
        ctx.save_for_backward(*outputs_and_parameters[count:])
        return tuple(output.clone() for output in outputs_and_parameters[:count])

    @staticmethod
    def backward(ctx, *gys: Tensor):
        call, own = ctx.call, [None] * len(ctx.call.names)
        detached_gys = [gy.detach() for gy in gys]
        if ctx.receiver is not None:
            ctx.receiver(call.batch_first(detached_gys), lambda: call.recipes(detached_gys))
        else:
            own = _ordinary(call, ctx.saved_tensors, detached_gys)
        return None, *detached_gys, *own


def call_as_one(
    layer: nn.Module, forward: Callable, rule: RowRule, names: Sequence[str], args: tuple, kwargs: dict
) -> Any:
    """Call forward(layer, *args, **kwargs) as one operation, for which `rule` makes the gradients of the parameters `names`."""
    names = tuple(name for name in names if layer.get_parameter(name).requires_grad)
    parameters = [layer.get_parameter(name) for name in names]
    with _stood_in_for(layer, {name: p.detach() for name, p in zip(names, parameters)}):
        result = forward(layer, *args, **kwargs)
    leaves, tree = tree_flatten(result)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and differentiable(leaf)]
    outputs = [leaves[i] for i in places]
    if not outputs:
        return result
    device = outputs[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    call = LayerCall(
        layer, forward, rule, names, *detached((args, kwargs)), tuple(t.detach() for t in outputs), (device, autocast)
    )
    for i, output in zip(places, LayerCallFunction.apply(call, *outputs, *parameters)):
        leaves[i] = output
    return tree_unflatten(leaves, tree)


@contextmanager
def _stood_in_for(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Generator[None]:
    """Put the named `tensors` in place of the layer's parameters, in every module that holds them, so that ties stay ties."""
    instead = {id(layer.get_parameter(name)): t for name, t in tensors.items()}
    holders: list[dict[str, Any]] = [module._parameters for module in layer.modules()]
    places = [(holder, key, p) for holder in holders for key, p in holder.items() if id(p) in instead]
    try:
        for holder, key, p in places:
            holder[key] = instead[id(p)]
        yield
    finally:
        for holder, key, p in places:
            holder[key] = p


def may_be_one() -> bool:
    """Tell whether a layer called now may enter the graph as one operation: never within torch.func or torch.compile."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return torch.is_grad_enabled() and not transformed and not torch.compiler.is_compiling()


def trainable(layer: nn.Module, recurse: bool = True) -> tuple[str, ...]:
    return tuple(name for name, p in layer.named_parameters(recurse=recurse) if p.requires_grad)


def differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def detached(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _ordinary(call: LayerCall, parameters: tuple[Tensor, ...], gys: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Compute the parameters' ordinary gradients, summed over the batch."""
    own = {name: p.detach().requires_grad_() for name, p in zip(call.names, parameters)}
    with torch.enable_grad():
        outputs = call.run(own, call.args, call.kwargs)
    call.check_same(tuple(t.detach() for t in outputs), "when it is run again")
    return grads_of(outputs, list(own.values()), gys)


def grads_of(outputs: Sequence[Tensor], inputs: Sequence[Tensor], gys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Compute the gradients of inputs from gys, the outputs' gradients; None for an input that no output depends on."""
    used = [(y, gy) for y, gy in zip(outputs, gys) if y.requires_grad]
    if not used:
        return (None,) * len(inputs)
    ys, used_gys = zip(*used)
    return torch.autograd.grad(ys, inputs, used_gys, retain_graph=True, allow_unused=True)


def of_rows(grads: Tensor) -> Recipe:
    """Make the recipe that sums per-row gradients [rows, *shape] over each sample's rows."""
    return Recipe(lambda t, samples: accumulable(t).reshape(samples, -1, *t.shape[1:]).sum(1), (grads,))


def _size(t: Tensor) -> float:
    finite = t[t.isfinite()]
    return float(finite.abs().amax()) if finite.numel() else 0.0


FUNCTION_RULES[LayerCallFunction] = Rule(None, range(1 << 16))
