"""One backward pass that leaves the per-sample gradients of all trainable parameters, and nothing in `.grad`.

Autograd is asked only for what lies above the parameters: weight gradients summed over the batch are never computed.
A LoDA layer's node hands over its pieces from its own backward (it needs gz there anyway); any other operation is read
by a rule from its saved tensors just before it runs, or from its captured grad_output if nothing below it is needed.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fastloda.graph import LossGraph
from fastloda.pieces import PerSampleGrad, Piece
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
        pieces = make_pieces()
        for use in graph.uses[node]:
            piece = pieces[use.index]
            grads[use.name].add(piece.transposed() if use.transposed else piece)

    weights = losses.new_full(losses.shape, samples / len(losses))
    run_backward(losses, weights, graph, parameters, on_record, retain_graph)
    return grads


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
    handles, read = [], set()
    try:
        for node in adapters:
            node.recorder = _adapter_recorder(node, on_record)
        for node in others:  # a lowest one runs too if it shares a parameter with an adapter
            handles.append(node.register_prehook(_rule_recorder(node, on_record, read)))
        adapter_names = dict.fromkeys(use.name for node in adapters for use in graph.uses[node])
        inputs = [parameters[name] for name in adapter_names] + [GradientEdge(node, 0) for node in lowest]
        captured = torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)
        for node, gy in zip(lowest, captured[len(adapter_names) :]):
            if node not in read:
                _rule_recorder(node, on_record, read)((gy,))
    finally:
        for handle in handles:
            handle.remove()
        for node in adapters:
            node.recorder = None


def _adapter_recorder(node: Node, on_record: OnRecord):
    return lambda gy, pieces: on_record(node, gy, lambda: pieces)


def _rule_recorder(node: Node, on_record: OnRecord, read: set[Node]):
    def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
        read.add(node)
        if grad_outputs[0] is not None:
            gy = grad_outputs[0].detach()
            on_record(node, gy, lambda: RULES[node.name()].pieces(node, gy))

    return prehook
