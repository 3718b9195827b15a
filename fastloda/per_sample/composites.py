"""Composites: values that a model computes from its parameters and constants alone, the same for all samples.

Examples are a weight divided by its norm, a mask times a weight, positions looked up for `arange(T)`, prompts through an MLP of
their own. No sample enters the operations that compute a composite, so that their rules could not tell samples apart. But the
composite is then used like a parameter: the rule of the operation that reads it together with features gives its gradient for
each sample, and autograd takes each of these back to the parameters.

The autograd graph does not tell constants from inputs. So the forward pass is watched: what is computed from parameters,
buffers and numbers alone is marked in the graph.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from fastloda.per_sample.batch_axis import LAYER_CALL
from fastloda.per_sample.node import Edges, Node, output_shape
from fastloda.per_sample.operations import TILING, kind_of
from fastloda.per_sample.relaying import Readers, is_step, relays

MARK = "fastloda: made of parameters and constants"
READING = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, Tensor.new_tensor}
AS_ANOTHER = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
# AS_ANOTHER read the values of their first tensor alone, LIKE_ANOTHER no values at all.
LIKE_ANOTHER: set[Callable] = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.rand_like, torch.randn_like}
LIKE_ANOTHER |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty}
# Uninitialised memory, which kernels of Triton or C++ may fill unseen.
UNWRITTEN: set[Callable] = {torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted}
UNWRITTEN |= {Tensor.new_empty, Tensor.new_empty_strided}
WHOLE_NUMBERS = {Tensor.item, Tensor.__int__, Tensor.__index__}

Consumers = Mapping[Node, Readers]  # node -> the operations that read its outputs


class Marking(TorchFunctionMode):
    """The mode that marks the operations called inside it whose inputs are parameters, buffers, numbers, or made of these.

    Every other tensor counts as private: arguments, tensors that a closure holds, that a custom autograd Function returns, or
    that were made uninitialised. A number read from private values makes all later values private too; sizes and booleans do
    not.

    Attributes:
        count: how many marked operations do more than re-lay a parameter.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.count = 0
        self._public = {id(t): t for t in map(_storage, [*model.parameters(), *model.buffers()]) if t is not None}
        self._private_numbers = False

    def __torch_function__(self, func: Callable, types, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        given = given[: 1 if func in AS_ANOTHER else 0 if func in LIKE_ANOTHER else None]
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        public = [t for t in given if self._is_public(t)]
        versions = [_version(t) for t in public]
        result = func(*args, **kwargs)
        if len(public) < len(given):
            self._forget([t for t, version in zip(public, versions) if _version(t) != version])
            self._private_numbers |= _reads_numbers(func, result)
        elif not (self._private_numbers or func in UNWRITTEN or _reads_values(func, leaves)):
            self._mark([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)] + given)
        return result

    def _is_public(self, t: Tensor) -> bool:
        storage = _storage(t)
        return storage is not None and self._public.get(id(storage)) is storage

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            self._public.pop(id(_storage(t)), None)

    def _mark(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            storage = _storage(t)
            if storage is not None:
                self._public[id(storage)] = storage
                node: Node = t.grad_fn
                if node is not None:
                    node.metadata[MARK] = None
                    self.count += _is_made(node)


def _is_made(node: Node) -> bool:
    """Tell whether the node does more than re-lay a parameter. Views are skipped first, as a linear map may end in one."""
    while is_step(node):
        node = node.next_functions[0][0]
    return not hasattr(node, "variable")


def is_marking() -> bool:
    return any(isinstance(mode, Marking) for mode in _get_current_function_mode_stack())


@contextmanager
def marking(model: nn.Module) -> Generator[Marking]:
    """Mark what is computed inside the context from parameters and constants, those of the outermost of nested models.

    Nothing is marked where torch.compile compiles a part of the model, as that part would then not be compiled.
    """
    active = next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, Marking)), None)
    mode = active or Marking(model)
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    with nullcontext() if active or compiled else mode:
        yield mode


