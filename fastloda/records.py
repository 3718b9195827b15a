"""One backward pass that leaves the per-sample gradients of all trainable parameters, and nothing in `.grad`.

Autograd is asked only for what lies above the parameters: weight gradients summed over the batch are never computed.
A LoDA layer's node hands over its pieces from its own backward (it needs gz there anyway); any other operation is read
by a rule from its saved tensors just before it runs, or from its captured grad_output if nothing below it is needed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Size, Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

from fastloda.errors import PrivacyError
from fastloda.graph import LossGraph, Use
from fastloda.layout import batch_apart, locate
from fastloda.made import Made
from fastloda.pieces import PerSampleGrad, Piece
from fastloda.recomputed import let_rule_read_first, one_recomputation
from fastloda.regions import may_run_again
from fastloda.relaid import TILING, back_to_parameter
from fastloda.rules import Call, rule_of

# on_record(node, grad_output with the batch first, make_pieces): called once for each operation that uses a trainable parameter.
# make_pieces(samples) -> {input: Piece}
OnRecord = Callable[[Node, Tensor, Callable[[int], dict[int, Piece]]], None]


def per_sample_grads(
    losses: Tensor, graph: LossGraph, parameters: Mapping[str, nn.Parameter], samples: int, retain_graph: bool = False
) -> dict[str, PerSampleGrad]:
    """The gradient of each sample's mean loss over its views, for every parameter: exact, by one backward pass.

    losses [samples * views], sample-major.
    """
    grads = {name: PerSampleGrad(parameter.shape, samples) for name, parameter in parameters.items()}

    def on_record(node: Node, gy: Tensor, make_pieces: Callable[[int], dict[int, Piece]]) -> None:
        try:
            pieces = make_pieces(samples)
            for use in graph.uses[node]:
                if use.index not in pieces:
                    raise PrivacyError(f"used by {node.name()} (input {use.index}) without an exact per-sample rule")
                grads[use.name].add(of_parameter(use, pieces[use.index], samples))
        except PrivacyError as error:
            raise PrivacyError(f"{_names(graph, node)}: {error}") from error

    weights = losses.new_full(losses.shape, samples / len(losses))
    run_backward(losses, weights, graph, parameters, on_record, retain_graph)
    return grads


def of_parameter(use: Use, piece: Piece, samples: int) -> Piece:
    """The recipe for the parameter itself, from that for what the operation read."""
    if not use.steps:
        return piece
    keeps_norm = not any(isinstance(step, Made) or step.node.name() in TILING for step in use.steps)
    return piece.through(
        back_to_parameter(use.steps), keeps_norm, samples * sum(step.scratch_bytes for step in use.steps)
    )


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
    adapters = [node for node in graph.uses if rule_of(node).pieces is None]
    others = [node for node in graph.uses if rule_of(node).pieces is not None]
    lowest = [node for node in others if node not in graph.deeper]
    handles, read = [], {}
    try:
        for node in adapters:
            node.recorder = _adapter_recorder(node, graph.outer[node], on_record)
        handles += [node.register_prehook(_contiguous) for node in graph.batch_norms]
        for node in others:  # a lowest one runs too if it shares a parameter with an adapter
            handles.append(node.register_prehook(_rule_recorder(node, graph, on_record, read, runs=True)))
        adapter_edges = dict.fromkeys(node.next_functions[use.index] for node in adapters for use in graph.uses[node])
        inputs = [GradientEdge(*edge) for edge in (*adapter_edges, *((node, 0) for node in lowest))]
        with one_recomputation(), _unreadable_refused(graph, read), may_run_again(graph.compiled):
            captured = torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)
            for node, gy in zip(lowest, captured[len(adapter_edges) :]):
                if node not in read:
                    _rule_recorder(node, graph, on_record, read, runs=False)((gy,))
    finally:
        for handle in handles:
            handle.remove()
        for node in adapters:
            node.recorder = None


def _contiguous(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Of a batch of one, PyTorch 2.13's backward of BatchNorm takes rows that lie channels last for others on the CPU."""
    return tuple(gy.contiguous() if gy is not None and len(gy) == 1 else gy for gy in gradients)


def _adapter_recorder(node: Node, outer: int, on_record: OnRecord):
    """For a node that hands over its pieces, or what makes them."""

    def record(gy: Tensor, pieces: dict[int, Piece] | Callable[[], dict[int, Piece]]) -> None:
        def make_pieces(samples: int) -> dict[int, Piece]:
            made = pieces() if callable(pieces) else pieces
            if samples == 1 or _has_batch_first(gy.shape, outer):
                return made
            return {index: piece.batch_first(lambda t: _batch_first(t, outer)) for index, piece in made.items()}

        on_record(node, _batch_first(gy, outer), make_pieces)

    return record


def _has_batch_first(shape: Size, outer: int) -> bool:
    return not outer or locate(shape, outer) == (0, 1)


def _batch_first(t: Tensor, outer: int) -> Tensor:
    return t if _has_batch_first(t.shape, outer) else batch_apart(t, *locate(t.shape, outer))


def _rule_recorder(node: Node, graph: LossGraph, on_record: OnRecord, read: dict[Node, None], runs: bool):
    outer, shapes = graph.outer[node], {use.index: use.shape for use in graph.uses[node]}

    def make_pieces(gy: Tensor, samples: int) -> dict[int, Piece]:
        if runs:
            let_rule_read_first(node)
        return rule_of(node).pieces(Call(node, gy, samples, outer, shapes))

    def prehook(grad_outputs: tuple[Tensor | None, ...]) -> None:
        read[node] = None
        if grad_outputs[0] is not None:
            gy = grad_outputs[0].detach()
            on_record(node, _batch_first(gy, outer), lambda samples: make_pieces(gy, samples))

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
