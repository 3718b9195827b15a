"""Linear maps: y = x W^T + b over rows, however many rows a sample has."""

from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.ops import linear_piece, sample_rows
from fastloda.pieces import Piece


def addmm(node, gy: Tensor) -> dict[int, Piece]:
    """addmm(bias, x, weight.T): inputs 0 bias [O], 1 x [rows, C], 2 weight.T [C, O]."""
    if node._saved_alpha != 1 or node._saved_beta != 1:
        raise PrivacyError("addmm with alpha or beta other than 1 has no per-sample rule")
    x = node._saved_mat1  # None where the weight does not train
    return {0: Piece(bias_grad, (gy,))} | ({} if x is None else {2: linear_piece(x, gy)})


def mm(node, gy: Tensor) -> dict[int, Piece]:
    """mm(x, weight.T): inputs 0 x [rows, C], 1 weight.T [C, O]."""
    return {1: linear_piece(node._saved_self, gy)}


def bias_grad(gy: Tensor, samples: int) -> Tensor:
    """[samples, O]"""
    return sample_rows(gy, samples).sum(1)
