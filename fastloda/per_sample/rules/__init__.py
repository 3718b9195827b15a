"""Exact per-sample gradient rules, one for each operation of the autograd graph that may use a trainable parameter.

A rule takes a `Call` of the operation, with its node (saved tensors) and grad_output, and returns a `Recipe` for each input that
is a parameter, in the shape in which the parameter enters. It may raise `PrivacyError` for a form of the operation that it does
not cover. Uses by any other operation, as another input, or for which `refuses` is true, are refused before backward runs. A
node that passes its recipes to a `receiver` itself (a LoDA layer, a layer with a rule of its own) needs no function here.
"""

from collections.abc import Callable, Collection
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from torch import Size

from fastloda.errors import PrivacyError
from fastloda.per_sample.node import Node, output_shape
from fastloda.per_sample.recipe import Recipe
from fastloda.per_sample.rules.broadcast import (
    add,
    addcmul,
    div,
    masked_fill,
    mul,
    prelu,
    sub,
    varies_along_batch,
    where,
)
from fastloda.per_sample.rules.call import Call
from fastloda.per_sample.rules.conv import convolution
from fastloda.per_sample.rules.embedding import embedding, embedding_bag
from fastloda.per_sample.rules.expand import makes_no_copy, tile
from fastloda.per_sample.rules.linear import addmm, bilinear, bmm, mm, mv, one_for_each_row
from fastloda.per_sample.rules.norm import batch_norm, group_norm, layer_norm, rms_norm

if TYPE_CHECKING:  # graph.py imports these rules
    from fastloda.per_sample.graph import LossGraph, Use

Recipes = Callable[[Call], dict[int, Recipe]]


class Rule(NamedTuple):
    """The rule of one operation.

    Attributes:
        recipes: a function that makes {number of the input: Recipe} from a Call; None if the node passes them to a receiver.
        inputs: the numbers of the inputs that may be parameters.
        refuses: (node, shape of the parameter, outer) -> whether this use is not covered.
    """

    recipes: Recipes | None
    inputs: Collection[int]
    refuses: Callable[[Node, Size, int], bool] = lambda node, shape, outer: False


RULES = {
    "AddBackward0": Rule(add, (0, 1), varies_along_batch),
    "AddcmulBackward0": Rule(addcmul, (0, 1, 2), varies_along_batch),
    "AddmmBackward0": Rule(addmm, (0, 2)),
    "BmmBackward0": Rule(bmm, (0, 1), one_for_each_row),
    "ConvolutionBackward0": Rule(convolution, (1, 2)),
    "DivBackward0": Rule(div, (0, 1), varies_along_batch),
    "EmbeddingBackward0": Rule(embedding, (0,)),
    "EmbeddingBagBackward0": Rule(embedding_bag, (0,)),
    "ExpandBackward0": Rule(tile, (0,), makes_no_copy),
    "FusedRmsNormBackward0": Rule(rms_norm, (1,)),
    "MaskedFillBackward0": Rule(masked_fill, (0,), varies_along_batch),
    "MmBackward0": Rule(mm, (1,)),
    "MulBackward0": Rule(mul, (0, 1), varies_along_batch),
    "MvBackward0": Rule(mv, (1,)),
    "NativeBatchNormBackward0": Rule(batch_norm, (1, 2)),
    "NativeGroupNormBackward0": Rule(group_norm, (1, 2)),
    "NativeLayerNormBackward0": Rule(layer_norm, (1, 2)),
    "PreluKernelBackward0": Rule(prelu, (1,), varies_along_batch),
    "RepeatBackward0": Rule(tile, (0,), makes_no_copy),
    "SubBackward0": Rule(sub, (0, 1), varies_along_batch),
    "TrilinearBackward0": Rule(bilinear, (1,)),
    "WhereBackward0": Rule(where, (0, 1), varies_along_batch),
}
FUNCTION_RULES: dict[type, Rule] = {}  # autograd.Function -> its rule; by class, as their names need not be unique


def rule_of(node: Node) -> Rule | None:
    own = FUNCTION_RULES.get(getattr(type(node), "_forward_cls", None))
    return own or RULES.get(node.name())


def recipes_of(node: Node) -> Recipes | None:
    """Find the function that makes the recipes of an operation; None if the node passes them to a receiver.

    Raises:
        PrivacyError: the operation has no rule.
    """
    rule = rule_of(node)
    if rule is None:
        raise PrivacyError(f"used by {node.name()} without an exact per-sample rule")
    return rule.recipes


def may_cover(node: Node, index: int, shape: Size, outer: int = 0) -> bool:
    """Tell whether `covers` holds for some place of the batch in the output; `outer` is not read."""
    rows = output_shape(node)
    return any(covers(node, index, shape, before) for before in {prod(rows[:dim]) for dim in range(len(rows))})


def covers(node: Node, index: int, shape: Size, outer: int) -> bool:
    """Tell whether a rule covers a parameter that enters the operation as input number `index`, in `shape`.

    No rule covers complex outputs, where a real parameter's gradient is the real part of a complex product.
    """
    rule = rule_of(node)
    if rule is None or rule.recipes is not None and any(output.dtype.is_complex for output in node._input_metadata):
        return False
    return index in rule.inputs and not rule.refuses(node, shape, outer)


def uncovered(graph: "LossGraph", cover: Callable[[Node, int, Size, int], bool] = covers) -> "list[Use]":
    """List the uses in a graph that no rule covers; cover: `covers` or `may_cover`."""
    uses = [use for of_node in graph.uses.values() for use in of_node]
    return [use for use in uses if not cover(use.node, use.index, use.shape, graph.outer[use.node])]
