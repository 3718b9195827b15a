"""What the autograd graph of a loss says about its parameters: every use of each, and by which operation.

The graph is the truth that module hooks only approximate: a weight used outside its layer, twice, tied to another
layer, or in a penalty added to the loss, all show as edges to its AccumulateGrad node. A private step covers a
parameter only if a rule covers every one of those edges.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor, nn
from torch.autograd.graph import Node

# A cast (autocast, mixed precision) and the transpose in x W^T only re-lay the parameter: looked through.
TRANSPOSE = "TBackward0"
TRANSPARENT = {TRANSPOSE, "ToCopyBackward0"}


@dataclass(frozen=True)
class Use:
    """Parameter `name` enters operation `node` as its input number `index`, transposed or not."""

    name: str
    node: Node
    index: int
    transposed: bool = False


@dataclass(frozen=True)
class LossGraph:
    """The uses of the trainable parameters below a loss, per operation."""

    uses: Mapping[Node, list[Use]]  # in an order in which inputs come before the operations that read them
    deeper: frozenset[Node]  # operations with other uses below them, which backward must pass through
    signature: int  # of the kinds of operations: equal for equal computations, whatever the batch size
    operations: frozenset[str]


def trace(losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> LossGraph:
    """Walk the graph below `losses` once. Cost: about a microsecond an edge."""
    order = _inputs_first(losses.grad_fn)
    consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
    for node in order:
        for index, (child, _) in enumerate(node.next_functions):
            if child is not None:
                consumers[child].append((node, index))

    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[Node, list[Use]] = defaultdict(list)
    for leaf in order:
        name = names.get(id(getattr(leaf, "variable", None)))
        if name is not None:
            for use in _uses(name, leaf, consumers):
                found[use.node].append(use)

    uses = {node: found[node] for node in order if node in found}
    kinds = [node.name() for node in order]
    return LossGraph(uses, _with_uses_below(order, uses), hash(tuple(kinds)), frozenset(kinds))


def parameter_shape(node: Node, index: int) -> Size | None:
    """The shape in which a parameter enters `node` as its input `index`; None if that is no parameter."""
    leaf, transposed = node.next_functions[index][0], False
    while leaf is not None and leaf.name() in TRANSPARENT:
        transposed ^= leaf.name() == TRANSPOSE
        leaf = leaf.next_functions[0][0]
    if not hasattr(leaf, "variable"):
        return None
    shape = leaf.variable.shape
    return shape[::-1] if transposed else shape


def _inputs_first(root: Node) -> list[Node]:
    """All nodes below root (and root), each after the nodes it leads to."""
    order, seen, stack = [], {root}, [(root, iter(root.next_functions))]
    while stack:
        node, edges = stack[-1]
        for child, _ in edges:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append((child, iter(child.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _uses(name: str, leaf: Node, consumers: Mapping[Node, list[tuple[Node, int]]]) -> list[Use]:
    uses, pending = [], [(leaf, False)]
    matrix = leaf.variable.dim() == 2  # x.t() of a vector is the vector
    while pending:
        tensor, transposed = pending.pop()
        for node, index in consumers[tensor]:
            kind = node.name()
            if kind in TRANSPARENT:
                pending.append((node, transposed ^ (matrix and kind == TRANSPOSE)))
            else:
                uses.append(Use(name, node, index, transposed))
    return uses


def _with_uses_below(order: list[Node], uses: Mapping[Node, list[Use]]) -> frozenset[Node]:
    leads_to_use: set[Node] = set()
    deeper: set[Node] = set()
    for node in order:
        if any(child in leads_to_use for child, _ in node.next_functions):
            leads_to_use.add(node)
            if node in uses:
                deeper.add(node)
        elif node in uses:
            leads_to_use.add(node)
    return frozenset(deeper)
