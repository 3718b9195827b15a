"""The registration of a user's own per-sample rules for layers and operations, and a check that a rule is right."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastloda.errors import PrivacyError, UserError
from fastloda.per_sample.backward import per_sample_grads
from fastloda.per_sample.fallback.functional import own_parameters
from fastloda.per_sample.fallback.layer_call import LayerCall, call_as_one, may_be_one, of_rows, tensors
from fastloda.per_sample.graph import trace
from fastloda.per_sample.members import Members
from fastloda.per_sample.refusals import check_graph, check_independence, trainable_parameters
from fastloda.per_sample.rules import FUNCTION_RULES, Call, Rule

LayerRule = Callable[[nn.Module, tuple, Any], Mapping[str, Tensor]]  # (layer, inputs, grad_output) -> {name: gradients}
FunctionRule = Callable[..., Mapping[int, Tensor]]
ALLOWED_ERROR = 1e-9  # relative, in float64


def register_rule(target: type) -> Callable[[Callable], Callable]:
    """Make a decorator that registers a per-sample gradient rule for a layer class, or an `autograd.Function`.

    For a layer, `rule(layer, inputs, grad_output) -> {name: gradients}` computes the gradients of the parameters that the layer
    holds itself, [rows, *parameter.shape] for rows of the batch:

    >>> @fastloda.register_rule(Scale)                          # y = x * exp(log_scale), x [N, ..., C]
    ... def scale_rule(layer, inputs, grad_output):
    ...     (x,) = inputs
    ...     return {"log_scale": (grad_output * x * layer.log_scale.exp()).flatten(1, -2).sum(1)}
    >>> fastloda.check_rule(Scale(8), torch.randn(4, 5, 8))

    inputs are the arguments of `forward` in the order of its signature, detached; grad_output is the gradient of the output, or a
    tuple of gradients if forward returns several tensors. The rule runs in backward, without gradients. It covers every instance,
    from now on, but no subclass with a forward of its own. Layers inside the layer keep their own rules. The batch is the
    first dimension of every output.

    For an autograd.Function, `rule(ctx, grad_output) -> {number: gradients}` computes the gradients of the inputs that may be
    parameters, numbered among the arguments that are tensors; ctx is the one of backward, with its `saved_tensors`.

    A rule is trusted: the gradients that it returns are clipped and summed. Even if they are wrong, a sample contributes at
    most max_grad_norm as long as the gradient of each row depends on that row alone. `check_rule` compares a rule with one
    backward pass per sample.

    Raises:
        TypeError: target is neither an nn.Module class nor an autograd.Function.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        return functools.partial(_register_layer, target)
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        return functools.partial(_register_function, target)
    raise TypeError(f"register_rule takes an nn.Module class or a torch.autograd.Function, got {target!r}")


def check_rule(layer: nn.Module, *inputs) -> dict[str, float]:
    """Compare a layer's (or model's) per-sample gradients with one backward pass per sample, in float64.

    inputs: the layer's arguments. Tensors with as many rows as the first tensor have one row for each sample, at least two.

    Returns:
        {parameter: largest error of a sample's gradient, relative to the largest gradient of that parameter}

    Raises:
        ValueError: an error is above 1e-9 (the message names the worst parameter), or inputs has fewer than two rows.
        PrivacyError: a private step would refuse the layer: a parameter has no rule, or samples mix.
    """
    layer = copy.deepcopy(layer).double()
    inputs = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
    given = [t for t in tensors(inputs) if t.dim()]
    if not given or len(given[0]) < 2:
        raise UserError(f"check_rule needs an input with at least two rows, got {[tuple(t.shape) for t in given]}")
    rows = len(given[0])
    parameters = trainable_parameters(Members.of(layer))
    losses = _losses(layer, inputs, torch.arange(rows), rows)
    graph = trace(losses, parameters)
    check_graph(graph)
    check_independence(losses, graph, layer, parameters, rows)
    found = per_sample_grads(losses, graph, parameters, rows)
    errors = {}
    for name, truth in _one_by_one(layer, inputs, parameters, rows).items():
        chunks = [grads for _, grads in found[name].chunks()]
        got = found[name].order(torch.cat(chunks)) if chunks else torch.zeros_like(truth)
        errors[name] = _largest(got - truth) / (_largest(truth) or 1.0)
    wrong = {name: error for name, error in errors.items() if not error <= ALLOWED_ERROR}  # NaN is wrong too
    if wrong:
        worst = max(wrong, key=wrong.__getitem__)
        raise UserError(
            f"the per-sample gradients of {type(layer).__name__} are wrong: those of {worst!r} are off by {wrong[worst]:.3g} of "
            f"the largest, allowed is {ALLOWED_ERROR:g}"
        )
    return errors


