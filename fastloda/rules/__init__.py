"""Exact per-sample gradient rules, one for each operation of the autograd graph that may use a trainable parameter.

A rule sees the operation's node (its saved tensors) and its grad_output, and answers with a `Piece` for each parameter
input. It may raise `PrivacyError` for a form of the operation that it does not cover. Uses by any other operation, as another
input, or that `refuses` is true for, are refused before backward runs. A LoDA layer's node hands over its pieces itself.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from fastloda.ops import A_INPUT, B_INPUT
from fastloda.pieces import Piece
from fastloda.rules.broadcast import add, mul, varies_along_batch
from fastloda.rules.conv import convolution
from fastloda.rules.embedding import embedding
from fastloda.rules.linear import addmm, mm
from fastloda.rules.norm import group_norm, layer_norm

LODA_NODE = "LoDAFunctionBackward"  # how the autograd graph names a LoDA layer


class Rule(NamedTuple):
    """`pieces(node, grad_output) -> {input: Piece}` for the operation's inputs that may be parameters."""

    pieces: Callable[[Node, Tensor], dict[int, Piece]] | None
    inputs: tuple[int, ...]
    refuses: Callable[[Node, int], bool] = lambda node, index: False


RULES = {
    LODA_NODE: Rule(None, (A_INPUT, B_INPUT)),
    "AddBackward0": Rule(add, (0, 1), varies_along_batch),
    "AddmmBackward0": Rule(addmm, (0, 2)),
    "ConvolutionBackward0": Rule(convolution, (1, 2)),
    "EmbeddingBackward0": Rule(embedding, (0,)),
    "MmBackward0": Rule(mm, (1,)),
    "MulBackward0": Rule(mul, (0, 1), varies_along_batch),
    "NativeGroupNormBackward0": Rule(group_norm, (1, 2)),
    "NativeLayerNormBackward0": Rule(layer_norm, (1, 2)),
}
