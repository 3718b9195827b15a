"""The uses of each parameter in the autograd graph of a loss, and the operations that make them.

Module hooks would only approximate this. In the graph each use of a weight is an edge to its AccumulateGrad node, also where
the weight is used outside its layer, twice, in a layer tied to its own, or in a penalty added to the loss. A private step
covers a parameter only if a rule covers every such edge.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Size, Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastloda.per_sample.batch_axis import follow_batch
from fastloda.per_sample.composites import Composite, Consumers, composite_nodes, composite_uses
from fastloda.per_sample.node import Edges, Node, output_shape
from fastloda.per_sample.operations import TILING, kind_of
from fastloda.per_sample.regions import COMPILED, code_number, may_pick_rows
from fastloda.per_sample.relaying import Step, relays
from fastloda.per_sample.rules import covers

CONVOLUTION, BATCH_NORM = "ConvolutionBackward0", "NativeBatchNormBackward0"


@dataclass(frozen=True)
class Use:
    """The use of parameter `name`, or of what `steps` make of it, by the operation `node` as its input `index`, in `shape`."""

    name: str
    node: Node
    index: int
    shape: Size
    steps: tuple[Step | Composite, ...] = ()


@dataclass(frozen=True)
class LossGraph:
    """The uses of the trainable parameters below a loss, per operation."""

    uses: Mapping[Node, list[Use]]  # in an order in which inputs come before the operations that read them
    outer: Mapping[Node, int]  # blocks before the batch coordinate in the output of each: see `batch_axis.py`
    deeper: frozenset[Node]  # operations with other uses below them, which backward must pass through
    signature: int  # a hash of the operations, their dimensions and which factors are 0 or 1, not of the batch size
    operations: frozenset[str]  # the kinds of all operations
    picked: Mapping[Node, str]  # operations whose rows the data assigns to samples -> the kind that picks these rows
    crossings: list[str]  # kinds of operations that give a sample the rows of others
    unsure: bool  # whether rows may have been picked or reordered by data that the graph does not show
    shared: frozenset[Node]  # operations whose output has no rows of the samples
    compiled: tuple[Node, ...]  # regions that torch.compile made one operation of
    convolutions: tuple[Node, ...]  # all of them, with frozen weights too
    batch_norms: tuple[Node, ...]  # all of them, frozen ones too


def trace(
    losses: Tensor | Iterable[Tensor],
    parameters: Mapping[str, nn.Parameter],
    covered: Callable[..., bool] = covers,
    *,
    alone: bool = False,
) -> LossGraph:
    """Find the uses of parameters in the graph below `losses`, by one walk.

    Args:
        losses: [rows], or several outputs of a model, each with `rows` rows.
        parameters: the trainable parameters, by name.
        covered: a function like `rules.covers`, which tells whether a rule covers a use.
        alone: whether all losses are views of one sample, which then owns all that the graph holds.
    """
    roots = [losses] if isinstance(losses, Tensor) else list(losses)
    edges = nodes_below([root.grad_fn for root in roots if root.grad_fn is not None])
    consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
    for node, below in edges.items():
        for index, (child, number) in enumerate(below):
            if child is not None:
                consumers[child].append((node, index, number))

    places = follow_batch(edges, len(roots[0]) if roots[0].dim() and not alone else 1)
    made = composite_nodes(edges, consumers, places.outer, covered)
    uses = _uses_by_node(edges, parameters, consumers, places.outer, made)
    compiled, convolutions, batch_norms = (
        tuple(node for node in edges if node.name() == kind) for kind in (COMPILED, CONVOLUTION, BATCH_NORM)
    )
    return LossGraph(
        uses=uses,
        outer={node: places.outer[node] for node in uses},
        deeper=_with_uses_below(edges, uses),
        signature=_signature(edges, compiled, [places.outer[node] for node in uses]),
        operations=frozenset(node.name() for node in edges),
        picked={node: places.picked[node] for node in uses if node in places.picked},
        crossings=places.crossings,
        unsure=places.unsure or not places.laid.isdisjoint(uses) or any(map(may_pick_rows, compiled)),
        shared=places.shared.intersection(uses),
        compiled=compiled,
        convolutions=convolutions,
        batch_norms=batch_norms,
    )


def _signature(nodes: Collection[Node], compiled: Iterable[Node], outer: Iterable[int]) -> int:
    """Hash what distinguishes one kind of computation from another: see `LossGraph.signature`."""
    # A mode of the caller would see a saved number as a tensor, at which PyTorch fails, or as a number that the model reads.
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        settings = [setting for node in nodes for setting in _settings(node)]
    kinds = (node.name() for node in nodes)
    return hash((*kinds, *settings, *map(code_number, compiled), *(blocks > 1 for blocks in outer)))


DIMENSIONS = ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1")
FACTORS = ("_saved_alpha", "_saved_value")
FACTOR_TENSORS = {"MulBackward0": ("_raw_saved_self", "_raw_saved_other"), "DivBackward0": ("_raw_saved_self",)}


@cache
def _setting_names(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the names of the dimensions, and of the factors, that operations of this type save."""
    known = set(dir(kind))
    return tuple(known.intersection(DIMENSIONS)), tuple(known.intersection(FACTORS))