class Composite(NamedTuple):
    """The output `number` of `node`, made of the parameter whose graph begins at `leaf`. It is used like a `relaying.Step`."""

    node: Node
    number: int
    leaf: Node

    @property
    def scratch_bytes(self) -> int:
        """The bytes of temporaries that `back` needs for one sample."""
        return 4 * output_shape(self.node, self.number).numel()

    def back(self, grads: Tensor) -> Tensor:
        """Take gradients of this value [samples, *after] to the parameter's [samples, *before], by one vectorised backward."""
        grads = grads.to(self.node._input_metadata[self.number].dtype)
        grads = grads.reshape(len(grads), *output_shape(self.node, self.number))
        edges = [GradientEdge(self.node, self.number)], [GradientEdge(self.leaf, 0)]
        with _recomputed_each_time():
            try:
                return torch.autograd.grad(*edges, [grads], retain_graph=True, is_grads_batched=True)[0]
            except RuntimeError:  # an operation that can't be vectorised
                by_sample = [torch.autograd.grad(*edges, [grad], retain_graph=True)[0] for grad in grads]
                return torch.stack(by_sample)


@contextmanager
def _recomputed_each_time() -> Generator[None]:
    """Let each backward pass recompute what checkpointing dropped: within one group PyTorch lets that be read only once."""
    group = getattr(torch._C, "_get_graph_exec_group", lambda: None)()
    if group is None:
        yield
        return
    torch._C._set_graph_exec_group(None)
    try:
        yield
    finally:
        torch._C._set_graph_exec_group(group)


def composite_nodes(
    edges: dict[Node, Edges],
    consumers: Consumers,
    outer: Mapping[Node, int],
    covers: Callable[[Node, int, Size, int], bool],
) -> frozenset[Node]:
    """Find the operations whose values are made of parameters and constants alone, and are used only where a rule covers them.

    Args:
        edges: node -> its edges, each node after its inputs.
        consumers: node -> the operations that read its outputs.
        outer: node -> the blocks before the batch coordinate in its output.
        covers: (node, input, shape, outer) -> whether a rule covers a parameter that enters there.
    """
    marked = {node for node in edges if MARK in node.metadata}
    if not marked:
        return frozenset()
    for node in reversed(edges):  # what a marked value is made of is marked too
        if node in marked:
            marked.update(child for child, _ in edges[node] if child is not None)
    for node, below in edges.items():
        if is_step(node) and below[0][0] in marked:
            marked.add(node)

    made: set[Node] = set()

    def fits(node: Node, consumer: Node, index: int, number: int) -> bool:
        if consumer.name() == LAYER_CALL and index < len(consumer.call.outputs):  # a mere output of the layer
            return False
        return consumer in made or covers(consumer, index, output_shape(node, number), outer[consumer])

    for node in reversed(edges):
        if node in marked and edges[node] and all(fits(node, *consumer) for consumer in consumers[node]):
            others = [consumer for consumer in consumers[node] if consumer[0] not in made]
            if kind_of(node) not in TILING or not others or relays(node, others, outer):
                made.add(node)
    return frozenset(made)


def composite_uses(leaf: Node, consumers: Consumers, made: frozenset[Node]) -> dict[tuple[Node, int], Composite]:
    """Map each (operation, number of its input) to the composite it reads there, made of the parameter that begins at leaf."""
    uses, seen, pending = {}, {leaf}, [leaf]
    while pending:
        node = pending.pop()
        for consumer, index, number in consumers[node]:
            if consumer in made:
                if consumer not in seen:
                    seen.add(consumer)
                    pending.append(consumer)
            elif node is not leaf:
                uses[consumer, index] = Composite(node, number, leaf)
    return uses


def _storage(t: Tensor) -> torch.UntypedStorage | None:
    try:
        return t.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse, or a wrapper
        return None


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _reads_values(func: Callable, leaves: Sequence) -> bool:
    """Tell whether func makes a tensor from Python or NumPy values, which may be private; a single Python number is not."""
    numbers = sum(isinstance(leaf, (int, float, complex)) for leaf in leaves)
    reads = func in READING and numbers != 1 and not any(isinstance(leaf, Tensor) for leaf in leaves)
    return reads or any(type(leaf).__module__ == "numpy" for leaf in leaves)


def _reads_numbers(func: Callable, result) -> bool:
    whole = func in WHOLE_NUMBERS and not isinstance(result, bool)
    return whole or isinstance(result, (float, complex, list)) or type(result).__module__ == "numpy"
