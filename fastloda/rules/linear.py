"""Linear maps: y = x W^T + b over rows, however many rows a sample has."""

import torch
from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.ops import sample_rows
from fastloda.pieces import Piece


def addmm(node, gy: Tensor) -> dict[int, Piece]:
    """addmm(bias, x, weight.T): inputs 0 bias [O], 1 x [rows, C], 2 weight.T [C, O]."""
    if node._saved_alpha != 1 or node._saved_beta != 1:
        raise PrivacyError("addmm with alpha or beta other than 1 has no per-sample rule")
    return {0: Piece(bias_grad, (gy,)), 2: Piece(weight_grad, (gy, node._saved_mat1))}


def mm(node, gy: Tensor) -> dict[int, Piece]:
    """mm(x, weight.T): inputs 0 x [rows, C], 1 weight.T [C, O]."""
    return {1: Piece(weight_grad, (gy, node._saved_self))}


def weight_grad(gy: Tensor, x: Tensor, samples: int) -> Tensor:
    """[samples, C, O]: the gradient of weight.T, as it enters the product."""
    return torch.bmm(sample_rows(x, samples).mT, sample_rows(gy, samples))


def bias_grad(gy: Tensor, samples: int) -> Tensor:
    """[samples, O]"""
    return sample_rows(gy, samples).sum(1)