def _settings(node: Node) -> Iterator[object]:
    """Yield what distinguishes an operation from others of its kind: its dimensions, and which of its factors are 0 or 1.

    When a factor leaves 0 or 1, a term may begin to count that had no effect before (a loss that is ramped up, a mixture). A
    change between other values has no such effect.
    """
    dims, factors = _setting_names(type(node))
    for name in dims:
        yield getattr(node, name)
    for name in factors:
        yield _zero_or_one(getattr(node, name))
    if node.name() == "LerpBackward0":
        yield _zero_or_one(node._saved_weight)
    for name in FACTOR_TENSORS.get(node.name(), ()):
        factor = getattr(getattr(node, name), "data", None)
        if type(factor) is Tensor and not factor.dim() and factor.device.type == "cpu":  # to read from a GPU would wait
            yield _zero_or_one(factor.item())


def _zero_or_one(factor: object) -> object:
    return factor if isinstance(factor, (int, float)) and factor in (0, 1) else None


def nodes_below(roots: Iterable[Node], ends: Container[Node] = ()) -> dict[Node, Edges]:
    """Map the roots and each node below them to its edges, each node after its inputs; PyTorch is asked once for each node.

    ends: nodes below which the search does not go.
    """
    found: dict[Node, Edges] = {}
    seen: set[Node] = set()
    stack = [(None, (), iter([(root, 0) for root in roots]))]
    while stack:
        node, edges, waiting = stack[-1]
        child = next((child for child, _ in waiting if child is not None and child not in seen), None)
        if child is None:
            found[node] = edges
            stack.pop()
        else:
            seen.add(child)
            below = () if child in ends else child.next_functions
            stack.append((child, below, iter(below)))
    del found[None]
    return found


def _uses_by_node(
    nodes: Iterable[Node],
    parameters: Mapping[str, nn.Parameter],
    consumers: Consumers,
    outer: Mapping[Node, int],
    made: frozenset[Node],
) -> dict[Node, list[Use]]:
    """Find the uses of all parameters by the operations that make them, in the order of `nodes`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[Node, list[Use]] = defaultdict(list)
    for leaf in nodes:
        name = names.get(id(getattr(leaf, "variable", None)))
        for use in _uses(name, leaf, consumers, outer, made) if name is not None else ():
            found[use.node].append(use)
    return {node: found[node] for node in nodes if node in found}


def _uses(name: str, leaf: Node, consumers: Consumers, outer: Mapping[Node, int], made: frozenset[Node]) -> list[Use]:
    """List the uses of the parameter that begins at `leaf`: of itself, after steps that re-lay it, and of its composites."""
    uses: dict[tuple[Node, int], Use] = {}
    pending: list[tuple[Node, tuple[Step, ...]]] = [(leaf, ())]
    while pending:
        tensor, before = pending.pop()
        for node, index, number in consumers[tensor]:
            steps = before if tensor is leaf else (*before, Step(tensor, number))
            if relays(node, consumers[node], outer) or node in made and kind_of(node) in TILING:
                pending.append((node, steps))
            elif node not in made:
                uses[node, index] = Use(name, node, index, output_shape(tensor, number), steps)
    for (node, index), value in composite_uses(leaf, consumers, made).items():
        if (node, index) not in uses:
            uses[node, index] = Use(name, node, index, output_shape(value.node, value.number), (value,))
    return list(uses.values())


def _with_uses_below(edges: Mapping[Node, Edges], uses: Mapping[Node, list[Use]]) -> frozenset[Node]:
    leading: set[Node] = set()  # nodes that are in `uses`, or above one that is
    deeper: set[Node] = set()
    for node, below in edges.items():
        if any(child in leading for child, _ in below):
            deeper.add(node)
            leading.add(node)
        elif node in uses:
            leading.add(node)
    return frozenset(deeper.intersection(uses))
