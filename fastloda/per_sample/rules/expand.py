"""The rule of a parameter that `expand` or `repeat` copies along the batch.

Examples are the class token of a transformer and the scale of InstanceNorm. Each copy has a gradient of its own, which is all
that a rule needs.
"""

from torch import Size, Tensor

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node, output_shape
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.relaying import sum_copies
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.tensors import accumulable


def makes_no_copy(node: Node, shape: Size, outer: int) -> bool:
    """Tell whether, in a batch of several, the output has no more entries than the parameter: then the batch gets no copies."""
    return bool(outer) and output_shape(node).numel() == shape.numel()


def tile(call: Call) -> dict[int, Recipe]:
    """Make the recipe of expand(p) or p.repeat(...): input 0 p. A sample's gradient is the sum over its copies."""
    shape = call.shapes[0]
    if call.samples == 1:
        return {0: Recipe(lambda gy, samples: sum_copies(accumulable(gy), shape), (call.gy[None],))}
    dim, blocks = call.place
    own = ((1,) * (call.gy.dim() - len(shape)) + tuple(shape))[dim]  # the entries of p in the batch's dimension
    rows = call.gy.shape[dim] // blocks
    if blocks != 1 or rows % (call.samples * own):
        raise PrivacyError(
            f"a parameter of shape {tuple(shape)} is repeated to {tuple(call.gy.shape)} for {call.samples} samples: the batch "
            "must be the outermost of the copies"
        )

    def grad(gy: Tensor, samples: int) -> Tensor:
        # [samples, copies x own, *other dimensions]
        own_first = gy.reshape(samples, -1, *gy.shape[1:]).squeeze(2 + dim)
        return sum_copies(accumulable(own_first.movedim(1, 1 + dim)), shape)

    return {0: Recipe(grad, (call.apart(call.gy),))}
