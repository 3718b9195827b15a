"""One backward pass that computes the per-sample gradients of all trainable parameters, and leaves `.grad` alone.

Autograd is asked only for the gradients of features, not of parameters: so weight gradients summed over the batch are never
computed. A LoDA layer's node passes its recipes to a receiver from its own backward, which computes the gradient of z anyway.
For any other operation a rule reads the saved tensors just before the operation's backward runs, or after the pass if nothing
below the operation is needed.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.utils.checkpoint
from torch import Size, Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from fastloda.errors import PrivacyError
from fastloda.per_sample.batch_axis import batch_apart, locate
from fastloda.per_sample.composites import Composite
from fastloda.per_sample.gradient import PerSampleGrad
from fastloda.per_sample.graph import LossGraph, Use
from fastloda.per_sample.node import Node
from fastloda.per_sample.operations import TILING, kind_of
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.regions import may_run_again
from fastloda.per_sample.relaying import back_to_parameter
from fastloda.per_sample.rules import Call, Recipes, recipes_of

# A context in which to read checkpointed tensors after the pass costs no second recomputation (in older PyTorch it does).
one_recomputation = getattr(torch.utils.checkpoint, "GraphExecGroup", nullcontext)

# on_use(node, grad_output with the batch first, make_recipes) is called once for each operation that uses a trainable parameter;
# make_recipes(samples) -> {number of the input: Recipe}.
OnUse = Callable[[Node, Tensor, Callable[[int], dict[int, Recipe]]], None]


def per_sample_grads(
    losses: Tensor, graph: LossGraph, parameters: Mapping[str, nn.Parameter], samples: int, retain_graph: bool = False
) -> dict[str, PerSampleGrad]:
    """Compute, by one backward pass, every parameter's gradient of each sample's loss, averaged over its views.

    losses [samples * views], sample-major. Returns the gradients by the names of `parameters`.

    Raises:
        PrivacyError: an operation that uses a parameter has no exact rule; the message names both.
    """
    grads = {name: PerSampleGrad(parameter.shape, samples) for name, parameter in parameters.items()}

    def on_use(node: Node, gy: Tensor, make_recipes: Callable[[int], dict[int, Recipe]]) -> None:
        try:
            recipes = make_recipes(samples)
            for use in graph.uses[node]:
                if use.index not in recipes:
                    raise PrivacyError(f"used by {node.name()} (input {use.index}) without an exact per-sample rule")
                grads[use.name].add(of_parameter(use, recipes[use.index], samples))
        except PrivacyError as error:
            raise PrivacyError(f"{_names(graph, node)}: {error}") from error

    weights = losses.new_full(losses.shape, samples / len(losses))
    run_backward(losses, weights, graph, parameters, on_use, retain_graph)
    return grads


def of_parameter(use: Use, recipe: Recipe, samples: int) -> Recipe:
    """Make the parameter's own recipe from that of the tensor which the operation read, a view or function of the parameter."""
    if not use.steps:
        return recipe
    keeps_norm = not any(isinstance(step, Composite) or kind_of(step.node) in TILING for step in use.steps)
    return recipe.through(
        back_to_parameter(use.steps), keeps_norm, samples * sum(step.scratch_bytes for step in use.steps)
    )


def _names(graph: LossGraph, node: Node) -> str:
    return ", ".join(repr(use.name) for use in graph.uses[node])


def run_backward(
    losses: Tensor,
    weights: Tensor,
    graph: LossGraph,
    parameters: Mapping[str, nn.Parameter],
    on_use: OnUse,
    retain_graph: bool,
) -> None:
    """Run backward from sum_i weights[i] losses[i] down to the last uses of parameters, and call on_use for each of them."""
    if not graph.uses:
        return
    by_node = {node: recipes_of(node) for node in graph.uses}
    adapters = [node for node, recipes in by_node.items() if recipes is None]
    others = {node: recipes for node, recipes in by_node.items() if recipes is not None}
    lowest = [node for node in others if node not in graph.deeper]
    handles, read = [], {}
    try:
        for node in adapters:
            node.receiver = _from_adapter(node, graph.outer[node], on_use)
        handles += [node.register_prehook(_contiguous) for node in graph.batch_norms]
        for node, recipes in others.items():  # a lowest one runs too if it shares a parameter with an adapter
            handles.append(node.register_prehook(_by_rule(node, recipes, graph, on_use, read, runs=True)))
        adapter_edges = dict.fromkeys(node.next_functions[use.index] for node in adapters for use in graph.uses[node])
        inputs = [GradientEdge(*edge) for edge in (*adapter_edges, *((node, 0) for node in lowest))]
        with one_recomputation(), _unreadable_refused(graph, read), may_run_again(graph.compiled):
            captured = torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)
            for node, gy in zip(lowest, captured[len(adapter_edges) :]):
                if node not in read:
                    _by_rule(node, others[node], graph, on_use, read, runs=False)((gy,))
    finally:
        for handle in handles:
            handle.remove()
        for node in adapters:
            node.receiver = None


