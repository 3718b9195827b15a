"""Embedding tables: each sample's output gradients, added to the rows that it looked up."""

from torch import Tensor

from fastloda.errors import PrivacyError
from fastloda.ops import sample_rows
from fastloda.pieces import Piece


def embedding(node, gy: Tensor) -> dict[int, Piece]:
    """embedding(weight [V, D], indices [N, ...]): input 0 weight."""
    if node._saved_scale_grad_by_freq:
        raise PrivacyError("an embedding with scale_grad_by_freq divides by counts over the batch: samples mix")
    entries = node._saved_weight_sym_argsize_0
    padding = node._saved_padding_idx

    def weight_grad(gy: Tensor, indices: Tensor, samples: int) -> Tensor:
        rows = sample_rows(gy, samples)
        indices = indices.reshape(samples, -1)
        if 0 <= padding < entries:  # the padding row gets no gradient
            rows = rows * (indices != padding).unsqueeze(-1)
        grad = rows.new_zeros(samples, entries, rows.shape[-1])
        return grad.scatter_add_(1, indices.unsqueeze(-1).expand_as(rows), rows)

    return {0: Piece(weight_grad, (gy, node._saved_indices))}
