"""The refusal of losses that use the gradient of a mean over the samples, as a gradient penalty may.

    (gx,) = torch.autograd.grad(model(x).mean(), x, create_graph=True)

divides each sample's gradient by the number of samples, so that one more record changes every sample's penalty. The graph of
the loss shows only the result of this division. So the engine (`looking_engine.py`) inspects each backward pass with
`create_graph`, and marks the gradients that it takes of a mean. A private step refuses losses whose graph holds such a mark.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter

from fastloda.errors import PrivacyError
from fastloda.per_sample.graph import nodes_below
from fastloda.per_sample.node import Edges, Node, output_shape
from fastloda.per_sample.operations import LINEAR, MEAN, NONE
from fastloda.per_sample.sample_flow import ONCE, SampleFlow, uniform
from fastloda.per_sample.states import Operation, Rows, State, Total

Source = Tensor | GradientEdge
Start = tuple[tuple[Node, int], Tensor | None]  # an operation and which of its outputs, and the gradient there

_MARK = "samples of a mean whose gradient this is"  # a key in a node's metadata, which lives as long as the graph
_any_marks = False


class AverageFlow(SampleFlow):
    """The sample flow from a model's inputs to a scalar. It guesses where it can't follow the samples, and refuses nothing."""

    def _state(self, op: Operation) -> State:
        try:
            return super()._state(op)
        except Exception:  # user code may raise anything, and nothing is refused here
            means = op.kind == "Mean" or getattr(op.node, "_saved_reduction", NONE) == MEAN
            averaged = means or any(isinstance(given.state, Total) and given.state.averaged for given in op.inputs)
            rows = op.shape and op.shape[0] == self.samples and not averaged
            return Rows(1, self.whole) if rows else Total(averaged)

    def unknown(self, op: Operation) -> State:
        op.refuse_unseen("has no rule")

    def weights_of(self, op: Operation) -> frozenset[float]:
        # a scale inside the model, such as attention's, may equal 1 / samples by chance
        return super().weights_of(op) if op.kind in LINEAR else ONCE

    def makes_mean(self, factor: float) -> bool:
        return bool(factor) and math.isclose(1 / factor, self.samples, rel_tol=1e-6)

    def _check_picks(self, made: Iterable[State | None]) -> None:
        pass

    def averages(self, below: Mapping[Node, Edges], inputs: Mapping[Node, int], starts: Sequence[Start]) -> bool:
        """Tell whether a backward pass starts from a mean over the samples, or passes through one.

        Args:
            below: the nodes of the pass, each with its edges.
            inputs: node -> the number of its outputs, all [samples, ...].
            starts: the (node, output)s that the pass starts from, each with its gradient, None for 1.
        """
        self.check(below, inputs, [(node, number) for node in below for number in range(len(node._input_metadata))])
        weighed = (self._weighed(*start) for start in starts)
        return any(isinstance(state, Total) and state.averaged for state in (*self.states.values(), *weighed))

    def _weighed(self, root: tuple[Node, int], grad: Tensor | None) -> Total | None:
        """Find the state of the sum of root * grad; None unless grad is one nonzero number throughout and root has a state."""
        factor = None if grad is None else uniform(grad)
        return self.sum_of(self.times(self.weights.get(root, ONCE), factor)) if factor and root in self.states else None


def mark_averaged(starts: Sequence[Start], inputs: Sequence[Source], grads: Sequence[Tensor | None] | None) -> None:
    """Mark the gradients that a backward pass with `create_graph` computed, if it went through a mean over its inputs' rows.

    Args:
        starts: the (node, output)s that the pass started from, each with its gradient, None for 1.
        inputs: the tensors or edges whose gradients were asked for; empty for all leaves, as in `Tensor.backward`.
        grads: the gradients of `inputs`, in their order; None if they are in `.grad`.
    """
    if any(level.key() is TransformType.Vmap for level in get_interpreter_stack() or ()):
        return  # inside vmap there is only one sample: a mean is over its own numbers
    below = nodes_below([node for (node, _), _ in starts])
    sources = inputs or [node.variable for node in below if hasattr(node, "variable")]
    if grads is None:
        grads = [source.grad for source in sources if isinstance(source, Tensor)]
    counts: dict[int, dict[Node, int]] = defaultdict(dict)
    for source in sources:
        edge = source if isinstance(source, GradientEdge) else get_gradient_edge(source)
        shape = output_shape(edge.node, edge.output_nr)
        if len(shape) and shape[0] > 1 and not isinstance(source, Parameter):
            counts[shape[0]][edge.node] = edge.output_nr + 1
    for samples, places in counts.items():
        if AverageFlow(samples, {}).averages(below, places, starts):
            _mark(grads, samples)


def _mark(grads: Iterable[Tensor | None], samples: int) -> None:
    global _any_marks
    for grad in grads:
        while isinstance(grad, Tensor) and grad.grad_fn is not None:
            node: Node = grad.grad_fn
            node.metadata.setdefault(_MARK, set()).add(samples)
            _any_marks = True
            grad = get_unwrapped(grad) if is_functorch_wrapped_tensor(grad) else None


def check_not_averaged(losses: Tensor) -> None:
    """Refuse losses that use the gradient of a mean over as many rows as there are losses, or a multiple or divisor of that.

    Raises:
        PrivacyError: losses use such a gradient; the message says what to do.
    """
    if not _any_marks or losses.grad_fn is None:
        return
    rows = len(losses)
    means = {count for node in nodes_below([losses.grad_fn]) for count in node.metadata.get(_MARK, ())}
    if any(rows % count == 0 or count % rows == 0 for count in means):
        raise PrivacyError(
            "the losses use a gradient (create_graph=True) of a mean over the samples, which is divided by their number: one "
            "more record would change each sample's loss. Take the gradient of the sum, "
            "torch.autograd.grad(y.sum(), x, create_graph=True), which gives each sample its own"
        )