def _contiguous(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Make the gradients of a batch of one contiguous: PyTorch 2.13's BatchNorm misreads channels_last ones on the CPU."""
    return tuple(gy.contiguous() if gy is not None and len(gy) == 1 else gy for gy in gradients)


def _from_adapter(node: Node, outer: int, on_use: OnUse):
    """Make the receiver to which a node passes its output's gradient and its recipes, or a function that makes the recipes."""

    def record(gy: Tensor, recipes: dict[int, Recipe] | Callable[[], dict[int, Recipe]]) -> None:
        def make_recipes(samples: int) -> dict[int, Recipe]:
            made = recipes if isinstance(recipes, dict) else recipes()
            if samples == 1 or _has_batch_first(gy.shape, outer):
                return made
            return {index: recipe.batch_first(lambda t: _batch_first(t, outer)) for index, recipe in made.items()}

        on_use(node, _batch_first(gy, outer), make_recipes)

    return record


def _has_batch_first(shape: Size, outer: int) -> bool:
    return not outer or locate(shape, outer) == (0, 1)


def _batch_first(t: Tensor, outer: int) -> Tensor:
    return t if _has_batch_first(t.shape, outer) else batch_apart(t, *locate(t.shape, outer))


def _by_rule(node: Node, recipes: Recipes, graph: LossGraph, on_use: OnUse, read: dict[Node, None], runs: bool):
    outer, shapes = graph.outer[node], {use.index: use.shape for use in graph.uses[node]}

    def make_recipes(gy: Tensor, samples: int) -> dict[int, Recipe]:
        if runs:
            let_rule_read_first(node)
        return recipes(Call(node, gy, samples, outer, shapes))

    def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
        read[node] = None
        if grad_outputs[0] is not None:
            gy = grad_outputs[0].detach()
            on_use(node, _batch_first(gy, outer), lambda samples: make_recipes(gy, samples))

    return prehook


@contextmanager
def _unreadable_refused(graph: LossGraph, read: Mapping[Node, None]) -> Generator[None]:
    """Raise a PrivacyError that names the parameter if this version of PyTorch lets a checkpointed tensor be read only once."""
    try:
        yield
    except CheckpointError as error:
        if not read or "unpacked once" not in str(error):
            raise
        raise PrivacyError(
            f"{_names(graph, next(reversed(read)))} trains inside torch.utils.checkpoint, and torch {torch.__version__} lets no "
            "rule read its input there: leave that layer out of the checkpoint (use_reentrant=True does not help), or freeze it"
        ) from error


# ---- Activation checkpointing recomputes the saved tensors when one is first read, and drops each as it is read, to free it
# early. A rule reads them before the operation itself does.


def let_rule_read_first(node: Node) -> None:
    """Let each tensor that checkpointing recomputes for `node` be read once more than PyTorch allows.

    The handles are private to PyTorch. If a version stores them otherwise, nothing is done, and a second read raises
    CheckpointError.
    """
    for name in _raw_saved(type(node)):
        holder = getattr(getattr(node, name), "data", None)
        handles = getattr(holder, "handles", None)
        if holder is not None and type(handles) is dict:
            holder.handles = _KeptForOneMore(handles)


class _KeptForOneMore(dict):
    """The handles of a recomputed tensor, by backward pass. A read sets one to None: here the first such read has no effect."""

    def __init__(self, handles: dict):
        super().__init__(handles)
        self._read = set()

    def __setitem__(self, backward: int, handle) -> None:
        if handle is None and backward not in self._read:
            self._read.add(backward)
        else:
            super().__setitem__(backward, handle)


@cache
def _raw_saved(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