@dataclass(frozen=True)
class UserRule:
    """The adapter through which `layer_call.py` calls a user's rule of a layer."""

    rule: LayerRule
    signature: inspect.Signature

    def row_grads(self, call: LayerCall, gys: list[Tensor]) -> dict[str, Tensor]:
        bound = self.signature.bind(call.layer, *call.args, **call.kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            grads = self.rule(call.layer, bound.args[1:], gys[0] if len(gys) == 1 else tuple(gys))
        return {name: self._check(grads, call, name, len(gys[0])) for name in call.names}

    def batch_dims(self, call: LayerCall) -> Sequence[int]:
        return (0,) * len(call.outputs)

    def _check(self, grads: Mapping[str, Tensor], call: LayerCall, name: str, rows: int) -> Tensor:
        wanted = (rows, *call.layer.get_parameter(name).shape)
        if name not in grads or tuple(grads[name].shape) != wanted:
            got = f"one of shape {tuple(grads[name].shape)}" if name in grads else "none"
            raise PrivacyError(
                f"the rule registered for {type(call.layer).__name__} must give {name!r} a gradient of shape {wanted}, got {got}"
            )
        return grads[name]


def _register_layer(target: type[nn.Module], rule: LayerRule) -> LayerRule:
    plain = getattr(target.__dict__.get("forward"), "row_rule_of", None) or target.forward
    user = UserRule(rule, inspect.signature(plain))

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        names = own_parameters(self) if type(self).forward is forward and may_be_one() else ()
        return call_as_one(self, plain, user, names, args, kwargs) if names else plain(self, *args, **kwargs)

    vars(forward)["row_rule_of"] = plain
    target.forward = forward
    return rule


def _register_function(target: type[torch.autograd.Function], rule: FunctionRule) -> FunctionRule:
    def recipes(call: Call) -> dict:
        if call.samples > 1 and call.place != (0, 1):
            raise PrivacyError(f"the rule registered for {target.__name__} needs the batch first")
        with torch.no_grad():
            grads = rule(call.node, call.gy)
        lacking = [index for index in call.shapes if index not in grads]
        if lacking:
            raise PrivacyError(
                f"the rule registered for {target.__name__} gives no gradient for its tensor inputs {lacking}"
            )
        return {index: of_rows(grads[index]) for index in call.shapes}

    FUNCTION_RULES[target] = Rule(recipes, range(1 << 16))
    return rule


def _losses(layer: nn.Module, inputs: tuple, chosen: Tensor, rows: int) -> Tensor:
    """Compute one nonlinear loss for each of the chosen rows, over all outputs: [chosen]."""
    of = lambda t: t[chosen] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t  # noqa: E731
    outputs = [y for y in tensors(layer(*tree_map(of, inputs))) if y.is_floating_point()]
    flat = torch.cat([y.reshape(len(chosen), -1) for y in outputs], 1)
    return (flat * torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)).tanh().sum(1)


def _one_by_one(
    layer: nn.Module, inputs: tuple, parameters: Mapping[str, nn.Parameter], rows: int
) -> dict[str, Tensor]:
    """Compute the parameters' gradients by one backward pass for each row: [rows, *shape]."""
    own = list(parameters.values())
    by_row = []
    for row in range(rows):
        loss = _losses(layer, inputs, torch.tensor([row]), rows)[0]
        grads = torch.autograd.grad(loss, own, allow_unused=True)
        by_row.append([torch.zeros_like(p) if grad is None else grad for p, grad in zip(own, grads)])
    return {name: torch.stack(grads) for name, grads in zip(parameters, zip(*by_row))}


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0
