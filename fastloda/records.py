"""One backward pass that leaves the per-sample gradients of all trainable parameters, and nothing in `.grad`.

Autograd is asked only for what lies above the parameters: weight gradients summed over the batch are never computed.
A LoDA layer's node hands over its pieces from its own backward (it needs gz there anyway); any other operation is read
by a rule from its saved tensors just before it runs, or from its captured grad_output if nothing below it is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

from fastloda.errors import PrivacyError
from fastloda.graph import LossGraph
from fastloda.pieces import PerSampleGrad, Piece
from fastloda.recomputed import let_rule_read_first, one_recomputation
from fastloda.rules import LODA_NODE, RULES

# on_record(node, grad_output, make_pieces): called once for each operation that uses a trainable parameter.
OnRecord = Callable[[Node, Tensor, Callable[[], dict[int, Piece]]], None]


def per_sample_grads(
    losses: Tensor, graph: LossGraph, parameters: Mapping[str, nn.Parameter], samples: int, retain_graph: bool = False
) -> dict[str, PerSampleGrad]:
    """The gradient of each sample's mean loss over its views, for every parameter: exact, by one backward pass.

    losses [samples * views], sample-major.
    """
    grads = {name: PerSampleGrad(parameter.shape, samples) for name, parameter in parameters.items()}

    def on_record(node: Node, gy: Tensor, make_pieces: Callable[[], dict[int, Piece]]) -> None:
        try:
            pieces = make_pieces()
            for use in graph.uses[node]:
                piece = pieces[use.index]
                grads[use.name].add(piece.transposed() if use.transposed else piece)
        except PrivacyError as error:
            raise PrivacyError(f"{_names(graph, node)}: {error}") from error

    weights = losses.new_full(losses.shape, samples / len(losses))
    run_backward(losses, weights, graph, parameters, on_record, retain_graph)
    return grads


def _names(graph: LossGraph, node: Node) -> str:
    return ", ".join(repr(use.name) for use in graph.uses[node])


def run_backward(
    losses: Tensor,
    weights: Tensor,
    graph: LossGraph,
    parameters: Mapping[str, nn.Parameter],
    on_record: OnRecord,
    retain_graph: bool,
) -> None:
    """Backward from sum_i weights[i] losses[i] to the lowest uses of the parameters; every use goes through on_record."""
    if not graph.uses:
        return
    adapters = [node for node in graph.uses if node.name() == LODA_NODE]
    others = [node for node in graph.uses if node.name() != LODA_NODE]
    lowest = [node for node in others if node not in graph.deeper]
    handles, read = [], {}
    try:
        for node in adapters:
            node.recorder = _adapter_recorder(node, on_record)
        for node in others:  # a lowest one runs too if it shares a parameter with an adapter
            handles.append(node.register_prehook(_rule_recorder(node, on_record, read, runs=True)))
        adapter_names = dict.fromkeys(use.name for node in adapters for use in graph.uses[node])
        inputs = [parameters[name] for name in adapter_names] + [GradientEdge(node, 0) for node in lowest]
        with one_recomputation(), _unreadable_refused(graph, read):
            captured = torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)
            for node, gy in zip(lowest, captured[len(adapter_names) :]):
                if node not in read:
                    _rule_recorder(node, on_record, read, runs=False)((gy,))
    finally:
        for handle in handles:
            handle.remove()
        for node in adapters:
            node.recorder = None


def _adapter_recorder(node: Node, on_record: OnRecord):
    return lambda gy, pieces: on_record(node, gy, lambda: pieces)


def _rule_recorder(node: Node, on_record: OnRecord, read: dict[Node, None], runs: bool):
    def make_pieces(gy: Tensor) -> dict[int, Piece]:
        if runs:
            let_rule_read_first(node)
        return RULES[node.name()].pieces(node, gy)

    def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
        read[node] = None
        if grad_outputs[0] is not None:
            gy = grad_outputs[0].detach()
            on_record(node, gy, lambda: make_pieces(gy))

    return prehook


@contextmanager
def _unreadable_refused(graph: LossGraph, read: Mapping[Node, None]) -> Iterator[None]:
    """A PrivacyError with a name, should this version of PyTorch let a checkpointed tensor be read only once."""
    try:
        yield
    except CheckpointError as error:
        if not read or "unpacked once" not in str(error):
            raise
        raise PrivacyError(
            f"{_names(graph, next(reversed(read)))} trains inside torch.utils.checkpoint, and torch {torch.__version__} lets no "
            "rule read its input there: leave that layer out of the checkpoint (use_reentrant=True does not help), or freeze it"
        ) from error
